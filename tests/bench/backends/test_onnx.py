"""Where onnxruntime's nodes really are. Not every machine has a GPU, so some records of nodes are written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bench.backends.contract import Options
from bench.backends.onnx import PROVIDERS, open_session, read_placement

CPU, CUDA = PROVIDERS["cpu"], PROVIDERS["cuda"]


@dataclass
class Node:
    name: str
    op_type: str


@dataclass
class Subgraph:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


class OldSession:
    def get_providers(self) -> list[str]:
        return [CUDA, CPU]


@dataclass
class RecordedSession(OldSession):
    record: list[Subgraph]

    def get_provider_graph_assignment_info(self) -> list[Subgraph]:
        return self.record


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Convolution, then a reshape to sizes that are computed from the input's shape; and a lookup of floats."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Shape", ["c"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="batch"),
        helper.make_node("Concat", ["n", "minus"], ["to"], name="target", axis=0),
        helper.make_node("Reshape", ["c", "to"], ["r"], name="reshape"),
        helper.make_node("Gather", ["r", "zero"], ["y"], name="lookup", axis=1),
    ]
    constants = [
        helper.make_tensor("w", TensorProto.FLOAT, [2, 1, 1, 1], [1.0, 2.0]),
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("minus", TensorProto.INT64, [1], [-1]),
    ]
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    path = tmp_path / "shapes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))
    return path


def cuda_record(*on_cpu: Node) -> RecordedSession:
    return RecordedSession(
        [Subgraph(CUDA, [Node("conv", "Conv"), Node("reshape", "Reshape")]), Subgraph(CPU, [*on_cpu])]
    )


def test_all_on_cuda_is_accepted(model: Path) -> None:
    placement = read_placement(cuda_record(), "cuda", model)
    assert placement.nodes == {CUDA: 2}
    assert placement.stray == placement.exempt == ()


def test_shape_arithmetic_may_be_on_the_cpu(model: Path) -> None:
    session = cuda_record(Node("shape", "Shape"), Node("batch", "Gather"), Node("target", "Concat"))
    placement = read_placement(session, "cuda", model)
    assert placement.stray == ()
    assert len(placement.exempt) == 3
    assert placement.nodes == {CUDA: 2}


@pytest.mark.parametrize(
    "node",
    [
        Node("conv", "Conv"),  # computes
        Node("lookup", "Gather"),  # an operator that shapes use, but on the images' numbers
        Node("made by an optimiser", "Concat"),  # nobody knows what it makes
    ],
    ids=lambda node: node.name,
)
def test_one_compute_node_on_the_cpu_is_refused(node: Node, model: Path) -> None:
    placement = read_placement(cuda_record(node), "cuda", model)
    assert placement.stray == (f"{node.op_type} {node.name} is on {CPU}",)


def test_a_session_without_nodes_on_cuda_is_refused(model: Path) -> None:
    session = RecordedSession([Subgraph(CPU, [Node("shape", "Shape")])])
    assert f"no node is on {CUDA}" in read_placement(session, "cuda", model).stray


def test_a_runtime_that_keeps_no_record_is_refused(model: Path) -> None:
    (stray,) = read_placement(OldSession(), "cuda", model).stray
    assert "install 1.24 or newer" in stray


def test_what_onnxruntime_does_when_cuda_is_asked_for_and_absent(model: Path) -> None:
    """It lists CUDA as available and runs everything on the CPU: the fallback that must never become a row."""
    import onnxruntime
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA, and says so")
    session = open_session(str(model), "cuda", Options(threads=1))
    placement = read_placement(session, "cuda", model)
    assert f"Conv conv is on {CPU}" in placement.stray
    assert f"no node is on {CUDA}" in placement.stray


def test_a_real_session_on_the_cpu_counts_its_nodes(model: Path) -> None:
    placement = read_placement(open_session(str(model), "cpu", Options(threads=1)), "cpu", model)
    assert placement.stray == ()
    assert placement.nodes[CPU] >= 3

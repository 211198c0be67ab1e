"""Where onnxruntime's nodes really are. Not every machine has a GPU, so some records of nodes are written by hand."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sweeps import with_variants

from bench.backends.contract import Options
from bench.backends.onnx import CPU as ONNX_CPU
from bench.backends.onnx import PROVIDERS, X86, emulation, open_session, read_placement
from export.bundle import Bundle

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


@pytest.mark.skipif(platform.machine() not in X86, reason="there may be float16 kernels for other processors")
def test_on_x86_layers_of_float16_are_computed_in_float32(tmp_path: Path) -> None:
    """What `emulation` takes for granted, of the graph that onnxruntime runs: every layer takes float32 weights."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "kernel"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "matrix"], ["g"]),
        helper.make_node("MatMul", ["g", "square"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    shapes = {"kernel": [2, 1, 3, 3], "matrix": [8, 5], "square": [5, 5]}
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT16, shape, np.ones(shape, np.float16))
        for name, shape in shapes.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 1, 4, 4]), ("y", ["n", 5]))
    ]
    graph = helper.make_graph(nodes, "half", ends[:1], ends[1:], weights)
    options, optimised = onnxruntime.SessionOptions(), tmp_path / "optimised.onnx"
    options.optimized_model_filepath = str(optimised)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    run = onnx.load(str(optimised)).graph
    kinds = {initializer.name: initializer.data_type for initializer in run.initializer}
    kinds |= {node.output[0]: node.attribute[0].i for node in run.node if node.op_type == "Cast"}
    layers = {node.op_type: kinds[node.input[1]] for node in run.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    assert layers == dict.fromkeys(("Conv", "Gemm", "MatMul"), TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("machine", "variant", "why"),
    [
        ("x86_64", "float16", "no kernels"),
        ("AMD64", "float16-raw", "no kernels"),
        ("aarch64", "float16", None),
        ("x86_64", "float32", None),
        ("x86_64", "int8-raw", None),
    ],
)
def test_halves_are_emulated_on_x86(
    machine: str, variant: str, why: str | None, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever instructions the processor has; and a session says so."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert emulation(variant) == why
    bundle = Bundle.open(with_variants(small_bundle, tmp_path / "bundle", [variant.removesuffix("-raw")]))
    session = ONNX_CPU.load(bundle, Options(threads=1, variant=variant.removesuffix("-raw")))
    assert session.placement().emulated == why

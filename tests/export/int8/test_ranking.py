"""Which layers int8's error comes from, and which are then left in float."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.formats.onnx_int8 import Quantiser
from export.int8.ranking import Look, Ranked

INPUTS = np.random.default_rng(0).random((100, 2, 6, 6), dtype=np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two convolutions and a matrix product. The second convolution's weights of one channel, which is always zero,
    dwarf the others, so that a scale for all of them is too coarse.
    """
    rng = np.random.default_rng(1)
    w1 = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
    w1[0] = -np.abs(w1[0])
    w2 = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    w2[:, 0] *= 100
    tensors = {"w1": w1, "w2": w2, "w3": rng.standard_normal((5, 216)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"], name="relu"),
        helper.make_node("Conv", ["ar", "w2"], ["b"], name="coarse", pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["b"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="last", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


def ranked(source: Path, labels: np.ndarray | None = None) -> Ranked:
    return Ranked(Quantiser(source, INPUTS[:80], source.parent), source, INPUTS[80:], labels, source.parent)


def test_the_layer_that_the_error_comes_from_is_first(source: Path) -> None:
    found = ranked(source).layers(100.0, None)
    first = found.layers[0]
    assert (first.name, first.weights) == ("coarse", "w2")
    assert first.error_percent < 0.2 * found.all_int8_error_percent
    assert not any(layer.in_float for layer in found.layers)
    assert found.error_percent == found.all_int8_error_percent
    assert found.inputs == 20
    assert sum(layer.multiply_adds_percent for layer in found.layers) == pytest.approx(100)


def test_it_is_left_in_float_where_the_limit_asks_for_it(source: Path, tmp_path: Path) -> None:
    look = ranked(source)
    whole = look.looked_at().error_percent
    found = look.layers(whole, None)  # well within it: 0.8 of it
    assert [layer.name for layer in found.layers if layer.in_float] == ["coarse"]
    assert found.error_percent == found.layers[0].error_percent < 0.8 * whole
    path = tmp_path / "int8.onnx"
    Quantiser(source, INPUTS[:80], tmp_path).write(path, ["coarse"])
    model = onnx.load(str(path))
    constants = {each.name for each in model.graph.initializer}
    assert {node.name: node.input[1] in constants for node in model.graph.node if node.op_type in ("Conv", "Gemm")} == {
        "first": False,  # behind a DequantizeLinear
        "coarse": True,
        "last": False,
    }


def test_a_file_that_is_good_enough_is_not_looked_at_for_minutes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.int8 import ranking

    monkeypatch.setattr(ranking, "RANKED_S", 0.0)
    look = ranked(source)
    whole = look.looked_at().error_percent
    found = look.layers(2 * whole, None)
    assert (found.layers, found.error_percent) == ((), whole)
    assert [layer.name for layer in look.layers(whole, None).layers if layer.in_float] == ["coarse"]


def test_top1_may_drop_by_so_much(source: Path) -> None:
    """The labels are what float32 says, so that the int8 file can only be worse."""
    from export.formats.onnx_file import runner

    labels = runner(source)(INPUTS[80:])[0].argmax(1)
    look = ranked(source, labels)
    drop = look.looked_at().drop
    assert drop is not None
    assert drop > 5
    assert not any(layer.in_float for layer in look.layers(100.0, drop).layers)
    found = look.layers(100.0, 0.0)
    assert found.layers[0].in_float
    assert found.top1_drop_points == 0
    with pytest.raises(ValueError, match="no labels"):
        ranked(source).layers(100.0, 1.0)


def test_within() -> None:
    assert Look(7.9, None).within(10, None)
    assert not Look(8.1, None).within(10, None)
    assert Look(1.0, 0.5).within(10, 0.5)
    assert not Look(1.0, 0.6).within(10, 0.5)


def test_a_wrong_zero_point_is_found_and_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded at the input of the last layer."""
    write = Quantiser.write

    def seeded(self: Quantiser, path: Path, in_float: Collection[str] = ()) -> int:
        opset = write(self, path, in_float)
        model = onnx.load(str(path))
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(np.uint8(0)), "wrong"))
        for node in model.graph.node:
            if node.name == "f_DequantizeLinear" and "last" not in in_float:
                node.input[2] = "wrong"
        onnx.save(model, str(path))
        return opset

    monkeypatch.setattr(Quantiser, "write", seeded)
    found = ranked(source).layers(100.0, None)
    assert found.layers[0].name == "last"

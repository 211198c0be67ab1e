"""Scales of weights, and what their rounding takes from a layer's mean output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.formats.onnx_file import runner
from export.formats.onnx_int8 import Quantiser
from export.int8.layers import integer_layers, multiply_adds, optimised
from export.int8.pairs import can_saturate, worst_pairs
from export.int8.weights import layers_of, shifts, with_biases

RNG = np.random.default_rng(0)
INPUTS = RNG.random((60, 3, 8, 8), dtype=np.float32)


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two convolutions, one without a bias, and two matrix products, one of them transposed; made for ranges of all."""
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (6, 8, 3, 3), "w3": (5, 96), "b3": (5,), "w4": (5, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["ar"], name="relu"),
        helper.make_node("Conv", ["ar", "w2"], ["b"], name="second"),
        helper.make_node("Flatten", ["b"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["c"], name="third", transB=1),
        helper.make_node("Gemm", ["c", "w4"], ["y"], name="fourth"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [
            numpy_helper.from_array(RNG.standard_t(3, shape).astype(np.float32), name)  # with some large weights
            for name, shape in shapes.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def test_every_layer_has_scales_that_are_safe_in_any_order(model: onnx.ModelProto) -> None:
    layers = list(layers_of(model.graph))
    assert [layer.node.name for layer in layers] == ["first", "second", "third", "fourth"]
    for layer in layers:
        whole = np.rint(layer.rows / layer.scales[:, None]).astype(np.int8)
        assert not can_saturate(worst_pairs(whole)).any()
        assert np.abs(layer.rounded_off()).max() <= 0.51 * layer.scales.max()


def test_the_quantised_file_has_those_scales(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Whatever onnxruntime makes of the overrides: no pair of what stands in the file can saturate."""
    path = tmp_path / "int8.onnx"
    Quantiser(saved(model, tmp_path / "m.onnx"), INPUTS, tmp_path).write(path)
    layers = list(integer_layers(optimised(path)))
    assert len(layers) == 4
    assert not any(can_saturate(worst_pairs(layer.rows)).any() for layer in layers)


def test_what_rounding_takes_from_the_mean(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Each layer's shift, against running the file with that layer's weights rounded."""
    layers = list(layers_of(model.graph))
    lost = shifts(model, layers, INPUTS)
    assert set(lost) == {layer.node.name for layer in layers}
    for layer in layers:
        means = []
        for rounded in (False, True):
            one = onnx.ModelProto()
            one.CopyFrom(model)
            (weights,) = (each for each in one.graph.initializer if each.name == layer.node.input[1])
            if rounded:
                whole = numpy_helper.to_array(weights) - layer.rounded_off()
                weights.CopyFrom(numpy_helper.from_array(whole, weights.name))
            del one.graph.output[:]
            one.graph.output.append(helper.make_tensor_value_info(layer.node.output[0], TensorProto.FLOAT, None))
            (output,) = runner(saved(one, tmp_path / "one.onnx"))(INPUTS)
            means.append(output.mean(tuple(axis for axis in range(output.ndim) if axis != 1)))
        np.testing.assert_allclose(lost[layer.node.name], means[0] - means[1], atol=2e-4)


def test_a_bias_is_added_where_there_was_none(model: onnx.ModelProto, tmp_path: Path) -> None:
    more = {"first": np.arange(8, dtype=np.float32), "second": np.arange(6, dtype=np.float32)}
    corrected = with_biases(model, more)
    nodes = {node.name: node for node in corrected.graph.node}
    constants = {each.name: numpy_helper.to_array(each) for each in corrected.graph.initializer}
    had = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    np.testing.assert_array_equal(constants[nodes["first"].input[2]], had["b1"] + more["first"])
    np.testing.assert_array_equal(constants[nodes["second"].input[2]], more["second"])
    assert nodes["third"].input[2] == "b3"
    assert "b1" not in constants
    onnx.checker.check_model(corrected, full_check=True)
    assert [node.input[2] for node in model.graph.node if node.name == "first"] == ["b1"]  # the given one stays


def test_biases_make_the_file_better(model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.formats import onnx_int8

    source = saved(model, tmp_path / "m.onnx")
    truth = runner(source)(INPUTS)[0].astype(np.float64)

    def error() -> float:
        path = tmp_path / "int8.onnx"
        Quantiser(source, INPUTS, tmp_path).write(path)
        (tmp_path / "ranges.json").unlink()
        return float(np.sqrt(np.mean((runner(path, optimised=True)(INPUTS)[0] - truth).mean(0) ** 2)))

    corrected = error()
    monkeypatch.setattr(onnx_int8, "shifts", lambda *rest: {})
    assert corrected < 0.5 * error()


def test_products_are_counted(model: onnx.ModelProto) -> None:
    assert multiply_adds(model, INPUTS[:2]) == {
        "first": 2 * 8 * 36 * 27,
        "second": 2 * 6 * 16 * 72,
        "third": 2 * 5 * 96,
        "fourth": 2 * 4 * 5,
    }

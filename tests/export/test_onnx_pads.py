"""Padding inside convolutions and apart: the same numbers, and a Pad moved only where that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.formats import onnx_pads

WIDTH = 20


def conv_model(
    *before: onnx.NodeProto,
    kernel: tuple[int, int] = (1, 9),
    pads: tuple[int, ...] = (0, 4, 0, 4),
    channels: int = 4,
    group: int = 1,
    reads: str = "x",
    constants: dict[str, np.ndarray] | None = None,
    outputs: tuple[str, ...] = ("y",),
    behind: tuple[onnx.NodeProto, ...] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """A convolution with what stands before and behind it."""
    weight = np.random.default_rng(0).standard_normal((8, channels // group, *kernel)).astype(np.float32)
    if "auto_pad" not in attributes:
        attributes["pads"] = pads
    conv = helper.make_node("Conv", [reads, "w"], ["y"], name="conv", group=group, **attributes)
    graph = helper.make_graph(
        [*before, conv, *behind],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, 3, WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in {"w": weight, **(constants or {})}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def outputs(model: onnx.ModelProto, optimised: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [3, *session.get_inputs()[0].shape[1:]]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def moved(model: onnx.ModelProto, *passes: Any) -> onnx.ModelProto:
    """The model after the passes, checked by ONNX, and seen to compute the same."""
    wanted = outputs(model)
    changed = ir.from_proto(model)
    for each in passes:
        each(changed)
    result = ir.to_proto(changed)
    onnx.checker.check_model(result, full_check=True)
    for before, after in zip(wanted, outputs(result), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize(
    ("kernel", "pads", "others"),
    [
        ((1, 9), (0, 4, 0, 4), {}),
        ((1, 9), (0, 8, 0, 0), {}),
        ((3, 9), (1, 5, 0, 3), {}),
        ((1, 7), (0, 9, 0, 9), {"dilations": (1, 3)}),
        ((1, 16), (0, 14, 0, 14), {"strides": (1, 4)}),
    ],
)
def test_padding_of_wide_kernels_is_put_apart(kernel: Any, pads: Any, others: dict[str, Any]) -> None:
    model = moved(conv_model(kernel=kernel, pads=pads, **others), onnx_pads.apart)
    assert operators(model) == ["Pad", "Conv"]
    assert [list(a.ints) for a in model.graph.node[1].attribute if a.name == "pads"] == [[0, 0, 0, 0]]


def test_onnxruntime_leaves_it_apart(tmp_path: Path) -> None:
    """It would be slow again; a Pad without axes it takes back."""
    for name, axes, left in (("with", True, 1), ("without", False, 0)):
        model = moved(conv_model(), onnx_pads.apart)
        pad = model.graph.node[0]
        if not axes:
            model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 4, 0, 0, 0, 4]), "all"))
            del pad.input[1:]
            pad.input.append("all")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert operators(onnx.load(options.optimized_model_filepath)).count("Pad") == left


@pytest.mark.parametrize(
    "model",
    [
        conv_model(kernel=(1, 9), pads=(0, 0, 0, 0)),
        conv_model(kernel=(3, 3), pads=(1, 1, 1, 1)),  # a narrow kernel
        conv_model(kernel=(9, 1), pads=(4, 0, 4, 0)),  # along columns
        conv_model(kernel=(1, 9), pads=(0, 1, 0, 1)),  # two outputs of 14
        conv_model(channels=8, group=8),  # one channel to a group
        conv_model(auto_pad="SAME_UPPER"),
    ],
)
def test_other_padding_stays_inside(model: onnx.ModelProto) -> None:
    assert operators(moved(model, onnx_pads.apart)) == ["Conv"]


def test_there_and_back() -> None:
    model = moved(conv_model(), onnx_pads.apart, onnx_pads.inside)
    assert operators(model) == ["Conv"]


def pad(*inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Pad", ["x", *inputs], ["padded"], name="pad", **attributes)


ZEROS_AT_THE_SIDES = np.array([0, 0, 0, 4, 0, 0, 0, 3])


def padded_model(
    *inputs: str, pads: np.ndarray = ZEROS_AT_THE_SIDES, constants: Any = None, mode: str = "constant", **more: Any
) -> onnx.ModelProto:
    node = pad("p", *inputs, mode=mode)
    more = {"pads": (0, 0, 0, 0), **more}
    return conv_model(node, reads="padded", constants={"p": pads, **(constants or {})}, **more)


AXES = {"axes": np.array([3])}


@pytest.mark.parametrize(
    "model",
    [
        padded_model(),
        padded_model("zero", constants={"zero": np.float32(0)}),
        padded_model("", "axes", pads=np.array([4, 3]), constants=AXES),
        padded_model("", "axes", pads=np.array([4, 3]), constants={"axes": np.array([-1])}),
        padded_model(pads=np.array([0, 0, 1, 4, 0, 0, 0, 3]), kernel=(3, 9)),
    ],
)
def test_zeros_go_into_the_convolution(model: onnx.ModelProto) -> None:
    assert operators(moved(model, onnx_pads.inside)) == ["Conv"]


@pytest.mark.parametrize(
    "model",
    [
        padded_model("one", constants={"one": np.float32(1)}),
        padded_model(mode="reflect"),
        padded_model(mode="edge"),
        padded_model(mode="wrap"),
        padded_model(pads=np.array([0, 0, 0, -2, 0, 0, 0, 3])),
        padded_model(pads=np.array([1, 0, 0, 0, 0, 0, 0, 0])),
        padded_model(pads=np.array([2, 0, 0, 4, 0, 0, 0, 4])),
        padded_model(outputs=("y", "padded")),
        padded_model(outputs=("y", "z"), behind=(helper.make_node("Relu", ["padded"], ["z"], name="other"),)),
        padded_model(auto_pad="SAME_UPPER"),
    ],
)
def test_any_other_pad_stays(model: onnx.ModelProto) -> None:
    assert "Pad" in operators(moved(model, onnx_pads.inside))


def test_a_pad_before_pooling_stays() -> None:
    """A maximum takes zeros for numbers and its own padding for none; an average may count it or not."""
    for pool in ("MaxPool", "AveragePool"):
        graph = helper.make_graph(
            [pad("p"), helper.make_node(pool, ["padded"], ["y"], name="pool", kernel_shape=[1, 9])],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 3, WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(ZEROS_AT_THE_SIDES, "p")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        assert operators(moved(model, onnx_pads.inside)) == ["Pad", pool]

"""ONNX files that were folded to something else than they were, and what else goes wrong in the same way."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import File, assert_same, explain_onnx, feeds, fold_and_compare, fold_onnx, op_types, run, weights

from export.cli import app
from export.fold import FoldError
from export.fold.report import Strategy
from trainer.errors import UserError

LISTED = {"before 14": ("y", "mean", "var", "saved_mean", "saved_var"), "from 14": ("y", "mean", "var")}


# -- statistics of the batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 8, 9, 12, 13, 14, 17])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_extra_outputs_mean_training_whether_they_are_read_or_not(opset: int, dtype: str, tmp_path: Path) -> None:
    """Up to opset 13, listing them alone does, as onnxruntime reads it. An input of bytes was not compared, and the
    file was published with an output 488 times too large.
    """
    file = File(opset, 3 if opset < 9 else 8)
    x = file.node("Cast", file.input("x", "n", 3, 8, 8, dtype=dtype), to=TensorProto.FLOAT)
    training = {} if opset < 14 else {"training_mode": 1}
    file.norm(file.conv(x, 3, 6), 6, outputs=LISTED["before 14" if opset < 14 else "from 14"], **training)
    file.output("y", "n", 6, 8, 8)
    result = fold_and_compare(file.save(tmp_path))
    assert "statistics of the batch" in result.report.kept[0].reason


@pytest.mark.parametrize("opset", [14, 15, 17])
def test_training_mode_with_one_output(opset: int, tmp_path: Path) -> None:
    """ONNX's checker takes it, onnxruntime refuses it, so that only the report can be right."""
    file = File(opset)
    file.norm(file.conv(file.input("x", "n", 3, 8, 8), 3, 6), 6, outputs=["y"], training_mode=1)
    file.output("y", "n", 6, 8, 8)
    report = explain_onnx(file.save(tmp_path))
    assert not report.folded
    assert "statistics of the batch" in report.kept[0].reason


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "bool", "float16", "float64"])
def test_inputs_of_every_type_are_compared(dtype: str, tmp_path: Path) -> None:
    """All but floating-point ones were fed as float32, so that onnxruntime refused them and nothing was compared."""
    file = File()
    x = file.node("Cast", file.input("x", "n", 3, 8, 8, dtype=dtype), to=TensorProto.FLOAT)
    file.norm(file.conv(x, 3, 6), 6, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    assert len(fold_and_compare(file.save(tmp_path)).report.folded) == 1


def test_numbers_of_rows_are_compared(tmp_path: Path) -> None:
    """Token types: an embedding of two rows, which random numbers of rows miss."""
    file = File()
    rows = file.node("Gather", file.random(2, 6), file.input("ids", "n", 7, dtype="int64"))
    turned = file.node("Transpose", rows, perm=[0, 2, 1])
    file.norm(file.node("Conv", turned, file.random(5, 6, 3)), 5, outputs=["y"])
    file.output("y", "n", 5, 5)
    assert len(fold_and_compare(file.save(tmp_path)).report.folded) == 1


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Of `python -m export`, which turns a UserError into its exit code."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    try:
        app(prog_name="export")
    except SystemExit as ended:
        return int(ended.code or 0)
    except UserError as error:
        return error.exit_code
    return 0


def test_what_can_not_be_compared_is_not_written_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime knows no operator of another domain."""
    file = File()
    file.domains.append(helper.make_opsetid("example", 1))
    x = file.node("Own", file.input("x", "n", 4, 8, 8), domain="example")
    file.value_info.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 4, 8, 8]))
    file.norm(file.conv(x, 4, 6), 6, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    source, target = file.save(tmp_path), tmp_path / "folded.onnx"
    with pytest.raises(FoldError, match="unchecked") as refused:
        fold_onnx(source, target)
    assert refused.value.exit_code == 1
    assert exit_code(monkeypatch, "fold", source, "-o", target) == 1
    assert not target.exists()
    result = fold_onnx(source, target, unchecked=True)
    assert result.difference is None
    assert result.not_run
    assert op_types(target) == {"Own": 1, "Conv": 1}
    target.unlink()
    assert exit_code(monkeypatch, "fold", source, "-o", target, "--unchecked") == 1
    assert op_types(target) == {"Own": 1, "Conv": 1}


# -- numbers that are none -------------------------------------------------------------------------------------------


def overflowing(dtype: str, ceiling: float) -> File:
    """Conv → ReLU → Conv → BatchNorm, whose second product of weight and scale is beyond the type's largest number."""
    file = File(dtype=dtype)
    x = file.input("x", "n", 1, 6, 6)
    first = file.node("Conv", x, file.constant(np.full((2, 1, 1, 1), ceiling**-0.5)))
    second = file.node(
        "Conv", file.node("Relu", first), file.constant([[[[ceiling**0.5]], [[-(ceiling**0.5) / 2]]]]), name="last"
    )
    constants = [file.constant([value]) for value in (4 * ceiling**0.5, 0.5, 0.0, 1.0)]
    file.node("BatchNormalization", second, *constants, outputs=["y"], name="norm")
    file.output("y", "n", 1, 6, 6)
    return file


@pytest.mark.parametrize(("dtype", "ceiling"), [("float16", 65504.0), ("float32", 3.4e38)])
def test_a_fold_that_overflows(dtype: str, ceiling: float, tmp_path: Path) -> None:
    """Was published with infinite weights, as differing by 0.0e+00: `max(0, nan)` is 0."""
    source = overflowing(dtype, ceiling).save(tmp_path)
    fold_and_compare(source)
    assert all(np.isfinite(array).all() for array in weights(tmp_path / "folded.onnx").values())


def test_one_fold_that_breaks_does_not_stop_the_others(tmp_path: Path) -> None:
    file = overflowing("float16", 65504.0)
    other = file.norm(file.conv(file.input("x2", "n", 4, 6, 6), 4, 6), 6, name="sound")
    file.output(other, "n", 6, 6, 6)
    result = fold_and_compare(file.save(tmp_path))
    assert "sound" in [norm.name for norm in result.report.folded]


def test_weights_that_underflow(tmp_path: Path) -> None:
    """A scale of 1e-6 on weights of 1e-3 leaves nothing of them in half precision."""
    file = File(dtype="float16")
    h = file.node("Conv", file.input("x", "n", 2, 6, 6), file.constant(np.array([[1, 2], [3, -1.5]])[..., None, None]))
    small = file.node("BatchNormalization", h, *map(file.constant, ([3e-7] * 2, [0.0] * 2, [0.0] * 2, [1.0] * 2)))
    file.node("Mul", small, file.constant(np.array(1000.0)), outputs=["y"])
    file.output("y", "n", 2, 6, 6)
    source = file.save(tmp_path)
    fold_and_compare(source, tolerance=0.1)


@pytest.mark.parametrize("function", ["Sqrt", "Log", "Reciprocal"])
def test_outputs_that_are_not_numbers_are_compared_too(function: str, tmp_path: Path) -> None:
    """Of negative values and of zeros, before and after alike: no reason to refuse the file."""
    file = File()
    h = file.norm(file.conv(file.input("x", "n", 3, 8, 8), 3, 6), 6)
    file.node(function, file.node("Relu", h) if function != "Sqrt" else h, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    assert len(fold_and_compare(file.save(tmp_path), tolerance=1e-2).report.folded) == 1


@pytest.mark.parametrize("which", ["gamma", "beta", "mean", "var"])
@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0], ids=str)
def test_parameters_without_a_finite_result(which: str, value: float, tmp_path: Path) -> None:
    """A negative variance makes NaN of a channel. Kept, or refused as no valid model."""
    file = File()
    parameters = dict(zip(("gamma", "beta", "mean", "var"), file.parameters(6), strict=True))
    parameters[which][2] = value
    names = [file.constant(array) for array in parameters.values()]
    h = file.conv(file.input("x", "n", 3, 8, 8), 3, 6)
    file.node("BatchNormalization", h, *names, outputs=["y"], name="norm")
    file.output("y", "n", 6, 8, 8)
    source = file.save(tmp_path)
    try:
        fold_and_compare(source)
    except FoldError:
        assert not (tmp_path / "folded.onnx").exists()


def test_a_mean_far_beyond_the_deviation(tmp_path: Path) -> None:
    """x - mean cancels what W x + (b - W mean) does not: off by 1.5e-3 in float32. Kept, or said."""
    file = File()
    x = file.input("x", "n", 4, 8, 8)
    constants = [file.constant(np.full(4, value)) for value in (1.0, 0.5, 1e4, 1.0)]
    norm = file.node("BatchNormalization", x, *constants, name="norm")
    file.node("Conv", norm, file.random(6, 4, 3, 3), outputs=["y"])
    file.output("y", "n", 6, 6, 6)
    source = file.save(tmp_path)
    inputs = {"x": (1e4 + np.random.default_rng(0).standard_normal((2, 4, 8, 8))).astype(np.float32)}
    result = fold_and_compare(source, inputs=inputs, tolerance=1e-2)
    try:
        assert_same(run(source, inputs), run(tmp_path / "folded.onnx", inputs), 1e-4)
    except AssertionError:
        assert re.search("float32|cancel|precision|rounding", result.report.model_dump_json())


# -- one more channel where there is no place for it -----------------------------------------------------------------


def reshaped(file: File, x: str, how: str) -> str:
    """[n, 6, 8, 8] → [n, 6, 64], with the sizes as exporters write them."""

    def integers(*numbers: int) -> str:
        return file.constant(numbers, dtype="int64")

    fixed = {"-1": (0, 6, -1), "sizes": (0, 6, 64), "batch -1": (-1, 6, 64)}
    if how in fixed:
        return file.node("Reshape", x, integers(*fixed[how]))
    shape = file.node("Shape", x)
    parts = [file.node("Slice", shape, integers(first), integers(end)) for first, end in ((0, 1), (1, 2), (2, 4))]
    parts[2] = file.node("ReduceProd", parts[2], axes=[0]) if how == "multiplied" else integers(-1)
    parts[1] = parts[1] if how == "computed" else integers(6)
    return file.node("Reshape", x, file.node("Concat", *parts, axis=0))


@pytest.mark.parametrize("how", ["-1", "sizes", "batch -1", "computed", "multiplied"])
@pytest.mark.parametrize("strategy", ["auto", "ones"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_reshape_before_a_convolution_of_rank_1(
    how: str, strategy: Strategy, norm_first: bool, tmp_path: Path
) -> None:
    """A ones channel was allowed through a reshape that names the number of channels; the file failed on every call."""
    file = File()
    h = file.node("Relu", file.conv(file.input("x", "n", 4, 8, 8), 4, 6))
    h = reshaped(file, file.norm(h, 6), how) if norm_first else file.norm(reshaped(file, h, how), 6)
    file.node("Conv", h, file.random(5, 6, 3), file.random(5), outputs=["y"], pads=[1, 1])
    file.output("y", "n", 5, 64)
    fold_and_compare(file.save(tmp_path), strategy)


@pytest.mark.parametrize("strategy", ["auto", "ones", "bias-map", "all"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("what", ["sizes", "scales"])
def test_a_resize_to_constant_sizes(strategy: Strategy, norm_first: bool, what: str, tmp_path: Path) -> None:
    """Its `sizes` name the number of channels too. As `scales`, they take any."""
    file = File()
    h = file.node("Relu", file.conv(file.input("x", 2, 4, 8, 8), 4, 6))
    h = file.norm(h, 6) if norm_first else h
    constant = file.constant([2, 6, 12, 16], dtype="int64") if what == "sizes" else file.constant([1, 1, 1.5, 2.0])
    h = file.node("Resize", h, "", *([""] if what == "sizes" else []), constant, mode="linear")
    h = h if norm_first else file.norm(h, 6)
    file.node("Conv", h, file.random(5, 6, 3, 3), outputs=["y"], pads=[1, 1, 1, 1])
    file.output("y", 2, 5, 12, 16)
    result = fold_and_compare(file.save(tmp_path), strategy, size=8)
    assert what == "sizes" or strategy != "ones" or not result.report.kept


# -- parts of the network that lie elsewhere -------------------------------------------------------------------------


def branch(name: str, x: str, norm: bool, *nodes: onnx.NodeProto, parameters: list[str]) -> onnx.GraphProto:
    if norm:
        node = helper.make_node("BatchNormalization", [x, *parameters], [f"{name}_y"], name=f"norm_{name}")
    else:
        node = helper.make_node("Neg", [x], [f"{name}_y"])
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["a", "b", "h", "w"])
    return helper.make_graph([*nodes, node], name, [], [output])


@pytest.mark.parametrize("reads", ["what a BatchNorm makes", "what a BatchNorm reads", "the weight"])
@pytest.mark.parametrize("then", [True, False])
def test_branches_that_read_what_is_folded(reads: str, then: bool, tmp_path: Path) -> None:
    """A branch of an If reads values of the graph around it by name alone, and has BatchNorms of its own."""
    file = File()
    x, condition = file.input("x", 2, 6, 8, 8), file.input("c", dtype="bool")
    h = file.conv(x, 6, 6)
    n = file.norm(h, 6, name="outer")
    weight = next(w.name for w in file.weights if len(w.dims) == 4)
    inner = {"what a BatchNorm makes": n, "what a BatchNorm reads": h, "the weight": weight}[reads]
    parameters = [file.constant(array) for array in file.parameters(6)]
    file.node(
        "If",
        condition,
        outputs=["z"],
        then_branch=branch("then", inner, reads != "the weight", parameters=parameters),
        else_branch=branch("else", inner, False, parameters=parameters),
    )
    file.node("Relu", n, outputs=["y"])
    file.output("y", 2, 6, 8, 8)
    file.output("z", "a", "b", "h", "w")
    source = file.save(tmp_path)
    inputs = {"x": feeds(onnx.load(source))["x"], "c": np.array(then)}
    fold_and_compare(source, inputs=inputs)


def test_batchnorms_in_every_kind_of_subgraph_are_reported(tmp_path: Path) -> None:
    """An If within a loop's body, the body itself, and a function that another one calls: each once."""
    file = File()
    x = file.input("x", 2, 6, 8, 8)
    parameters = [file.constant(array) for array in file.parameters(6)]
    inner = branch("then", "carried", True, parameters=parameters), branch("else", "carried", False, parameters=[])
    choice = helper.make_node("If", ["go"], ["chosen"], then_branch=inner[0], else_branch=inner[1])
    norm = helper.make_node("BatchNormalization", ["chosen", *parameters], ["next"], name="norm_loop")
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [choice, norm, helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("carried", 1, [2, 6, 8, 8])],
        [scalar("on", TensorProto.BOOL, []), scalar("next", TensorProto.FLOAT, [2, 6, 8, 8])],
    )
    looped = file.node("Loop", file.constant(np.array(2)), file.constant(np.array(True)), file.conv(x, 6, 6), body=body)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    names = ["v", "g", "b", "m", "s"]
    one = helper.make_node("BatchNormalization", names, ["w"], name="norm_function")
    two = [helper.make_node("Inner", names, ["u"], domain="own"), helper.make_node("Relu", ["u"], ["w"])]
    file.functions = [
        helper.make_function("own", "Inner", names, ["w"], [one], imports),
        helper.make_function("own", "Outer", names, ["w"], two, imports),
    ]
    file.domains = imports
    first = file.node("Outer", looped, *parameters, domain="own")
    file.norm(file.conv(file.node("Outer", first, *parameters, domain="own"), 6, 4), 4, outputs=["y"], name="main")
    file.output("y", 2, 4, 8, 8)
    result = fold_and_compare(file.save(tmp_path), tolerance=1e-4)
    assert [norm.name for norm in result.report.folded] == ["main"]
    assert {norm.name for norm in result.report.kept} == {"norm_then", "norm_loop", "norm_function"}

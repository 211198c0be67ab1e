"""Valid ONNX files with sizes, outputs and graphs that nobody thought of: folded, or kept with the reason."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import (
    File,
    assert_reported,
    assert_same,
    explain_onnx,
    feeds,
    fold_and_compare,
    fold_onnx,
    is_folded,
    norms,
    run,
)

from export.fold import FoldError


def plain(x: tuple[int | str, ...] = ("n", 4, 8, 8), y: tuple[int | str, ...] = ("n", 6, 8, 8)) -> File:
    """Conv → BatchNorm → ReLU → BatchNorm → Conv → BatchNorm, from `x` to `y`."""
    file = File()
    h = file.norm(file.node("Relu", file.norm(file.conv(file.input("x", *x), 4, 6), 6)), 6)
    file.norm(file.conv(h, 6, 6), 6, outputs=["y"])
    file.output("y", *y)
    return file


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [("n", 6, 9, 9), (1, 6, 8, 8), ("n", 7, 8, 8), (1, 2), (-1, 6, -1, -1)], ids=str)
def test_outputs_of_other_sizes_than_declared(sizes: tuple[int | str, ...], tmp_path: Path) -> None:
    """onnxruntime warns and runs them: 23 of onnxoptimizer's own 163 test graphs ended in an InferenceError."""
    assert is_folded(plain(y=sizes).save(tmp_path), stale_outputs=True)


@pytest.mark.parametrize("sizes", [(1, 6, 8, 8), ("n", 6, 5, 5), (2, 3), (-1, -1, -1, -1)], ids=str)
def test_values_of_other_sizes_than_declared(sizes: tuple[int | str, ...], tmp_path: Path) -> None:
    """What an exporter noted before somebody changed the batch, say; and of a value that is not there."""
    file = plain()
    names = [node.output[0] for node in file.nodes[:-1]]
    names = names[-1:] if len(sizes) == 2 else names  # more of another rank, and onnxruntime refuses the file
    file.value_info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in (*names, "nothing")]
    fold_and_compare(file.save(tmp_path))


@pytest.mark.parametrize("strategy", ["auto", "ones", "bias-map", "floor"])
def test_stale_sizes_do_not_make_a_bias_map(strategy: str, tmp_path: Path) -> None:
    """The input may have any size, however fixed a value behind it is declared."""
    file = plain(("n", 4, "h", "w"), ("n", 6, "h", "w"))
    file.value_info = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["n", 6, 12, 12]) for node in file.nodes[:-1]
    ]
    source = file.save(tmp_path)
    fold_and_compare(source, strategy, size=12)  # type: ignore[arg-type]
    fold_and_compare(source, strategy, size=10)  # type: ignore[arg-type]


def test_sizes_of_minus_one(tmp_path: Path) -> None:
    """How PaddleOCR's models write a size that is not fixed."""
    assert is_folded(plain((-1, 4, -1, -1), (-1, 6, -1, -1)).save(tmp_path))


def test_any_size_where_32_is_too_small(tmp_path: Path) -> None:
    """inception_v3 with a dynamic height and width: its pools have nothing left of 32 pixels."""
    file = File()
    h = file.input("x", "n", 4, "h", "w")
    for channels_in in (4, 6, 6):
        h = file.norm(file.conv(h, channels_in, 6, 5, pads=[0] * 4, strides=[2, 2]), 6)
        h = file.node("Relu", h)
    h = file.node("AveragePool", h, kernel_shape=[5, 5], strides=[1, 1])
    file.node("GlobalAveragePool", file.norm(file.conv(h, 6, 5), 5), outputs=["y"])
    file.output("y", "n", 5, 1, 1)
    assert is_folded(file.save(tmp_path), size=96)


def test_a_zero_in_the_batch(tmp_path: Path) -> None:
    """As a declared size, and as what is fed to the folded file."""
    assert is_folded(plain().save(tmp_path), inputs={"x": np.zeros((0, 4, 8, 8), np.float32)})
    fold_and_compare(plain((0, 4, 8, 8), (0, 6, 8, 8)).save(tmp_path))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 4), (5, 6, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("fixed", [True, False])
def test_a_batchnorm_alone(shape: tuple[int, ...], fixed: bool, tmp_path: Path) -> None:
    """From an input of any rank to the output: no home, and said so. Two of them become one."""
    file = File()
    sizes = shape if fixed else ("n", 6, *"abc"[: len(shape) - 2])
    file.norm(file.norm(file.input("x", *sizes), 6), 6, outputs=["y"])
    file.output("y", *sizes)
    result = fold_and_compare(file.save(tmp_path))
    assert len(result.report.kept) == 1


@pytest.mark.parametrize("flowing", [True, False])
def test_a_reshape_to_a_scalar(flowing: bool, tmp_path: Path) -> None:
    """PaddleOCR's constants: an empty shape made a traceback."""
    file = File()
    h = file.norm(file.conv(file.input("x", 2, 4, 8, 8), 4, 6), 6)
    one = file.node("ReduceMean", h, keepdims=1) if flowing else file.constant([2.5])
    scalar = file.node("Reshape", one, file.constant(np.zeros(0, np.int64)))
    file.node("Mul", h, scalar, outputs=["y"])
    file.output("y", 2, 6, 8, 8)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("group", [-1, 0, 3, 4, 100])
def test_a_number_of_groups_that_does_not_divide(group: int, tmp_path: Path) -> None:
    """ONNX's checker lets it pass. Nothing can run it, and no traceback shows it."""
    file = File()
    h = file.node("Conv", file.input("x", "n", 4, 8, 8), file.random(6, 4, 3, 3), name="conv", group=group)
    file.norm(h, 6, outputs=["y"])
    file.output("y", "n", 6, 6, 6)
    refused(file, tmp_path)


@pytest.mark.parametrize("what", ["few parameters", "few pads", "no stride", "no kernel", "wide", "no perm"])
def test_files_that_nothing_can_run(what: str, tmp_path: Path) -> None:
    """More that ONNX's checker lets pass."""
    file = File()
    options = {"few pads": {"pads": [1, 1]}, "no stride": {"strides": [0, 0]}, "no kernel": {"kernel_shape": [5, 5]}}
    h = file.conv(file.input("x", "n", 4, 8, 8), 5 if what == "wide" else 4, 6, **options.get(what, {}))
    if what == "no perm":
        h = file.node("Transpose", h, perm=[0, 1])
    file.norm(h, 5 if what == "few parameters" else 6, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    refused(file, tmp_path)


def refused(file: File, folder: Path) -> None:
    """`explain` keeps or refuses, `fold` refuses and writes nothing: FoldError is the one exception."""
    source = file.save(folder)
    with contextlib.suppress(FoldError):
        assert_reported(onnx.load(source), explain_onnx(source))
    with pytest.raises(FoldError):
        fold_onnx(source, folder / "folded.onnx")
    assert not (folder / "folded.onnx").exists()


# -- outputs ---------------------------------------------------------------------------------------------------------


def outputs(file: File, h: str, kind: str) -> None:
    """An output of that kind, `z`, made of `h` or beside it."""
    value: onnx.ValueInfoProto | None = None
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    if kind == "sequence":
        file.node("SequenceConstruct", h, h, outputs=["z"])
        value = helper.make_value_info("z", helper.make_sequence_type_proto(floats))
    elif kind == "optional":
        file.node("Optional", h, outputs=["z"])
        value = helper.make_value_info("z", helper.make_optional_type_proto(floats))
    elif kind == "string":
        file.node("Identity", file.constant(np.array(["a", "b"], object), dtype=object), outputs=["z"])
        file.output("z", 2, dtype=object)
    elif kind == "labels":
        file.domains.append(helper.make_opsetid("ai.onnx.ml", 2))
        largest = file.node("ArgMax", h, axis=1, keepdims=0)
        keys = {"keys_int64s": [0, 1, 2], "values_strings": ["a", "b", "c"]}
        file.node("LabelEncoder", largest, outputs=["z"], domain="ai.onnx.ml", default_string="?", **keys)
        file.output("z", "n", dtype=object)
    elif kind == "maps":
        file.domains.append(helper.make_opsetid("ai.onnx.ml", 2))
        labels = {"classlabels_strings": list("abcdef")}
        file.node("ZipMap", h, outputs=["z"], domain="ai.onnx.ml", **labels)
        entries = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        value = helper.make_value_info("z", helper.make_sequence_type_proto(entries))
    elif kind == "bool":
        file.node("Greater", h, file.constant(0.0), outputs=["z"])
        file.output("z", "n", 6, dtype=bool)
    elif kind == "integer":
        file.node("Cast", file.node("Round", h), outputs=["z"], to=TensorProto.INT8)
        file.output("z", "n", 6, dtype="int8")
    if value is not None:
        file.outputs.append(value)


@pytest.mark.parametrize("kind", ["sequence", "optional", "string", "labels", "maps", "bool", "integer"])
@pytest.mark.parametrize("beside", [True, False])
def test_outputs_that_are_no_plain_numbers(kind: str, beside: bool, tmp_path: Path) -> None:
    """Sequences and strings have no `astype`. They are compared too, and so is a plain output `beside` them."""
    file = File()
    h = file.norm(file.node("MatMul", file.input("x", "n", 5), file.random(5, 6)), 6)
    if beside or kind == "string":
        file.node("Identity", h, outputs=["y"])
        file.output("y", "n", 6)
    outputs(file, h, kind)
    try:
        assert is_folded(file.save(tmp_path), tolerance=2e-5)
    except FoldError:
        assert kind == "maps"  # the library that reads files has no type for them


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("op_type", ["RandomNormal", "RandomUniformLike", "Bernoulli", "Dropout"])
def test_random_outputs(op_type: str, seeded: bool, tmp_path: Path) -> None:
    """They differ from run to run, so the fold is held to the others."""
    file = File()
    h = file.norm(file.node("MatMul", file.input("x", "n", 5), file.random(5, 6)), 6)
    more = {"seed": 1 if op_type == "Dropout" else 1.0} if seeded else {}
    if op_type == "RandomNormal":
        noise = file.node(op_type, shape=[2, 6], **more)
    elif op_type == "Dropout":
        noise = file.node(op_type, h, file.constant(0.5), file.constant(np.array(True)), **more)
    else:
        noise = file.node(op_type, file.node("Sigmoid", h), **more)
    file.node("Identity", noise, outputs=["noise"])
    file.node("Identity", h, outputs=["y"])
    file.output("noise", *((2, 6) if op_type == "RandomNormal" else ("n", 6)))
    file.output("y", "n", 6)
    source = file.save(tmp_path)
    result = fold_onnx(source, tmp_path / "folded.onnx")
    assert [len(result.report.folded), len(result.report.kept)] == [1, 0]
    assert result.difference is not None
    assert not norms(onnx.load(tmp_path / "folded.onnx"))
    inputs = feeds(onnx.load(source))
    assert_same(run(source, inputs)[1], run(tmp_path / "folded.onnx", inputs)[1], 2e-5)


def test_what_a_fold_changes_is_an_output_too(tmp_path: Path) -> None:
    """The convolution's output, the BatchNorm's and that of a ReLU behind it."""
    file = File()
    h = file.conv(file.input("x", "n", 4, 8, 8), 4, 6)
    n = file.norm(h, 6)
    names = [h, n, file.node("Relu", n)]
    for name in names:
        file.output(name, "n", 6, 8, 8)
    assert len(fold_and_compare(file.save(tmp_path)).report.kept) == 1


# -- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before", "after", "weight"])
def test_a_long_chain_of_identities(where: str, tmp_path: Path) -> None:
    """1,200 made a RecursionError."""
    file = File()

    def chain(value: str) -> str:
        for _ in range(1200):
            value = file.node("Identity", value)
        return value

    h, weight, second = file.input("x", "n", 5), file.random(5, 6), file.random(6, 3)
    h = file.node("MatMul", h, chain(weight) if where == "weight" else weight)
    h = file.norm(chain(h) if where == "before" else file.node("Relu", h), 6)
    file.node("MatMul", chain(h) if where == "after" else h, second, outputs=["y"])
    file.output("y", "n", 3)
    assert is_folded(file.save(tmp_path))


def test_a_long_chain_of_constants(tmp_path: Path) -> None:
    """A weight that 1,200 additions make while the network runs."""
    file = File()
    weight, little = file.random(5, 6), file.constant(1e-3)
    for _ in range(1200):
        weight = file.node("Add", weight, little)
    file.norm(file.node("MatMul", file.input("x", "n", 5), weight), 6, outputs=["y"])
    file.output("y", "n", 6)
    fold_and_compare(file.save(tmp_path), tolerance=1e-4)


OF_A_CONSTANT = ["Sin", "Softsign", "HardSwish", "Elu", "LeakyRelu", "Dropout", "Clip", "GlobalMaxPool", "MaxPool"]


@pytest.mark.parametrize("op_type", OF_A_CONSTANT)
def test_what_is_made_of_a_constant(op_type: str, tmp_path: Path) -> None:
    """XCiT's positions are sines of constants. Few such operations are computed for a weight; all may stand there."""
    file = plain()
    options = {"kernel_shape": [1, 1]} if op_type == "MaxPool" else {}
    made = file.node(op_type, file.random(1, 6, 8, 8), **options)
    total = file.node("Add", "y", made, outputs=["z"])
    file.norm(file.conv(total, 6, 6), 6, outputs=["u"])
    file.output("u", "n", 6, 8, 8)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("how", ["ConstantOfShape", "Expand", "Range", "Concat", "Tile"])
def test_large_constants_are_not_made(how: str, tmp_path: Path) -> None:
    """`explain` computed what ConstantOfShape makes of two numbers: 60,000² in a file of a few bytes; here 5,000²."""
    file = File()
    file.norm(file.conv(file.input("x", "n", 4, 8, 8), 4, 6), 6, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    size = file.constant([5000, 5000], dtype="int64")
    if how == "Range":
        large = file.node("Range", *(file.constant(float(number)) for number in (0, 25_000_000, 1)))
    elif how == "Concat":
        large = file.node("Concat", *[file.node("Expand", file.constant([[1.0]]), size)] * 2, axis=0)
    elif how == "ConstantOfShape":
        large = file.node(how, size)
    else:
        large = file.node(how, file.constant([[1.0]]), size)
    file.node("ReduceMax", large, outputs=["z"], keepdims=0)
    file.output("z")
    file.outputs[-1].type.tensor_type.shape.SetInParent()
    source = file.save(tmp_path)
    tracemalloc.start()
    try:
        report = explain_onnx(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert len(report.folded) == 1

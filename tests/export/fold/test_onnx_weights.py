"""Weights as valid ONNX files hold them: behind nodes, in every type, sparse, shared, infinite, listed as inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import File, explain_onnx, fold_and_compare, fold_onnx, is_folded, norms, op_types, weights

from export.fold import FoldError, algebra

TYPES = ["float32", "float16", "float64"]


# -- where they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_biases_of_zero_that_are_expanded(dtype: str, tmp_path: Path) -> None:
    """How `torch.onnx.export(dynamo=True, optimize=False)` writes a convolution without bias: Expand of CastLike, of
    the size that Shape finds. Of densenet121's 121 BatchNorms none was folded.
    """
    file = File(18, 10, dtype)
    zero = file.node("Constant", value=numpy_helper.from_array(np.array(0, np.float32)))

    def conv(x: str, channels_in: int, channels_out: int) -> str:
        weight = file.random(channels_out, channels_in, 3, 3)
        size = file.node("Expand", file.node("Shape", weight, start=0, end=1), file.node("Constant", value_ints=[1]))
        bias = file.node("Expand", file.node("CastLike", zero, x), size)
        return file.node("Conv", x, weight, bias, pads=[1, 1, 1, 1])

    h = file.norm(conv(file.input("x", "n", 4, 8, 8), 4, 6), 6)
    h = file.norm(file.node("Relu", h), 6)
    file.node("Relu", file.norm(conv(h, 6, 5), 5), outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    assert is_folded(file.save(tmp_path))
    assert sum(array.ndim == 4 for array in weights(tmp_path / "folded.onnx").values()) == 2  # not the old ones too


def held(file: File, array: np.ndarray, how: str) -> str:
    """The name of the array, handed over by such a node."""
    array = array.astype(file.dtype)
    if how == "Constant":
        return file.node("Constant", value=numpy_helper.from_array(array))
    if how == "Transpose":
        return file.node("Transpose", file.constant(np.ascontiguousarray(array.T)))
    if how == "Identities":
        return file.node("Identity", file.node("Identity", held(file, array, "Constant")))
    if how == "Cast":
        other = np.float64 if file.dtype == np.float32 else np.float32
        kind = helper.np_dtype_to_tensor_dtype(file.dtype)
        return file.node("Cast", file.constant(array.astype(other), dtype=other), to=kind)
    if how == "Reshape":
        return file.node("Reshape", file.constant(array.reshape(-1)), file.constant(array.shape, dtype="int64"))
    return file.node(how, file.constant(array))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("how", ["Constant", "Identity", "Identities", "Transpose", "Cast", "Reshape"])
@pytest.mark.parametrize("layer", ["Conv", "Gemm", "MatMul"])
def test_weights_behind_nodes(dtype: str, how: str, layer: str, tmp_path: Path) -> None:
    """Double and half ones behind Constant, Transpose and Identity were written as FLOAT, in files that don't load."""
    file = File(dtype=dtype)
    shape, image = ((6, 5, 1, 1), (3, 3)) if layer == "Conv" else ((5, 6), ())
    h = file.node(layer, file.input("x", "n", 5, *image), held(file, file.rng.standard_normal(shape), how))
    parameters = [held(file, array, how) for array in file.parameters(6)]
    h = file.node("BatchNormalization", h, *parameters)
    h = file.norm(file.node("Relu", h), 6)
    shape = (4, 6, 1, 1) if layer == "Conv" else (6, 4)
    file.node(layer, h, held(file, file.rng.standard_normal(shape), how), outputs=["y"])
    file.output("y", "n", 4, *image)
    no_kernel = dtype == "float64" and layer == "Conv"  # onnxruntime has none
    assert is_folded(file.save(tmp_path), unchecked=no_kernel, reference=no_kernel)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_in_fields_of_their_type(dtype: str, tmp_path: Path) -> None:
    """`float_data`, `int32_data` (of half ones), `double_data`, as old writers have them, instead of `raw_data`."""
    file = File(dtype=dtype)
    file.norm(file.node("MatMul", file.input("x", "n", 5), file.random(5, 6)), 6, outputs=["y"])
    file.output("y", "n", 6)
    file.weights = [
        helper.make_tensor(w.name, w.data_type, w.dims, numpy_helper.to_array(w).reshape(-1)) for w in file.weights
    ]
    assert not any(w.raw_data for w in file.weights)
    assert is_folded(file.save(tmp_path))


def test_weights_beside_the_file(tmp_path: Path) -> None:
    file = File()
    h = file.norm(file.node("Relu", file.conv(file.input("x", "n", 4, 8, 8), 4, 6)), 6)
    file.node("Relu", file.conv(h, 6, 5), outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    beside = tmp_path / "beside"
    beside.mkdir()
    onnx.save(file.model(), beside / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert is_folded(beside / "model.onnx")
    assert (beside / "weights.bin").exists()


@pytest.mark.parametrize("which", ["weight", "gamma", "another"])
@pytest.mark.parametrize("indices", [1, 2])
def test_sparse_weights(which: str, indices: int, tmp_path: Path) -> None:
    """Were lost on reading, so that the file no longer ran. `indices`: linear, or one for each dimension."""
    file = File(13, 8)
    h = file.norm(file.node("MatMul", file.input("x", "n", 5), file.random(5, 6, name="weight")), 6)
    file.node("MatMul", file.node("Sigmoid", h), file.random(6, 4, name="another"), outputs=["y"])
    file.output("y", "n", 4)
    if which == "gamma":
        which = file.nodes[1].input[1]
    (dense,) = [w for w in file.weights if w.name == which]
    file.weights.remove(dense)
    array = numpy_helper.to_array(dense)
    array = np.where(np.abs(array) < 0.2, 0, array)
    places = np.argwhere(array) if indices == 2 else np.flatnonzero(array)
    values = numpy_helper.from_array(array[np.nonzero(array)], which)
    file.sparse.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64), "places"), array.shape)
    )
    fold_and_compare(file.save(tmp_path))


@pytest.mark.parametrize("opset", [7, 8])
def test_weights_listed_as_inputs_below_ir_version_4(opset: int, tmp_path: Path) -> None:
    """There nobody can override them: resnet18 from a file of that age kept 20 of 20."""
    file = File(opset, 3)
    h = file.norm(file.conv(file.input("x", "n", 4, 8, 8), 4, 6), 6)
    h = file.norm(file.node("Relu", h), 6)
    h = file.node("GlobalAveragePool", file.conv(h, 6, 5))
    flat = file.node("Flatten", file.norm(h, 5))
    file.node("Gemm", flat, file.random(3, 5), file.random(3), transB=1, outputs=["y"])
    file.output("y", "n", 3)
    source = file.save(tmp_path)
    assert is_folded(source)
    folded = onnx.load(tmp_path / "folded.onnx")
    assert {v.name for v in folded.graph.input} == {"x", *weights(tmp_path / "folded.onnx")}
    assert not norms(folded)


def test_one_tensor_for_all_parameters(tmp_path: Path) -> None:
    """Ones, say, stored once: gamma, mean and variance of two BatchNorms, and the bias of a convolution."""
    file = File()
    ones = file.constant(np.full(6, 1.5))
    h = file.node("Conv", file.input("x", "n", 4, 8, 8), file.random(6, 4, 3, 3), ones)
    h = file.node("Relu", file.node("BatchNormalization", h, ones, ones, ones, ones))
    h = file.node("BatchNormalization", h, ones, file.random(6), ones, ones)
    h = file.node("Conv", h, file.random(6, 6, 3, 3), ones)
    file.node("Add", h, file.node("Reshape", ones, file.constant([1, 6, 1, 1], dtype="int64")), outputs=["y"])
    file.output("y", "n", 6, 4, 4)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("which", ["weight", "gamma"])
def test_weights_that_are_outputs(which: str, tmp_path: Path) -> None:
    """They stay what they are, under their name."""
    file = File()
    h = file.node("MatMul", file.input("x", "n", 5), file.random(5, 6, name="weight"))
    file.norm(h, 6, outputs=["y"])
    file.output("y", "n", 6)
    name, *shape = (which, 5, 6) if which == "weight" else (file.nodes[1].input[1], 6)
    file.output(name, *shape)
    fold_and_compare(file.save(tmp_path))


# -- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("output", ["y", "z"])
def test_a_folded_file_is_folded_again(dtype: str, output: str, tmp_path: Path) -> None:
    """A floor's bounds of -inf, where there is none, made our own file one with "values that are not finite"."""
    file = File(dtype=dtype)
    h = file.node("Relu", file.node("MatMul", file.input("x", "n", 5), file.random(5, 6)))
    file.norm(h, 6, outputs=["y"])
    file.node("Softmax", "y", outputs=["z"])
    file.output(output, "n", 6)
    source = file.save(tmp_path)
    assert [norm.method for norm in fold_and_compare(source, "floor").report.folded] == ["floor"]
    folded = tmp_path / "folded.onnx"
    assert not explain_onnx(folded).kept
    fold_onnx(folded, tmp_path / "again.onnx")
    assert op_types(tmp_path / "again.onnx") == op_types(folded)


def add(file: File, h: str) -> str:
    mask = np.where(np.eye(8), -np.inf, 0)
    return file.node("Add", h, file.constant(mask))


INFINITE: dict[str, Callable[[File, str], str]] = {
    "Add": add,
    "Where": lambda file, h: file.node("Where", file.constant(np.eye(8, dtype=bool)), file.constant(-np.inf), h),
    "Clip": lambda file, h: file.node("Clip", h, file.constant(-np.inf), file.constant(np.inf)),
    "Max": lambda file, h: file.node("Max", h, file.constant(-np.inf)),
    "Pad": lambda file, h: file.node("Pad", h, file.constant([0] * 7 + [2], dtype="int64"), file.constant(-np.inf)),
}


@pytest.mark.parametrize("what", INFINITE)
@pytest.mark.parametrize("softmax", [True, False])
def test_infinite_constants(what: str, softmax: bool, tmp_path: Path) -> None:
    """A mask of -inf made attention "not finite" and refused. Without the softmax, outputs are infinite."""
    file = File()
    h = file.norm(file.conv(file.input("x", "n", 3, 8, 8), 3, 4), 4)
    file.node(
        "Softmax" if softmax else "Identity", INFINITE[what](file, h), outputs=["y"], **{"axis": -1} if softmax else {}
    )
    file.output("y", "n", 4, 8, "w")
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (4,), (1, 1), (1,), (), (4, 4)], ids=str)
def test_a_gemm_with_every_form_of_c(shape: tuple[int, ...], tmp_path: Path) -> None:
    """[M, 1], a value for each row, was taken for [N] where both are 4."""
    file = File()
    c, d = file.constant(file.rng.standard_normal(shape)), file.constant(file.rng.standard_normal(shape))
    h = file.node("Gemm", file.input("x", 4, 4), file.random(4, 4), c)
    h = file.norm(file.node("Sigmoid", file.norm(h, 4)), 4)
    file.node("Gemm", h, file.random(4, 4), d, outputs=["y"])
    file.output("y", 4, 4)
    assert is_folded(file.save(tmp_path)) or shape in [(4, 1), (4, 4)]


@pytest.mark.parametrize("more", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}, {"transB": 1}], ids=str)
def test_a_gemm_with_every_attribute(more: dict[str, float], tmp_path: Path) -> None:
    file = File()
    h = file.node("Gemm", file.input("x", 4, 4), file.random(4, 4), file.random(4), **more)
    file.node("Gemm", file.norm(file.node("Tanh", file.norm(h, 4)), 4), file.random(4, 4), outputs=["y"], **more)
    file.output("y", 4, 4)
    fold_and_compare(file.save(tmp_path))


def test_half_precision_is_held_to_its_own_noise(tmp_path: Path) -> None:
    """Ten layers in float16 differ by some 1e-3 however exact the fold: "please report this model", at 1e-4."""
    file = File(dtype="float16")
    h = file.input("x", "n", 8, 6, 6)
    for _ in range(10):
        h = file.node("Relu", file.norm(file.conv(h, 8, 8), 8))
    file.node("Identity", h, outputs=["y"])
    file.output("y", "n", 8, 6, 6)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("factor", [1e3, 1e4])
def test_a_network_that_amplifies_rounding_is_held_to_its_own_noise(factor: float, tmp_path: Path) -> None:
    """LeViT's outputs move by 3.2e-4 in float32 by the order of a sum alone."""
    file = File()
    h = file.norm(file.conv(file.input("x", "n", 8, 6, 6), 8, 8), 8)
    file.node("Sin", file.node("Mul", h, file.constant(factor)), outputs=["y"])
    file.output("y", "n", 8, 6, 6)
    assert is_folded(file.save(tmp_path), tolerance=1e-5 * factor)


def test_a_wrong_fold_is_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits above still see scales that are 3 % wrong in half precision: undone, or refused."""
    real = algebra.affine

    def wrong(*arguments: Any) -> Any:
        scale, shift = real(*arguments)
        return scale * 1.03, shift

    monkeypatch.setattr(algebra, "affine", wrong)
    file = File(dtype="float16")
    file.norm(file.conv(file.input("x", "n", 8, 6, 6), 8, 8), 8, outputs=["y"])
    file.output("y", "n", 8, 6, 6)
    source, target = file.save(tmp_path), tmp_path / "folded.onnx"
    try:
        assert not fold_onnx(source, target).report.folded
    except FoldError:
        assert not target.exists()


def test_bfloat16_weights_that_are_cast(tmp_path: Path) -> None:
    """Stored in bfloat16, used in float32, of an input and for an output in float16."""
    file = File()
    weight = numpy_helper.to_array(helper.make_tensor("w", TensorProto.FLOAT, [6, 4, 3, 3], file.rng.random(216)))
    file.weights.append(helper.make_tensor("w", TensorProto.BFLOAT16, [6, 4, 3, 3], weight.reshape(-1)))
    x = file.node("Cast", file.input("x", "n", 4, 8, 8, dtype="float16"), to=TensorProto.FLOAT)
    h = file.norm(file.node("Conv", x, file.node("Cast", "w", to=TensorProto.FLOAT)), 6)
    file.node("Cast", h, outputs=["y"], to=TensorProto.FLOAT16)
    file.output("y", "n", 6, 6, 6, dtype="float16")
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_of_another_type_than_the_signal(dtype: str, tmp_path: Path) -> None:
    """From opset 15 on, statistics may be FLOAT beside a signal of half the bits. Weights stay of their type."""
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    file = File()
    file.inputs.append(helper.make_tensor_value_info("x", kind, ["n", 4]))
    file.weights.append(helper.make_tensor("w", kind, [4, 6], file.rng.random(24)))
    file.norm(file.node("MatMul", "x", "w"), 6, outputs=["y"])
    file.outputs.append(helper.make_tensor_value_info("y", kind, ["n", 6]))
    source = file.save(tmp_path)
    fold_onnx(source, tmp_path / "folded.onnx", unchecked=True)
    onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)
    folded = onnx.load(tmp_path / "folded.onnx")
    (layer,) = [node for node in folded.graph.node if node.op_type in ("MatMul", "Gemm")]
    types = {tensor.name: tensor.data_type for tensor in folded.graph.initializer}
    assert {types[name] for name in layer.input[1:]} == {kind}


def test_quantised_weights(tmp_path: Path) -> None:
    """Kept or right: no fold may write into int8 what doesn't fit, or forget who else reads the scale."""
    file = File()
    weight = file.constant(file.rng.integers(-127, 127, (6, 4, 3, 3)), dtype="int8")
    scale = file.constant(file.rng.uniform(0.01, 0.02, 6))
    h = file.node("Conv", file.input("x", "n", 4, 8, 8), file.node("DequantizeLinear", weight, scale, axis=0))
    file.norm(h, 6, outputs=["y"])
    file.output("y", "n", 6, 6, 6)
    fold_and_compare(file.save(tmp_path))

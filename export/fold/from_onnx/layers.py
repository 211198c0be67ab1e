"""Layers, BatchNorms and constants' arithmetic of an ONNX file, with weights in the type in which they are written.

Owns BatchNormalization, Conv, ConvTranspose, Gemm, MatMul, and how a constant meets a value along an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
import torch.nn.functional as F

from export.fold import algebra
from export.fold.from_onnx.nodes import (
    Reading,
    Unreadable,
    given,
    integer,
    integers,
    is_listed,
    is_standard,
    real,
    required,
    text,
)
from export.fold.maps import Map
from export.fold.operations import Affine, Layer

if TYPE_CHECKING:
    from export.fold.from_onnx.read import Reader

Tensor = torch.Tensor

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
"""The types in which layers and BatchNorms have their parameters."""


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The same type in torch. Unreadable for those in which no weights are written."""
    if dtype not in DTYPES:
        raise Unreadable(f"it is of type {dtype.name}")
    return DTYPES[dtype]


# -- BatchNorm and arithmetic ----------------------------------------------------------------------------------------


def batch_normalization(reader: Reader, node: ir.Node) -> Affine:
    """In inference mode, with constant parameters."""
    if integer(node, "training_mode", 0) or any(map(is_listed, node.outputs[1:])):
        raise Unreadable("it normalises by the statistics of the batch, so it is not a fixed scale and shift")
    if reader.opset < 7 or integer(node, "spatial", 1) != 1:
        raise Unreadable(
            "it is an old form of BatchNormalization that folding does not read (opset below 7, or not spatial)"
        )
    parameters = [required(node, place) for place in range(1, 5)]
    if any(value.is_graph_input() and reader.flows(value) for value in parameters):
        raise Unreadable("its parameters are inputs of the network, which a caller may override")
    if any(reader.array(value) is None for value in parameters):
        raise Unreadable("its parameters are computed while the network runs")
    x = required(node, 0)
    if not reader.flows(x):
        raise Unreadable("its input is a constant")
    gamma, beta, mean, var = (reader.parameter(value) for value in parameters)
    if any(parameter.dim() != 1 or parameter.shape != gamma.shape for parameter in (gamma, beta, mean, var)):
        raise Unreadable("its parameters have not one value for each channel")
    rank = reader.rank(x)
    if rank < 2 or (reader.shape(x) or ())[1] != len(gamma):
        raise Unreadable(f"it has {len(gamma)} channels and its input has not")
    eps = real(node, "epsilon", 1e-5)
    scale, shift = algebra.affine(gamma, beta, mean, var, eps)
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise Unreadable("its variance is negative or zero, so that its scale is not finite")
    offset = float((mean.double().abs() / torch.sqrt(var.double() + eps)).max()) if len(mean) else 0.0
    return Affine(Map.along(scale, shift, 1, rank), offset=offset, dtype=gamma.dtype)


def affine(scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Affine:
    """Constants' arithmetic. Unreadable where it is not finite: an infinite mask is no shift."""
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise Unreadable("its constant is not finite")
    return Affine(Map(scale, shift).shrunk(), is_norm=False, dtype=dtype)


def fitted(reader: Reader, x: ir.Value, constant: ir.Value) -> Tensor:
    """A constant as it meets `x`, float64 of the same rank. Unreadable where `x` would have to be expanded."""
    tensor = reader.tensor(constant)
    if not tensor.is_floating_point():
        raise Unreadable("it works on integers")
    rank = reader.rank(x)
    if tensor.dim() > rank:
        raise Unreadable("its constant has more axes than its operand")
    tensor = tensor.double().reshape(*([1] * (rank - tensor.dim())), *tensor.shape)
    for axis, size in enumerate(tensor.shape):
        if size != 1 and reader.fixed(x, axis) != size:
            raise Unreadable("its constant varies along an axis of no fixed size")
    return tensor


def along_one_axis(tensor: Tensor) -> Tensor:
    """The same. Unreadable where it varies along more than one axis."""
    if sum(size > 1 for size in tensor.shape) > 1:
        raise Unreadable("its constant varies along more than one axis")
    return tensor


# -- Linear ----------------------------------------------------------------------------------------------------------


def gemm(reader: Reader, node: ir.Node) -> Reading:
    """Linear of a matrix: alpha x W + beta C, where C is a value for each column."""
    x, weight, bias = required(node, 0), _weight(reader, node), None
    if weight.dim() != 2 or integer(node, "transA", 0):
        raise Unreadable("its first matrix is transposed")
    weight = weight if integer(node, "transB", 0) else weight.T
    dtype = weight.dtype
    columns = weight.shape[0]
    c = given(node, 2)
    if c is not None:
        bias = reader.parameter(c)
        if bias.dim() > 2 or (bias.dim() == 2 and bias.shape[0] != 1) or bias.numel() not in (1, columns):
            raise Unreadable("its bias differs by row")
        bias = bias.reshape(-1).expand(columns)
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    weight = weight if alpha == 1 else alpha * weight.double()
    bias = bias if beta == 1 or bias is None else beta * bias.double()
    reader.suppose(x, (None, weight.shape[1]))
    _require_channels(reader, x, -1, weight.shape[1])
    return Reading(Layer(weight, bias, 0, shared=_is_shared(node), dtype=dtype), [x], node.outputs[0], (node,))


def matmul(reader: Reader, node: ir.Node) -> Reading:
    """Linear on the last axis, with the sum that follows it as bias."""
    x, weight = required(node, 0), _weight(reader, node)
    if weight.dim() != 2:
        raise Unreadable("it multiplies by more than one matrix")
    reader.rank(x)
    _require_channels(reader, x, -1, weight.shape[0])
    layer = Layer(weight.T, None, 0, shared=_is_shared(node), dtype=weight.dtype)
    addition = _bias_after(reader, node, weight.shape[1])
    if addition is None:
        return Reading(layer, [x], node.outputs[0], (node,))
    added, bias = addition
    reader.absorbed.add(added)
    layer = Layer(weight.T, bias, 0, shared=layer.shared, dtype=weight.dtype)
    return Reading(layer, [x], added.outputs[0], (node, added))


def _bias_after(reader: Reader, node: ir.Node, channels: int) -> tuple[ir.Node, Tensor] | None:
    """The sum with a constant vector that alone reads a product of matrices, and the vector."""
    user = reader.only_user(node.outputs[0])
    if user is None or not is_standard(user[0], "Add"):
        return None
    added, place = user
    other = added.inputs[1 - place]
    if other is None or reader.array(other) is None:
        return None
    vector = reader.parameter(other)
    rank = reader.rank(required(node, 0))
    if vector.dim() > rank or vector.numel() != channels or vector.shape[-1:] != (channels,):
        return None
    return added, vector.reshape(-1)


# -- convolutions ----------------------------------------------------------------------------------------------------


def convolution(reader: Reader, node: ir.Node) -> Reading:
    """Conv or ConvTranspose of rank 1 to 3."""
    x, weight = required(node, 0), _weight(reader, node)
    c = given(node, 2)
    bias = None if c is None else reader.parameter(c)
    transposed = node.op_type == "ConvTranspose"
    rank, groups = weight.dim() - 2, integer(node, "group", 1)
    if rank not in (1, 2, 3):
        raise Unreadable(f"it is a convolution over {rank} axes")
    if groups < 1 or weight.shape[0] % groups:
        raise Unreadable(f"its number of groups, {groups}, does not divide its channels")
    kernel = list(weight.shape[2:])
    if integers(node, "kernel_shape", kernel) != kernel:
        raise Unreadable("its kernel has other sizes than it says")
    stride, dilation = integers(node, "strides", [1] * rank), integers(node, "dilations", [1] * rank)
    extra = integers(node, "output_padding", [0] * rank) if transposed else []
    if min(*stride, *dilation) < 1 or any(len(option) != rank for option in (stride, dilation)):
        raise Unreadable("a stride or dilation is not positive")
    channels_in = weight.shape[0] if transposed else weight.shape[1] * groups
    reader.suppose(x, (None, channels_in, *([None] * rank)))
    if reader.rank(x) != rank + 2:
        raise Unreadable(f"its input has not {rank + 2} axes")
    _require_channels(reader, x, 1, channels_in)

    function: Callable[[Tensor, Tensor], Tensor] | None = None
    padding: tuple[tuple[int, int], ...] | None = None
    if transposed and ("output_shape" in node.attributes or text(node, "auto_pad", "NOTSET").startswith("SAME")):
        function = _fitting_transposed(node, stride, dilation, extra, groups)
    else:
        padding = fixed_padding(reader, node, x, kernel, stride, dilation)
        if padding is None:
            mode = text(node, "auto_pad", "NOTSET")

            def function(x: Tensor, w: Tensor) -> Tensor:
                flat = flattened(same_padding(mode, x.shape[2:], kernel, stride, dilation))
                return CONVOLUTIONS[rank - 1](F.pad(x, flat), w, None, stride, 0, dilation, groups)

    layer = Layer(
        weight,
        bias,
        rank,
        tuple(stride),
        padding,
        tuple(dilation),
        groups,
        transposed,
        tuple(extra),
        _is_shared(node),
        weight.dtype,
        function,
    )
    return Reading(layer, [x], node.outputs[0], (node,))


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _fitting_transposed(
    node: ir.Node, stride: list[int], dilation: list[int], extra: list[int], groups: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A transposed convolution that is cut to the sizes asked for, as ONNX's definition has it."""
    asked = integers(node, "output_shape", [])
    upper = text(node, "auto_pad", "NOTSET") == "SAME_UPPER"
    rank = len(stride)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = TRANSPOSED[rank - 1](x, weight, None, stride, 0, extra, groups, dilation)
        sizes = asked[-rank:] or [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
        for axis, size in enumerate(sizes, start=2):
            total = max(y.shape[axis] - size, 0)
            before = total // 2 if upper else total - total // 2
            y = y.narrow(axis, before, y.shape[axis] - total)
        return y

    return function


def fixed_padding(
    reader: Reader, node: ir.Node, x: ir.Value, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[tuple[int, int], ...] | None:
    """Zeros before and after each spatial axis, or None where they depend on a size that is not fixed."""
    rank = len(kernel)
    mode = text(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = integers(node, "pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        if len(pads) != 2 * rank or min(pads) < 0:
            raise Unreadable("its padding is negative or incomplete")
        return tuple((pads[axis], pads[axis + rank]) for axis in range(rank))
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise Unreadable(f"its padding is {mode}")
    sizes = [1 if step == 1 else reader.fixed(x, axis + 2) for axis, step in enumerate(stride)]
    return None if None in sizes else same_padding(mode, [size or 0 for size in sizes], kernel, stride, dilation)


def same_padding(
    mode: str, sizes: list[int] | torch.Size, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[tuple[int, int], ...]:
    """The zeros of auto_pad SAME: as many as make ceil(size / stride) windows, whatever the size for a stride of 1."""
    found = []
    for size, k, step, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((math.ceil(size / step) - 1) * step + d * (k - 1) + 1 - size, 0)
        half = total // 2
        found.append((half, total - half) if mode == "SAME_UPPER" else (total - half, half))
    return tuple(found)


def flattened(padding: tuple[tuple[int, int], ...]) -> list[int]:
    """As `F.pad` takes it."""
    return [side for pair in reversed(padding) for side in pair]


# -- what all layers ask ---------------------------------------------------------------------------------------------


def _weight(reader: Reader, node: ir.Node) -> Tensor:
    value = required(node, 1)
    if not reader.flows(required(node, 0)):
        raise Unreadable("its input is a constant")
    if reader.flows(value):
        made = "an input of the network" if value.is_graph_input() else "computed while the network runs"
        raise Unreadable(f"its weight is {made}")
    weight = reader.parameter(value)
    if weight.dtype not in DTYPES.values():
        raise Unreadable(f"its weight is of type {weight.dtype}")
    return weight


def _require_channels(reader: Reader, x: ir.Value, axis: int, channels: int) -> None:
    if (reader.shape(x) or ())[axis] != channels:
        raise Unreadable(f"it has {channels} input channels and its input has not")


def _is_shared(node: ir.Node) -> bool:
    """Whether something else reads the weight, or what it is made of."""
    value = node.inputs[1]
    while value is not None:
        if len(value.uses()) > 1 or value.is_graph_output():
            return True
        producer = value.producer()
        value = given(producer, 0) if producer is not None else None
    return False

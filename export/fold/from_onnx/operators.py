"""What each ONNX operator means for folding, from opset 7 on.

Owns the table and the operators that work on each element by itself; `layers`, `windows` and `movers` have the others.
A rule gets the reader and a node, and returns the operation (of the inputs that are not constant, for the first output)
or a whole `Reading`; it raises Unreadable where the node is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from export.fold.from_onnx import layers, movers, windows
from export.fold.from_onnx.layers import affine, along_one_axis, fitted
from export.fold.from_onnx.nodes import Reading, Unreadable, given, integer, is_standard, real, required, text
from export.fold.graph import Op
from export.fold.operations import Clamp, Elementwise, Identity, Sizes, Sum, bounded, relu

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.fold.from_onnx.read import Reader

Tensor = torch.Tensor
Rule = Callable[["Reader", "ir.Node"], Op | Reading | list[Reading]]


def _only_input(reader: Reader, node: ir.Node) -> ir.Value:
    """The first input, if it is the only one that flows and only the first output is made."""
    if any(output.name for output in node.outputs[1:]):
        used = [output for output in node.outputs[1:] if output.name and (output.uses() or reader.is_output(output))]
        if used:
            raise Unreadable(f"something reads its output {used[0].name}")
    if any(reader.flows(value) for value in node.inputs[1:]):
        raise Unreadable("an operand is computed while the network runs")
    return required(node, 0)


def _function(label: str, function: Callable[[Tensor], Tensor], homogeneous: bool = False) -> Rule:
    """A function of each element that has no parameters."""

    def rule(reader: Reader, node: ir.Node) -> Op:
        _only_input(reader, node)
        return Elementwise(label, function, homogeneous)

    return rule


def _identity(reader: Reader, node: ir.Node) -> Op:
    _only_input(reader, node)
    return Identity()


def _dropout(reader: Reader, node: ir.Node) -> Op:
    _only_input(reader, node)
    training = reader.array(given(node, 2))
    if reader.opset < 7 and not integer(node, "is_test", 0):
        raise Unreadable("it drops at random")
    if given(node, 2) is not None and (training is None or bool(training)):
        raise Unreadable("it drops at random")
    return Identity()


def _cast(reader: Reader, node: ir.Node) -> Reading:
    x = required(node, 0)
    before, after = reader.dtype(x), reader.known.dtype(node.outputs[0])
    if before is None or before != after or not reader.flows(x):
        raise Unreadable("it changes the type")
    return Reading(Identity(), [x], node.outputs[0], (node,))


def _relu(reader: Reader, node: ir.Node) -> Op:
    _only_input(reader, node)
    return relu()


def _clip(reader: Reader, node: ir.Node) -> Op:
    _only_input(reader, node)
    bounds = [-math.inf, math.inf]
    if reader.opset < 11:
        bounds = [real(node, "min", -math.inf), real(node, "max", math.inf)]
    else:
        for place in (1, 2):
            value = given(node, place)
            if value is not None:
                bounds[place - 1] = float(reader.tensor(value).double().reshape(()))
    low, high = bounds
    if math.isnan(low) or math.isnan(high):
        raise Unreadable("a bound is not a number")
    return bounded(low, high, "clip")


def _extremum(reader: Reader, node: ir.Node) -> Op:
    """Max or Min with a constant: a bound."""
    x, bound = _with_constant(reader, node)
    tensor = fitted(reader, x, bound)
    if bool(torch.isnan(tensor).any()):
        raise Unreadable("a bound is not a number")
    none = torch.tensor(math.inf, dtype=torch.float64)
    return Clamp(tensor, none, "max") if node.op_type == "Max" else Clamp(-none, tensor, "min")


def _leaky_relu(reader: Reader, node: ir.Node) -> Op:
    slope = real(node, "alpha", 0.01)
    return Elementwise("leaky relu", lambda x: F.leaky_relu(x, slope), homogeneous=True)


def _prelu(reader: Reader, node: ir.Node) -> Op:
    slope = fitted(reader, _only_input(reader, node), required(node, 1))
    return Elementwise("prelu", lambda x: torch.where(x >= 0, x, slope.to(x.dtype) * x), homogeneous=True)


def _elu(reader: Reader, node: ir.Node) -> Op:
    alpha = real(node, "alpha", 1.0)
    return Elementwise("elu", lambda x: F.elu(x, alpha))


def _hard_sigmoid(reader: Reader, node: ir.Node) -> Op | Reading:
    alpha, beta = real(node, "alpha", 0.2), real(node, "beta", 0.5)
    return _gated(reader, node, "hard sigmoid", lambda x: torch.clamp(alpha * x + beta, 0, 1))


def _sigmoid(reader: Reader, node: ir.Node) -> Op | Reading:
    return _gated(reader, node, "sigmoid", torch.sigmoid)


def _gated(reader: Reader, node: ir.Node, label: str, function: Callable[[Tensor], Tensor]) -> Op | Reading:
    """A gate f, or x f(x) where that product alone reads it: SiLU and hard swish, as they are mostly written."""
    x = _only_input(reader, node)
    user = reader.only_user(node.outputs[0])
    if user is not None and is_standard(user[0], "Mul") and user[0].inputs[1 - user[1]] is x:
        reader.absorbed.add(user[0])
        swish = Elementwise(f"x {label}(x)", lambda x: x * function(x))
        return Reading(swish, [x], user[0].outputs[0], (node, user[0]))
    return Elementwise(label, function)


def _gelu(reader: Reader, node: ir.Node) -> Op:
    approximate = text(node, "approximate", "none")
    return Elementwise("gelu", lambda x: F.gelu(x, approximate=approximate))


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _with_constant(reader: Reader, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The operand that flows, and the constant one."""
    if len(node.inputs) != 2:
        raise Unreadable("it has not two operands")
    one, other = required(node, 0), required(node, 1)
    if reader.flows(one) == reader.flows(other):
        raise Unreadable("both operands are computed while the network runs")
    return (one, other) if reader.flows(one) else (other, one)


def _sum(reader: Reader, node: ir.Node) -> Op:
    """A sum or difference of two values, or the shift by a constant."""
    if len(node.inputs) != 2 or not all(map(reader.flows, node.inputs)):
        return _arithmetic(reader, node)
    one, other = required(node, 0), required(node, 1)
    a, b = reader.shape(one), reader.shape(other)
    # Where not even symbols tell that they are alike, equal sizes in the example do: broadcasting would need a 1.
    alike = a is not None and a == b and (reader.sizes(one) == reader.sizes(other) or (len(a) > 1 and 1 not in a[1:]))
    if not alike:
        raise Unreadable("its operands have different sizes")
    return Sum((1, -1 if node.op_type == "Sub" else 1))


def _arithmetic(reader: Reader, node: ir.Node) -> Op:
    """x + c, x - c, c - x, c x or x / c: an affine map, where c varies along one axis at most."""
    x, constant = _with_constant(reader, node)
    dtype = reader.dtype(x)
    if dtype is not None and not dtype.is_floating_point():
        raise Unreadable("it works on integers")
    c = along_one_axis(fitted(reader, x, constant))
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    first = node.inputs[0] is x
    if node.op_type in ("Mul", "Div"):
        if node.op_type == "Div" and not first:
            raise Unreadable("it divides a constant")
        scale, shift = (1 / c if node.op_type == "Div" else c), zero
    elif node.op_type == "Sub":
        scale, shift = (one, -c) if first else (-one, c)
    else:
        scale, shift = one, c
    return affine(scale, shift, reader.tensor(constant).dtype)


def _negation(reader: Reader, node: ir.Node) -> Op:
    x = _only_input(reader, node)
    dtype = reader.dtype(x)
    if dtype is None or not dtype.is_floating_point():
        raise Unreadable("it works on integers")
    sizes = [1] * reader.rank(x)
    one = torch.ones(sizes, dtype=torch.float64)
    return affine(-one, 0 * one, layers.torch_dtype(dtype))


def _sizes(reader: Reader, node: ir.Node) -> Op:
    return Sizes()


FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Tanh": ("tanh", torch.tanh),
    "Softplus": ("softplus", F.softplus),
    "Softsign": ("softsign", F.softsign),
    "HardSwish": ("hard swish", F.hardswish),
    "Mish": ("mish", F.mish),
    "Exp": ("exponential", torch.exp),
    "Log": ("logarithm", torch.log),
    "Sqrt": ("square root", torch.sqrt),
    "Reciprocal": ("reciprocal", torch.reciprocal),
    "Erf": ("erf", torch.erf),
    "Sin": ("sine", torch.sin),
    "Cos": ("cosine", torch.cos),
}

RULES: dict[str, Rule] = {
    **{op_type: _function(*function) for op_type, function in FUNCTIONS.items()},
    "Abs": _function("absolute value", torch.abs, homogeneous=True),
    "Neg": _negation,
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    "Relu": _relu,
    "Clip": _clip,
    "Max": _extremum,
    "Min": _extremum,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Sigmoid": _sigmoid,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Add": _sum,
    "Sum": _sum,
    "Sub": _sum,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "Shape": _sizes,
    "Size": _sizes,
    "BatchNormalization": layers.batch_normalization,
    "Conv": layers.convolution,
    "ConvTranspose": layers.convolution,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "MaxPool": windows.max_pool,
    "AveragePool": windows.average_pool,
    "GlobalAveragePool": windows.global_pool,
    "GlobalMaxPool": windows.global_pool,
    "ReduceMean": windows.reduction,
    "ReduceMax": windows.reduction,
    "Resize": windows.resize,
    "Upsample": windows.resize,
    "Pad": windows.pad,
    "Reshape": movers.reshape,
    "Flatten": movers.flatten,
    "Squeeze": movers.squeeze,
    "Unsqueeze": movers.unsqueeze,
    "Transpose": movers.transpose,
    "Split": movers.split,
    "Slice": movers.cut,
    "Gather": movers.gather,
    "Concat": movers.concat,
}

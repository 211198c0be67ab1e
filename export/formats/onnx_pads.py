"""Padding of convolutions in an ONNX file: a part of the convolution, or a node before it, whichever is faster.

Owns moving zeros between the two. Knows nothing of folding.

onnxruntime's CPU kernels compute several outputs of a row at once, but those whose window reaches over an end of the
row one by one. Where these are many, copying the input into a wider one costs less. Measured for onnxruntime 1.31 (Xeon
with AVX-512, two threads, batch 8, with what the copy costs), time inside over time apart: 1.13 to 1.87 in eleven
layers with at least a third of such outputs and kernels 7 wide or wider; 0.15 to 1.00 in 33 others, with narrower
kernels, fewer such outputs, or one channel to a group. onnxruntime puts a Pad into the convolution by itself, unless
the node names its axes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

NARROWEST, EDGE_SHARE = 7, 1 / 3
"""The kernel's width and the share of outputs that reach over an end from which on padding is put apart."""
FIRST_AXIS = 2


def inside(model: ir.Model) -> None:
    """Put each Pad of zeros that one convolution alone reads into that convolution."""
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

    rewrite(model, pattern_rewrite_rules=[fuse_pad_into_conv_rule])


def apart(model: ir.Model) -> tuple[str, ...]:
    """Put the padding of convolutions along rows before them where that is faster; the names of these nodes."""
    names = []
    for node in list(model.graph):
        pads = _worth_a_copy(node)
        if pads is not None:
            _put_before(model, node, pads)
            names.append(str(node.name))
    return tuple(names)


def _worth_a_copy(node: ir.Node) -> list[int] | None:
    """The pads of a convolution over images that is faster without; None for any other node."""
    if (node.domain, node.op_type) != ("", "Conv") or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    pads = list(node.attributes.get_ints("pads", []))
    value, weight = node.inputs[0], node.inputs[1]
    if value is None or weight is None or value.shape is None or weight.shape is None or len(value.shape) != 4:
        return None
    width, kernel, channels = value.shape[3], weight.shape[3], weight.shape[1]
    if not pads or not isinstance(width, int) or not isinstance(kernel, int) or channels == 1 != value.shape[1]:
        return None
    stride = node.attributes.get_ints("strides", [1, 1])[1]
    reach = (kernel - 1) * node.attributes.get_ints("dilations", [1, 1])[1] + 1
    starts = range(-pads[1], width + pads[3] - reach + 1, stride)
    over_an_end = sum(start < 0 or start + reach > width for start in starts)
    return pads if kernel >= NARROWEST and over_an_end >= EDGE_SHARE * len(starts) else None


def _put_before(model: ir.Model, node: ir.Node, pads: list[int]) -> None:
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    axes = [axis for axis in (0, 1) if pads[axis] or pads[axis + 2]]
    before, after = [pads[axis] for axis in axes], [pads[axis + 2] for axis in axes]
    constants = [
        _constant(f"{node.name}_pads", [*before, *after]),
        _constant(f"{node.name}_axes", [axis + FIRST_AXIS for axis in axes]),
    ]
    for constant in constants:
        model.graph.register_initializer(constant)
    pad = ir.node("Pad", [value, constants[0], None, constants[1]], name=f"{node.name}_pad")
    sizes = list(value.shape)
    for axis, more in zip(axes, map(sum, zip(before, after, strict=True)), strict=True):
        size = sizes[axis + FIRST_AXIS]
        sizes[axis + FIRST_AXIS] = size + more if isinstance(size, int) else ir.SymbolicDim(None)
    padded = pad.outputs[0]
    padded.name, padded.type, padded.shape = f"{node.name}_padded", value.type, ir.Shape(sizes)
    model.graph.insert_before(node, pad)
    node.replace_input_with(0, padded)
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * 4)


def _constant(name: str, numbers: list[int]) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(np.asarray(numbers, np.int64), name=name))

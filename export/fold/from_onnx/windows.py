"""Operators that work along some axes and treat all others alike: pools, padding, resizing, averages and maxima.

Owns their numbers and what a border does to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from export.fold.from_onnx.layers import fixed_padding, flattened, same_padding
from export.fold.from_onnx.nodes import Reading, Unreadable, given, integer, integers, real, required, text
from export.fold.graph import Op
from export.fold.maps import Refused, Size
from export.fold.operations import Identity, Spatial

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.fold.from_onnx.read import Reader

Tensor = torch.Tensor


def _flowing(reader: Reader, node: ir.Node) -> ir.Value:
    """The first input, of which its sizes are known; only the first output may be read."""
    if any(output.name and (output.uses() or reader.is_output(output)) for output in node.outputs[1:]):
        raise Unreadable("its indices are read")
    x = required(node, 0)
    if not reader.flows(x):
        raise Unreadable("its input is a constant")
    reader.rank(x)
    return x


# -- pools -----------------------------------------------------------------------------------------------------------


def max_pool(reader: Reader, node: ir.Node) -> Op:
    """A maximum over windows; the border counts for nothing."""
    kernel, stride, dilation, padding = _window(reader, node)
    rank = len(kernel)
    result = _result(reader, node)

    def largest(x: Tensor) -> Tensor:
        flat = _to_fit(padding(x), x, result, kernel, stride, dilation)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        return pool(F.pad(x, flat, value=-math.inf), kernel, stride, 0, dilation)

    return Spatial("MaxPool", largest, tuple(range(2, rank + 2)), linear=False, keeps_constants=True)


def average_pool(reader: Reader, node: ir.Node) -> Op:
    """An average over windows; zeros at the border are counted or not."""
    kernel, stride, dilation, padding = _window(reader, node)
    rank = len(kernel)
    result = _result(reader, node)
    counts = bool(integer(node, "count_include_pad", 0))
    if any(step != 1 for step in dilation):
        raise Unreadable("it is dilated")
    if integer(node, "ceil_mode", 0) and counts:
        raise Unreadable("runtimes have not agreed on what its last window is divided by")
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]

    def average(x: Tensor) -> Tensor:
        flat = _to_fit(padding(x), x, result, kernel, stride, dilation)
        total = pool(F.pad(x, flat), kernel, stride)
        return total if counts else total / pool(F.pad(torch.ones_like(x), flat), kernel, stride)

    bordered = counts and (text(node, "auto_pad", "NOTSET").startswith("SAME") or any(integers(node, "pads", [])))
    return Spatial("AveragePool", average, tuple(range(2, rank + 2)), linear=True, keeps_constants=not bordered)


class _Padding:
    """The padding of a pool: fixed, or what SAME makes of the input's sizes."""

    def __init__(self, mode: str, fixed: tuple[tuple[int, int], ...] | None, window: tuple[list[int], ...]) -> None:
        self.mode, self.fixed, self.window = mode, fixed, window

    def __call__(self, x: Tensor) -> list[int]:
        kernel, stride, dilation = self.window
        padding = self.fixed
        return flattened(padding or same_padding(self.mode, x.shape[2:], kernel, stride, dilation))


def _window(reader: Reader, node: ir.Node) -> tuple[list[int], list[int], list[int], _Padding]:
    x = _flowing(reader, node)
    kernel = integers(node, "kernel_shape", [])
    rank = len(kernel)
    stride, dilation = integers(node, "strides", [1] * rank), integers(node, "dilations", [1] * rank)
    if rank not in (1, 2, 3) or reader.rank(x) != rank + 2 or min(*kernel, *stride, *dilation) < 1:
        raise Unreadable("its windows are of no usual form")
    fixed = fixed_padding(reader, node, x, kernel, stride, dilation)
    if integer(node, "ceil_mode", 0) and any(integers(node, "pads", [])):
        # Some count a last window that lies in the padding alone, as ONNX's shape inference did, and some don't, as
        # torch and onnxruntime.
        reader.doubt(node)
    return kernel, stride, dilation, _Padding(text(node, "auto_pad", "NOTSET"), fixed, (kernel, stride, dilation))


def _result(reader: Reader, node: ir.Node) -> tuple[int, ...] | None:
    """The sizes that a pool which rounds up has in the example."""
    if not integer(node, "ceil_mode", 0):
        return None
    result = reader.known.example.get(node.outputs[0].name or "")
    if result is None:
        raise Unreadable("how many windows it has is not known")
    return result


def _to_fit(
    flat: list[int],
    x: Tensor,
    result: tuple[int, ...] | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The padding, with what `ceil_mode` adds behind so that `result`'s sizes come out; `flat` as F.pad takes it."""
    if result is None:
        return flat
    fitted = list(flat)
    rank = len(kernel)
    for axis in range(rank):
        at = 2 * (rank - 1 - axis)
        needed = (result[axis + 2] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        missing = needed - (x.shape[axis + 2] + fitted[at] + fitted[at + 1])
        fitted[at + 1] += max(missing, 0)
    return fitted


def global_pool(reader: Reader, node: ir.Node) -> Reading:
    """One value for each channel."""
    x = _flowing(reader, node)
    axes = tuple(range(2, reader.rank(x)))
    one: Size = (1, ())
    op: Op
    if not axes:
        op = Identity()
    elif node.op_type == "GlobalAveragePool":
        op = Spatial(node.op_type, lambda x: x.mean(axes, keepdim=True), axes, linear=True, keeps_constants=True)
    else:
        op = Spatial(node.op_type, lambda x: x.amax(axes, keepdim=True), axes, linear=False, keeps_constants=True)
    return Reading(op, [x], node.outputs[0], (node,), (*reader.sizes(x)[:2], *([one] * len(axes))))


def reduction(reader: Reader, node: ir.Node) -> Reading:
    """The average or the maximum along some axes, which stay with size 1 or go."""
    x = _flowing(reader, node)
    rank = reader.rank(x)
    axes = tuple(sorted({axis % rank for axis in axes_of(reader, node, 18)}))
    if not axes:
        raise Unreadable("it works along all axes")
    keep, mean = bool(integer(node, "keepdims", 1)), node.op_type == "ReduceMean"
    op = Spatial(
        node.op_type,
        lambda x: x.mean(axes, keepdim=keep) if mean else x.amax(axes, keepdim=keep),
        axes,
        linear=mean,
        keeps_constants=True,
        dropped=not keep,
    )
    one: Size = (1, ())
    sizes = tuple(
        one if axis in axes else size for axis, size in enumerate(reader.sizes(x)) if keep or axis not in axes
    )
    return Reading(op, [x], node.outputs[0], (node,), tuple(sizes))


def axes_of(reader: Reader, node: ir.Node, as_input_since: int) -> list[int]:
    """The axes that a node names, in an attribute or, from that opset on, in its second input."""
    if reader.opset < as_input_since:
        return integers(node, "axes", [])
    value = given(node, 1)
    return [] if value is None else [int(axis) for axis in reader.tensor(value).reshape(-1)]


# -- borders and sizes -----------------------------------------------------------------------------------------------


def resize(reader: Reader, node: ir.Node) -> Reading:
    """Interpolation with weights that sum to 1. Where it samples is not read, so torch's stands in for it.

    Sizes that are written for all axes name the number of channels too: with another one, the file would not run.
    """
    x = _flowing(reader, node)
    before, after = reader.shape(x), reader.known.example.get(node.outputs[0].name or "")
    if before is None or after is None or before[:2] != after[:2] or len(before) not in (3, 4, 5):
        raise Unreadable("it is no interpolation over the axes behind the channels")
    if text(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Unreadable("beyond the border stands another constant")
    if any(reader.flows(value) for value in node.inputs[1:3]):
        raise Unreadable("its scales are computed while the network runs")
    named = given(node, 3) is not None and "axes" not in node.attributes
    target = reader.array(given(node, 3))
    channels, sizes = before[1], after[2:]

    def interpolated(x: Tensor) -> Tensor:
        if named and x.shape[1] != channels:
            raise Refused(f"its sizes are written for {channels} channels")
        return F.interpolate(x, sizes)

    axes = tuple(range(2, len(before)))
    op = Spatial(node.op_type, interpolated, axes, linear=True, keeps_constants=True, stands_in=True)
    fixed: list[Size | None] = [None] * len(axes)
    if target is not None and len(target) == len(before) and "keep_aspect_ratio_policy" not in node.attributes:
        fixed = [(int(size), ()) for size in target[2:]]
    return Reading(op, [x], node.outputs[0], (node,), (*reader.sizes(x)[:2], *fixed))


MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(reader: Reader, node: ir.Node) -> Op:
    """A border of zeros, or of the elements beside it."""
    x = _flowing(reader, node)
    rank = reader.rank(x)
    if reader.opset < 11:
        pads, value = integers(node, "pads", []), real(node, "value", 0.0)
    else:
        pads = [int(side) for side in reader.tensor(required(node, 1)).reshape(-1)]
        filling = given(node, 2)
        value = 0.0 if filling is None else float(reader.tensor(filling).double())
        if given(node, 3) is not None:
            pads = _spread(pads, [int(axis) % rank for axis in reader.tensor(required(node, 3)).reshape(-1)], rank)
    mode = MODES.get(text(node, "mode", "constant"))
    if mode is None or len(pads) != 2 * rank or min(pads, default=0) < 0:
        raise Unreadable("its padding is negative or of no usual form")
    if mode == "constant" and value:
        raise Unreadable(f"its border is {value:g} and not zero")
    axes = tuple(axis for axis in range(rank) if pads[axis] or pads[axis + rank])
    if not axes:
        return Identity()
    first = 0 if mode == "constant" else 2
    if axes[0] < first:
        raise Unreadable("it repeats channels")
    flat = [side for axis in reversed(range(first, rank)) for side in (pads[axis], pads[axis + rank])]
    return Spatial(
        f"{mode} padding", lambda x: F.pad(x, flat, mode), axes, linear=True, keeps_constants=mode != "constant"
    )


def _spread(pads: list[int], axes: list[int], rank: int) -> list[int]:
    """Padding for some axes → for all."""
    whole = [0] * 2 * rank
    for place, axis in enumerate(axes):
        whole[axis], whole[axis + rank] = pads[place], pads[place + len(axes)]
    return whole

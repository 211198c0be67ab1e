"""Operators that move elements: reshapes, transpositions, parts and concatenations, as they are written in the file.

Owns what becomes of the sizes. What is computed is what is written: sizes that name a number of channels fail on
another one, so that no fold can count on what would not run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch

from export.fold.from_onnx.nodes import Reading, Unreadable, given, integer, integers, required
from export.fold.from_onnx.windows import axes_of
from export.fold.graph import Op
from export.fold.maps import Refused, Size, times
from export.fold.operations import Concat, Identity, Reshape, Slice, Spatial, Transpose

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.fold.from_onnx.read import Reader

Tensor = torch.Tensor

ALL = 2**31 - 1
"""An end of a slice from here on means that of the axis."""


@dataclass(frozen=True, eq=False)
class Part(Slice):
    """A slice that is computed by the arguments that are written: `function` may refuse another number of channels."""

    function: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])


def _flowing(reader: Reader, node: ir.Node) -> ir.Value:
    x = required(node, 0)
    if not reader.flows(x):
        raise Unreadable("it moves a constant")
    reader.rank(x)
    return x


# -- reshapes --------------------------------------------------------------------------------------------------------


def _total(sizes: Sequence[Size]) -> Size:
    nothing: Size = (1, ())
    return reduce(times, sizes, nothing)


def _quotient(total: Size, part: Size) -> Size | None:
    """total / part, where that is a size for every input."""
    left = Counter(total[1])
    left.subtract(Counter(part[1]))
    if part[0] == 0 or total[0] % part[0] or min(left.values(), default=0) < 0:
        return None
    return total[0] // part[0], tuple(sorted(left.elements()))


def reshape(reader: Reader, node: ir.Node) -> Reading:
    """To sizes that are written, or computed while the network runs."""
    x = _flowing(reader, node)
    before = reader.sizes(x)
    target = reader.array(required(node, 1))
    if target is None:
        return _computed_reshape(reader, node, x)
    numbers = [int(size) for size in target.reshape(-1)]
    literal = bool(integer(node, "allowzero", 0))

    def function(x: Tensor) -> Tensor:
        return x.reshape([x.shape[axis] if n == 0 and not literal else n for axis, n in enumerate(numbers)])

    sizes: list[Size | None] = []
    for axis, number in enumerate(numbers):
        sizes.append(before[axis] if number == 0 and not literal else None if number == -1 else (number, ()))
    if None in sizes:
        rest = _total([size for size in sizes if size is not None])
        sizes[sizes.index(None)] = _quotient(_total(before), rest)
    return Reading(Reshape("reshape", function), [x], node.outputs[0], (node,), tuple(sizes))


def _computed_reshape(reader: Reader, node: ir.Node, x: ir.Value) -> Reading:
    """The number of channels may be among the sizes that are computed, so another one is taken for an error."""
    before, after = reader.shape(x), reader.shape(node.outputs[0])
    if before is None or after is None:
        raise Unreadable("its sizes are computed while the network runs")
    keeps_first = before[:1] == after[:1]
    tail = after[1:] if keeps_first else after

    def function(x: Tensor) -> Tensor:
        if x.shape[1:] != before[1:]:
            raise Refused("its sizes are computed while the network runs")
        return x.reshape(x.shape[:1] + tail if keeps_first else tail)

    inferred: list[Size | None] = [
        None if size is None else (size, ()) if isinstance(size, int) else (1, (size,))
        for size in reader.known.general.get(node.outputs[0].name or "", ())
    ]
    # A name that none of the input's sizes has was made up by inference for a size that it does not know.
    names = {name for _, symbols in reader.sizes(x) for name in symbols}
    inferred = [None if size is None or not set(size[1]) <= names else size for size in inferred]
    if len(inferred) == len(after) and inferred.count(None) == 1:
        rest = _total([size for size in inferred if size is not None])
        inferred[inferred.index(None)] = _quotient(_total(reader.sizes(x)), rest)
    sizes = tuple(inferred) if len(inferred) == len(after) else (None,) * len(after)
    return Reading(Reshape("reshape", function), [x], node.outputs[0], (node,), sizes)


def flatten(reader: Reader, node: ir.Node) -> Reading:
    """To a matrix."""
    x = _flowing(reader, node)
    sizes, axis = reader.sizes(x), integer(node, "axis", 1)
    axis = axis if axis >= 0 else axis + len(sizes)
    op = Reshape("flattening", lambda x: x.reshape(math.prod(x.shape[:axis]), -1))
    return Reading(op, [x], node.outputs[0], (node,), (_total(sizes[:axis]), _total(sizes[axis:])))


def squeeze(reader: Reader, node: ir.Node) -> Reading:
    """Without some axes of size 1."""
    x = _flowing(reader, node)
    sizes = reader.sizes(x)
    axes = {axis % len(sizes) for axis in axes_of(reader, node, 13)}
    if not axes:
        raise Unreadable("which axes it drops depends on their sizes")
    op = Reshape("squeeze", lambda x: _dropped(x, axes))
    return Reading(op, [x], node.outputs[0], (node,), tuple(s for axis, s in enumerate(sizes) if axis not in axes))


def _dropped(x: Tensor, axes: set[int]) -> Tensor:
    if any(x.shape[axis] != 1 for axis in axes):
        raise Refused("it drops axes of size 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def unsqueeze(reader: Reader, node: ir.Node) -> Reading:
    """With more axes of size 1."""
    x = _flowing(reader, node)
    sizes: list[Size] = list(reader.sizes(x))
    named = axes_of(reader, node, 13)
    rank = len(sizes) + len(named)
    axes = sorted(axis % rank for axis in named)
    for axis in axes:
        sizes.insert(axis, (1, ()))

    def function(x: Tensor) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return Reading(Reshape("unsqueeze", function), [x], node.outputs[0], (node,), tuple(sizes))


def transpose(reader: Reader, node: ir.Node) -> Op:
    """The axes in another order."""
    rank = reader.rank(_flowing(reader, node))
    order = integers(node, "perm", list(reversed(range(rank))))
    if sorted(order) != list(range(rank)):
        raise Unreadable("its order is none of its axes")
    return Transpose(tuple(order))


# -- parts -----------------------------------------------------------------------------------------------------------


def split(reader: Reader, node: ir.Node) -> list[Reading]:
    """Parts along an axis, one for each output."""
    x = _flowing(reader, node)
    axis = integer(node, "axis", 0) % reader.rank(x)
    size = reader.fixed(x, axis)
    if size is None:
        raise Unreadable("it splits an axis of no fixed size")
    parts = integers(node, "split", [])
    written = given(node, 1)
    if written is not None:
        parts = [int(part) for part in reader.tensor(written).reshape(-1)]
    count = len(node.outputs)
    if not parts:
        share = -(-size // count)
        parts = [min(share, size - share * index) for index in range(count)]
    if len(parts) != count or sum(parts) != size or min(parts) < 0:
        raise Unreadable("its parts are not the whole")
    readings = []
    for index, (part, output) in enumerate(zip(parts, node.outputs, strict=True)):
        start = sum(parts[:index])

        def function(x: Tensor, start: int = start, part: int = part) -> Tensor:
            if x.shape[axis] != size:
                raise Refused(f"it splits an axis of size {size}")
            return x.narrow(axis, start, part)

        if output.name:
            op = Part(axis, tuple(range(start, start + part)), function)
            readings.append(Reading(op, [x], output, (node,)))
    return readings


def cut(reader: Reader, node: ir.Node) -> Op:
    """From a start to an end in steps, along some axes."""
    x = _flowing(reader, node)
    rank, shape = reader.rank(x), reader.shape(x) or ()
    if reader.opset < 10:
        starts, ends = integers(node, "starts", []), integers(node, "ends", [])
        axes, steps = integers(node, "axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = ([int(n) for n in reader.tensor(required(node, i)).reshape(-1)] for i in (1, 2))
        axes, steps = (
            default if value is None else [int(n) for n in reader.tensor(value).reshape(-1)]
            for value, default in ((given(node, 3), list(range(len(starts)))), (given(node, 4), [1] * len(starts)))
        )
    slices: dict[int, slice] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if start or step != 1 or (end < ALL and reader.fixed(x, axis % rank) is None) or end < shape[axis % rank]:
            slices[axis % rank] = slice(start, end, step)
    if not slices:
        return Identity()

    def function(x: Tensor) -> Tensor:
        for axis, part in slices.items():
            x = x.index_select(axis, torch.tensor(range(*part.indices(x.shape[axis]))))
        return x

    (axis, part), *others = slices.items()
    size = reader.fixed(x, axis)
    if not others and size is not None:
        return Part(axis, tuple(range(*part.indices(size))), function)
    return Spatial("slice", function, tuple(slices), linear=True, keeps_constants=True)


def gather(reader: Reader, node: ir.Node) -> Op:
    """Elements at constant places along an axis; one place alone drops the axis."""
    x = _flowing(reader, node)
    axis = integer(node, "axis", 0) % reader.rank(x)
    indices = reader.tensor(required(node, 1)).long()
    size = reader.fixed(x, axis)
    if indices.dim() == 0:
        place = int(indices)
        return Spatial(
            "slice", lambda x: x.select(axis, place), (axis,), linear=True, keeps_constants=True, dropped=True
        )
    if indices.dim() != 1 or size is None:
        raise Unreadable("it looks places up along an axis of no fixed size")
    places = tuple(int(index) % size for index in indices)
    written = indices.clone()

    def function(x: Tensor) -> Tensor:
        return x.index_select(axis, torch.where(written < 0, written + x.shape[axis], written))

    return Part(axis, places, function)


def concat(reader: Reader, node: ir.Node) -> Op:
    """The inputs one after another."""
    values = [value for value in node.inputs if value is not None]
    if not all(map(reader.flows, values)):
        raise Unreadable("a part is a constant")
    rank = reader.rank(values[0])
    return Concat(integer(node, "axis", 0) % rank)

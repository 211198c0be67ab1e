"""Homes that cost nothing to find: in what makes the input of a BatchNorm, in what reads its output, or beside it.

Owns cases 1 to 6 of `search`. Knows the operations' `push` and `pull` and the formulas of `algebra`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from export.fold import algebra
from export.fold.graph import Node, Value
from export.fold.maps import Inapplicable, Map, Refused
from export.fold.operations import Affine, Identity, Layer, Select, Sum
from export.fold.plan import Plan

Tensor = torch.Tensor

MOST_WAYS = 32
"""A sum takes a shift into either side: so many choices are tried at most."""


@dataclass(frozen=True, eq=False)
class Sink:
    """A layer or affine operation that reads the output, and the map as it arrives there.

    `scale` and `shift` are one value per channel of a layer's input.
    """

    node: Node
    value: Value
    map: Map
    scale: Tensor
    shift: Tensor

    @property
    def needs_border(self) -> bool:
        """Whether the shift is missing where the layer reads zeros."""
        op = self.node.op
        return self.map.shifts and (self.map.bordered or (isinstance(op, Layer) and op.reads_padding))


def affine_op(node: Node) -> Affine:
    """The scale and shift that `node` is."""
    assert isinstance(node.op, Affine)
    return node.op


# -- backward: cases 1 to 3 ------------------------------------------------------------------------------------------


def backward(norm: Node, clamps: bool = False) -> Plan:
    """Into what makes the input; with `clamps`, past activations whose bounds it moves."""
    plan = Plan("floor" if clamps else "into the layer before", {norm: Identity()})
    return pull_back(norm.inputs[0], norm, affine_op(norm).map, plan, clamps)


def floor(norm: Node) -> Plan:
    """As `backward` with `clamps`, but the signs of negative scales go on to what comes after.

    Maxima let only scales pass that are not negative, and a clamp needs one bound per channel then, not two.
    """
    map = affine_op(norm).map
    if not map.negative:
        raise Inapplicable("no scale is negative")
    sign = torch.where(map.scale < 0, -1.0, 1.0).double()
    plan = Plan("floor", {norm: Identity()})
    plan = pull_back(norm.inputs[0], norm, Map(map.scale.abs(), sign * map.shift).shrunk(), plan, clamps=True)
    for sink in sinks(norm.output, Map(sign, torch.zeros_like(sign)), plan, clamps=False):
        absorb(plan, sink)
    return plan


def pull_back(value: Value, reader: Node, map: Map, plan: Plan, clamps: bool) -> Plan:
    """Make `value`, which `reader` alone may read, become `map` of it by changing what makes it."""
    refusal: Refused | None = None
    ways = [(plan, [(value, reader, map)])]
    for _ in range(MOST_WAYS):
        if not ways:
            break
        plan, demands = ways.pop()
        try:
            while demands:
                value, reader, map = demands.pop()
                node = only_for(value, reader)
                op = plan.op(node)
                if isinstance(op, Layer):  # case 1
                    scale, shift = map.vectors(op.axis, op.channels_out, node.name)
                    plan.put(node, algebra.absorb_after(op, scale, shift))
                elif isinstance(op, Affine):  # case 2
                    plan.changes[node] = _merged(node, op, op.map.then(map))
                else:  # case 3
                    step, *others = op.pull(node, map)
                    for other in others:
                        branch = plan.copy()
                        branch.take(node, other, clamps)
                        ways.append((branch, demands + _demands(node, other.maps)))
                    plan.take(node, step, clamps)
                    demands += _demands(node, step.maps)
            return plan
        except Refused as refused:
            refusal = refusal or refused
    raise refusal or Refused("more sums stand before it than are tried")


def _merged(node: Node, op: Affine, map: Map) -> Affine:
    """The operation with another map. A BatchNorm stays one: its map varies along the channels alone."""
    if op.is_norm and any(map.varies(axis) for axis in range(map.rank) if axis != 1):
        raise Refused(f"{node.name} has one scale and shift for each channel, and what would go into it has more")
    return replace(op, map=map)


def _demands(node: Node, maps: list[Map]) -> list[tuple[Value, Node, Map]]:
    return [(value, node, map) for value, map in zip(node.inputs, maps, strict=True)]


def only_for(value: Value, reader: Node) -> Node:
    """The node that makes `value`, if `reader` alone reads it."""
    require_stable(value)
    if value.producer is None or value.pinned:
        raise Refused(f"{value.name} is {value.pinned or 'not made by the network'}")
    others = [node.name for node in value.readers if node is not reader]
    if others:
        raise Refused(f"{value.name} is also read by {', '.join(others[:3])}")
    if len(value.readers) > 1:
        raise Refused(f"{reader.name} reads {value.name} twice")
    return value.producer


def require_stable(value: Value) -> None:
    """Refused where something else writes into the memory of `value`."""
    if value.unstable:
        raise Refused(f"{value.name} {value.unstable}")


# -- forward: cases 4 and 5 ------------------------------------------------------------------------------------------


def forward(norm: Node, clamps: bool = False) -> Plan:
    """Into everything that reads the output; with `clamps`, past activations whose bounds it moves."""
    plan = Plan("pre-activation" if clamps else "into the layers after", {norm: Identity()}, ahead=True)
    for sink in sinks(norm.output, affine_op(norm).map, plan, clamps):
        if sink.needs_border:
            raise Refused(f"{sink.node.name} reads zeros at its border, where the shift would be missing")
        absorb(plan, sink)
    return plan


def sinks(value: Value, map: Map, plan: Plan, clamps: bool) -> list[Sink]:
    """Everything that must absorb `map`, if `value` is to become what it was made of; `plan` notes what it passes."""
    arrived: list[Sink] = []
    pending = [(value, map)]
    while pending:
        value, map = pending.pop()
        require_stable(value)
        if value.pinned:
            raise Refused(f"{value.name} is {value.pinned}")
        for node in dict.fromkeys(value.readers):
            op = plan.op(node)
            for index in [index for index, read in enumerate(node.inputs) if read is value]:
                if isinstance(op, Layer):  # case 4, and 7 and 8
                    scale, shift = map.vectors(op.axis, op.channels_in, node.name)
                    arrived.append(Sink(node, value, map, scale, shift))
                elif isinstance(op, Affine):  # case 5
                    if map.bordered:
                        raise Refused(f"{node.name} follows a border of zeros")
                    arrived.append(Sink(node, value, map, map.scale, map.shift))
                else:
                    step = op.push(node, index, map)
                    plan.take(node, step, clamps)
                    pending.append((node.output, step.maps[0]))
    return arrived


def absorb(plan: Plan, sink: Sink) -> None:
    """Put the map into the sink's operation, the shift left out where it needs a border."""
    op = plan.op(sink.node)
    if isinstance(op, Affine):
        plan.changes[sink.node] = _merged(sink.node, op, sink.map.then(op.map))
        return
    assert isinstance(op, Layer)
    moved = op if sink.needs_border or not sink.map.shifts else algebra.shift_input(op, sink.shift)
    plan.put(sink.node, algebra.scale_input(moved, sink.scale))


# -- beside: case 6 --------------------------------------------------------------------------------------------------


def beside(norm: Node) -> Plan:
    """Into a layer that reads the same input and whose output is added to this one's, or subtracted from it."""
    map, x = affine_op(norm).map, norm.inputs[0]
    require_stable(x)
    total, op, side, skipped = _sum_of(norm.output)
    plan = _selected(total, op, 1 - side)
    plan.changes[norm] = Identity()
    for part in _parts(total, 1 - side):
        layer = plan.op(part.node)
        if not isinstance(layer, Layer) or part.node.inputs[0] is not x:
            continue
        centre = _centre(layer)
        if centre is None:
            continue
        scale, shift = map.vectors(layer.axis, layer.channels_out, part.node.name)
        sign = part.sign * op.signs[side]
        kernel = algebra.diagonal(layer, sign * scale)
        plan.put(part.node, algebra.beside(layer, kernel, sign * shift, centre))
        plan.passed |= part.between | skipped
        return plan
    raise Refused("no layer of the same input stands beside it")


def parallel(total: Node) -> Plan:
    """Two layers of one input whose outputs are added: one layer, with the smaller kernel inside the larger one.

    Or one layer, and the input itself.
    """
    if not isinstance(total.op, Sum) or total.inputs[0] is total.inputs[1]:
        raise Refused("no sum of two")
    for into in (0, 1):
        out, sign = total.inputs[1 - into], total.op.signs[1 - into]
        try:
            plan = _selected(total, total.op, into)
            node, between = _through(total.inputs[into], total)
        except Refused:
            continue
        large = plan.op(node)
        if not isinstance(large, Layer) or large.padding is None or large.transposed:
            continue
        plan.passed |= between
        if out is node.inputs[0]:
            centre = _centre(large)
            if centre is None:
                continue
            require_stable(out)
            one = torch.ones(large.channels_out, dtype=torch.float64)
            plan.put(node, algebra.beside(large, algebra.diagonal(large, sign * one), 0 * one, centre))
            return plan
        other, skipped = _through(out, total)
        small = other.op
        if not isinstance(small, Layer) or small.padding is None or other.inputs[0] is not node.inputs[0]:
            continue
        alike = (large.rank, large.stride, large.groups) == (small.rank, small.stride, small.groups)
        if not alike or small.transposed or (small.bias is not None and small.bias.dim() > 1):
            continue
        before = tuple(pads[0] for pads in small.padding)
        corner = _corner(large, tuple(small.weight.shape[2:]), before, small.dilation)
        if corner is None:
            continue
        weight = sign * small.weight.detach().double().cpu()
        bias = torch.zeros(small.channels_out) if small.bias is None else sign * small.bias.detach().double().cpu()
        plan.put(node, algebra.beside(large, weight, bias, corner))
        plan.passed |= {other, *skipped}
        return plan
    raise Refused("no two layers whose kernels lie in one another")


def _centre(layer: Layer) -> tuple[int, ...] | None:
    """The tap of the layer's kernel that reads an output's own position; None where there isn't one for each."""
    if layer.transposed or layer.padding is None or any(step != 1 for step in layer.stride):
        return None
    spans = zip(layer.padding, layer.dilation, layer.weight.shape[2:], strict=True)
    if any(sum(pads) != dilation * (size - 1) for pads, dilation, size in spans):
        return None
    return _corner(layer, (1,) * layer.rank, (0,) * layer.rank, layer.dilation)


def _corner(
    layer: Layer, kernel: tuple[int, ...], before: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Where in the layer's kernel another one's first tap lies, which reads `before` zeros; None where it doesn't."""
    if layer.padding is None:
        return None
    corner = []
    for axis, size in enumerate(kernel):
        step = layer.dilation[axis]
        offset = layer.padding[axis][0] - before[axis]
        if offset % step or (size > 1 and dilation[axis] != step):
            return None
        if not 0 <= offset // step <= layer.weight.shape[axis + 2] - size:
            return None
        corner.append(offset // step)
    return tuple(corner)


def _sum_of(value: Value) -> tuple[Node, Sum, int, set[Node]]:
    """The sum that alone reads `value`, which of its inputs that is, and nodes between that change nothing."""
    between: set[Node] = set()
    while True:
        require_stable(value)
        readers = value.readers
        op = readers[0].op if len(readers) == 1 else None
        if value.pinned or not isinstance(op, Sum | Identity | Select):
            raise Inapplicable("it is not one side of a sum")
        if isinstance(op, Sum):
            return readers[0], op, readers[0].inputs.index(value), between
        between.add(readers[0])
        value = readers[0].output


def _selected(total: Node, op: Sum, side: int) -> Plan:
    """A plan by which this side alone is left of a sum, times its sign."""
    plan = Plan("beside a layer", {total: Select(side)})
    if op.signs[side] > 0:
        return plan
    ones = torch.ones([1] * total.inputs[side].rank, dtype=torch.float64)
    return pull_back(total.inputs[side], total, Map(-ones, 0 * ones), plan, clamps=False)


@dataclass(frozen=True, eq=False)
class _Part:
    """What makes one part of a sum, with its sign in it, and the nodes between the two."""

    node: Node
    sign: int
    between: set[Node]


def _parts(total: Node, side: int) -> list[_Part]:
    """The parts of one side of a sum, as far as the sum alone reads them; their signs are those in that side."""
    found: list[_Part] = []
    pending: list[tuple[Value, Node, int, set[Node]]] = [(total.inputs[side], total, 1, set())]
    while pending:
        value, reader, sign, between = pending.pop()
        try:
            node, skipped = _through(value, reader)
        except Refused:
            continue
        between = between | skipped
        if isinstance(node.op, Sum):
            signed = zip(node.inputs, node.op.signs, strict=True)
            pending += [(part, node, sign * own, between | {node}) for part, own in signed]
        else:
            found.append(_Part(node, sign, between))
    return found


def _through(value: Value, reader: Node) -> tuple[Node, set[Node]]:
    """What makes `value` for `reader` alone, looking through nodes that change nothing; and those nodes."""
    skipped: set[Node] = set()
    node = only_for(value, reader)
    while isinstance(node.op, Select | Identity):
        skipped.add(node)
        node = only_for(node.inputs[0], node)
    return node, skipped

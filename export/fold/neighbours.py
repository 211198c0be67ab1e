"""Homes that cost nothing to find: in what makes the input of a BatchNorm, in what reads its output, or beside it.

Owns cases 1 to 6 of `search`. Knows the operations' `push` and `pull` and the formulas of `algebra`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from export.fold import algebra
from export.fold.graph import Node, Value
from export.fold.maps import Inapplicable, Map, Refused
from export.fold.operations import Add, Affine, Identity, Layer, Select
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
    return pull_back(norm, affine_op(norm).map, plan, clamps)


def floor(norm: Node) -> Plan:
    """As `backward` with `clamps`, but the signs of negative scales go on to what comes after.

    Maxima let only scales pass that are not negative, and a clamp needs one bound per channel then, not two.
    """
    map = affine_op(norm).map
    if not map.negative:
        raise Inapplicable("no scale is negative")
    sign = torch.where(map.scale < 0, -1.0, 1.0).double()
    plan = Plan("floor", {norm: Identity()})
    plan = pull_back(norm, Map(map.scale.abs(), sign * map.shift).shrunk(), plan, clamps=True)
    for sink in sinks(norm.output, Map(sign, torch.zeros_like(sign)), plan, clamps=False):
        absorb(plan, sink)
    return plan


def pull_back(norm: Node, map: Map, plan: Plan, clamps: bool) -> Plan:
    """Make the input of `norm` become `map` of it by changing what makes it."""
    refusal: Refused | None = None
    ways = [(plan, [(norm.inputs[0], norm, map)])]
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
    """Into a layer that reads the same input and whose output is added to this one's."""
    op, x = affine_op(norm), norm.inputs[0]
    require_stable(x)
    plan = Plan("beside a layer", {norm: Identity()})
    total, other = _sum_of(norm.output)
    for node, between in _addends(other, total):
        layer = plan.op(node)
        if not isinstance(layer, Layer) or layer.transposed or node.inputs[0] is not x:
            continue
        centre = _corner(layer, (1,) * layer.rank, (0,) * layer.rank, layer.dilation)
        same_size = all(
            sum(pads) == d * (k - 1)
            for pads, d, k in zip(layer.padding or (), layer.dilation, layer.weight.shape[2:], strict=True)
        )
        if centre is None or not same_size or any(step != 1 for step in layer.stride):
            continue
        scale, shift = op.map.vectors(layer.axis, layer.channels_out, node.name)
        plan.put(node, algebra.beside(layer, algebra.diagonal(layer, scale), shift, centre))
        plan.changes[total] = Select(total.inputs.index(other))
        plan.passed |= between
        return plan
    raise Refused("no layer of the same input stands beside it")


def parallel(total: Node) -> Plan:
    """Two layers of one input whose outputs are added: one layer, with the smaller kernel inside the larger one."""
    if not isinstance(total.op, Add) or total.inputs[0] is total.inputs[1]:
        raise Refused("no sum of two")
    made = [_through(value, total) for value in total.inputs]
    nodes = [node for node, _ in made]
    ops = [node.op for node in nodes]
    for into, out in ((0, 1), (1, 0)):
        large, small = ops[into], ops[out]
        if not isinstance(large, Layer) or not isinstance(small, Layer) or None in (large.padding, small.padding):
            break
        alike = (large.rank, large.stride, large.groups) == (small.rank, small.stride, small.groups)
        same_input = nodes[into].inputs[0] is nodes[out].inputs[0]
        plain = not large.transposed and not small.transposed and (small.bias is None or small.bias.dim() == 1)
        if not alike or not same_input or not plain:
            break
        before = tuple(pads[0] for pads in small.padding or ())
        corner = _corner(large, tuple(small.weight.shape[2:]), before, small.dilation)
        if corner is None:
            continue
        bias = torch.zeros(small.channels_out) if small.bias is None else small.bias
        plan = Plan("beside a layer")
        plan.put(
            nodes[into],
            algebra.beside(large, small.weight.detach().double().cpu(), bias.detach().double().cpu(), corner),
        )
        plan.changes[total] = Select(into)
        plan.passed |= {nodes[out], *made[0][1], *made[1][1]}
        return plan
    raise Refused("no two layers whose kernels lie in one another")


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


def _sum_of(value: Value) -> tuple[Node, Value]:
    """The sum that alone reads `value`, and its other side."""
    require_stable(value)
    readers = value.readers
    if value.pinned or len(readers) != 1 or not isinstance(readers[0].op, Add):
        raise Inapplicable("it is not one side of a sum")
    total = readers[0]
    return total, total.inputs[1 - total.inputs.index(value)]


def _addends(value: Value, reader: Node) -> list[tuple[Node, set[Node]]]:
    """What makes the parts of a sum, as far as the sum alone reads them, and the nodes between each and the sum."""
    made: list[tuple[Node, set[Node]]] = []
    pending: list[tuple[Value, Node, set[Node]]] = [(value, reader, set())]
    while pending:
        value, reader, between = pending.pop()
        try:
            node, skipped = _through(value, reader)
        except Refused:
            continue
        if isinstance(node.op, Add):
            pending += [(part, node, between | skipped | {node}) for part in node.inputs]
        else:
            made.append((node, between | skipped))
    return made


def _through(value: Value, reader: Node) -> tuple[Node, set[Node]]:
    """What makes `value` for `reader` alone, looking through nodes that change nothing; and those nodes."""
    skipped: set[Node] = set()
    node = only_for(value, reader)
    while isinstance(node.op, Select | Identity):
        skipped.add(node)
        node = only_for(node.inputs[0], node)
    return node, skipped

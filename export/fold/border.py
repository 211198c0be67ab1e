"""Ways over a border of zeros: where a layer reads padding, a shift is no constant for it any more.

Owns cases 7 and 8 of `search`. Knows what `neighbours` finds, the formulas of `algebra`, and how to compute a part of
the network: what becomes of one more channel, or of a shift, is not derived but tried.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from export.fold import algebra
from export.fold.graph import Node, Value, evaluate
from export.fold.maps import Inapplicable, Refused
from export.fold.neighbours import Sink, absorb, affine_op, require_stable, sinks
from export.fold.operations import Affine, Clamp, Elementwise, Identity, Layer, Reshape, Spatial
from export.fold.plan import ALIGNMENT, CACHED, MOST_WEIGHTS, Plan, positions, work

Tensor = torch.Tensor


def _bordered_sinks(norm: Node, plan: Plan, clamps: bool = False) -> list[Sink]:
    """The sinks, of which at least one needs help with the border: else the plain fold is the one to take."""
    arrived = sinks(norm.output, affine_op(norm).map, plan, clamps)
    if not any(sink.needs_border for sink in arrived):
        raise Inapplicable("no border is read")
    return arrived


# -- case 7 ----------------------------------------------------------------------------------------------------------


def ones(norm: Node) -> Plan:
    """A channel of ones beside the others, which the padding borders with zeros."""
    plan = Plan("ones channel", {norm: Identity()}, ahead=True)
    arrived = _bordered_sinks(norm, plan)
    if len({sink.node for sink in arrived}) < len(arrived):
        raise Refused("a layer reads it twice, so one more channel has no one place")
    passed_forward = set(plan.passed)
    constant, producer = _carry_ones(norm, plan)
    made = _layer(plan, producer)
    breaks = (made.channels_out - 1) % ALIGNMENT == 0
    if breaks:
        plan.unaligned += work(producer, made)
    marks = _arrivals(norm, arrived, passed_forward, plan)
    for sink in arrived:
        if isinstance(sink.node.op, Affine):
            raise Refused(f"{sink.node.name}, a scale and shift, reads it too and has no place for one more channel")
        layer = _one_group(sink.node, plan)
        places = marks[sink]
        kernel = algebra.no_kernel(layer, len(places))
        if sink.needs_border:
            if len(places) > 1:
                raise Refused(f"before {sink.node.name} one more channel is flattened into {len(places)} inputs")
            kernel = algebra.border_kernel(layer, sink.shift) / constant
        absorb(plan, sink)
        plan.put(sink.node, algebra.add_inputs(_layer(plan, sink.node), places, kernel))
        plan.work += kernel.numel() * positions(sink.node, layer)
        if breaks:
            plan.unaligned += work(sink.node, layer)
    return plan


def _layer(plan: Plan, node: Node) -> Layer:
    op = plan.op(node)
    assert isinstance(op, Layer)
    return op


def _one_group(node: Node, plan: Plan) -> Layer:
    """The layer of `node`, with one group: it must look at one more channel."""
    layer = _layer(plan, node)
    if layer.groups == 1:
        return layer
    if layer.transposed or layer.channels_in * layer.weight.numel() // layer.weight.shape[1] > MOST_WEIGHTS:
        raise Refused(f"{node.name} has {layer.groups} groups, which leave no place for one more channel")
    dense = algebra.ungrouped(layer)
    plan.work += (dense.weight.numel() - layer.weight.numel()) * positions(node, layer)
    plan.put(node, dense)
    return dense


def _carry_ones(norm: Node, plan: Plan) -> tuple[float, Node]:
    """Give the layer before `norm` a channel of ones and bring it there.

    Returns what has become of 1 on the way, and the layer's node.
    """
    path: list[Node] = []
    value, reader = norm.inputs[0], norm
    while True:
        require_stable(value)
        if value.pinned or value.producer is None:
            raise Refused(f"{value.name} is {value.pinned or 'not made by the network'} and can't get one more channel")
        for user in dict.fromkeys(value.users):
            if user is reader:
                continue
            if not isinstance(user.op, Layer):
                raise Refused(f"{user.name} reads {value.name} too and has no place for one more channel")
            layer = _one_group(user, plan)
            if layer.axis % value.rank != 1:
                raise Refused(f"{user.name} reads {value.name} along another axis than that of the channels")
            plan.put(user, algebra.add_inputs(layer, [layer.channels_in], algebra.no_kernel(layer, 1)))
            plan.work += layer.channels_out * math.prod(layer.weight.shape[2:]) * positions(user, layer)
        node = value.producer
        if isinstance(node.op, Layer):
            break
        if not isinstance(node.op, Identity | Elementwise | Clamp | Reshape) and not (
            isinstance(node.op, Spatial) and node.op.keeps_constants
        ):
            raise Refused(f"{node.op.label} at {node.name} carries no channel of ones from a layer before it")
        path.append(node)
        value, reader = node.inputs[0], node
    layer = _one_group(node, plan)
    if layer.axis % value.rank != 1:
        raise Refused(f"{node.name} makes its channels along another axis")
    if layer.bias is not None and layer.bias.dim() > 1:
        raise Refused(f"{node.name} has a bias map already")
    plan.put(node, algebra.add_ones_output(layer))
    plan.work += layer.channels_in * math.prod(layer.weight.shape[2:]) * positions(node, layer)
    plan.passed |= set(path)
    for step in path:
        if isinstance(step.op, Clamp) and step.op.comparisons():
            plan.changes[step] = _unbounded_last(step.op)
    constant = _widened(value, norm.inputs[0], path, plan)
    if not math.isfinite(constant) or abs(constant) < 1e-3:
        raise Refused(f"the activations turn a channel of ones into {constant:.1e}, which carries nothing")
    return constant, node


def _unbounded_last(clamp: Clamp) -> Clamp:
    """The clamp with one more channel: bounds per channel let it through, one bound for all holds for it too."""

    def longer(bound: Tensor, last: float) -> Tensor:
        if bound.dim() < 2 or bound.shape[1] == 1:
            return bound
        return torch.cat([bound, torch.full_like(bound.narrow(1, 0, 1), last)], 1)

    return replace(clamp, low=longer(clamp.low, -math.inf), high=longer(clamp.high, math.inf))


def _with_one_more(value: Value) -> Tensor:
    """Zeros of the value's sizes, with one more channel that is 1."""
    shape = list(value.known_shape())
    shape[1] += 1
    marked = torch.zeros(shape, dtype=torch.float64)
    marked[:, -1] = 1
    return marked


def _widened(start: Value, end: Value, path: list[Node], plan: Plan) -> float:
    """Take a channel of ones from `start` to `end` through the operations on `path`; returns what it is there."""
    current = _with_one_more(start)
    plan.wider[start] = tuple(current.shape)
    for node in reversed(path):
        current = _tried(node, plan, current)
        plan.wider[node.output] = tuple(current.shape)
    expected = list(end.known_shape())
    expected[1] += 1
    last = current[:, -1]
    if list(current.shape) != expected or not bool((last == last.reshape(-1)[0]).all()):
        raise Refused("one more channel does not stay one channel on the way")
    return float(last.reshape(-1)[0])


def _tried(node: Node, plan: Plan, *inputs: Tensor) -> Tensor:
    try:
        return plan.op(node).evaluate(*inputs)
    except (RuntimeError, ValueError, IndexError, Refused) as error:
        raise Refused(f"{node.name} does not take one more channel ({str(error).splitlines()[0][:80]})") from None


def _arrivals(norm: Node, arrived: list[Sink], passed: set[Node], plan: Plan) -> dict[Sink, list[int]]:
    """At which inputs of each sink one more channel of the BatchNorm's output arrives."""
    marked = _with_one_more(norm.output)
    known = {norm.output: marked}
    pending = [norm.output]
    while pending:
        value = pending.pop()
        plan.wider[value] = tuple(known[value].shape)
        if any(not user.op.reads_elements for user in value.users):
            raise Refused(f"something asks for the sizes of {value.name}, which would change")
        for node in dict.fromkeys(value.users):
            if node in passed and node.output not in known:
                inputs = [known.get(read) for read in node.inputs]
                zeros = [
                    torch.zeros(read.known_shape(), dtype=torch.float64) if tensor is None else tensor
                    for read, tensor in zip(node.inputs, inputs, strict=True)
                ]
                known[node.output] = _tried(node, plan, *zeros)
                pending.append(node.output)
    places: dict[Sink, list[int]] = {}
    for sink in arrived:
        op = sink.node.op
        tensor = known[sink.value]
        if not isinstance(op, Layer):
            continue
        channels = tensor.movedim(op.axis, 0)
        marks = channels.reshape(channels.shape[0], -1).ne(0).any(1)
        places[sink] = [int(index) for index in marks.nonzero().reshape(-1)]
        if channels.shape[0] - len(places[sink]) != op.channels_in or not places[sink]:
            raise Refused(f"one more channel does not arrive as such at {sink.node.name}")
    return places


# -- case 8 ----------------------------------------------------------------------------------------------------------


def bias_map(norm: Node, clamps: bool = False) -> Plan:
    """What the shift alone makes of a layer, border included, is added as a constant."""
    plan = Plan("bias map", {norm: Identity()}, ahead=True)
    arrived = _bordered_sinks(norm, plan, clamps)
    needy = {sink.node for sink in arrived if sink.needs_border}
    for sink in arrived:
        if sink.node in needy:  # the shift comes as a whole, along all ways on which it arrives
            plan.put(sink.node, algebra.scale_input(_layer(plan, sink.node), sink.scale))
        else:
            absorb(plan, sink)
    if not norm.output.fixed or not all(node.output.fixed and node.inputs[0].fixed for node in needy):
        raise Refused("a bias map needs a fixed size, and the size is not")
    for node in sorted(needy, key=lambda node: node.name):
        layer = node.op
        assert isinstance(layer, Layer)
        bare = replace(layer, weight=layer.weight.detach().double().cpu(), bias=None)
        response = bare.evaluate(_arriving_shift(norm, [sink for sink in arrived if sink.node is node], plan))[0]
        if layer.rank == 0 and response.dim() > 1:
            raise Refused(f"behind {node.name}, which works on the last axis, the shift differs by position")
        changed = algebra.add_bias_map(_layer(plan, node), response)
        plan.put(node, changed)
        if changed.bias is not None and changed.bias.dim() > 1:
            plan.mapped += response.numel()
            plan.stored += response.numel() if response.numel() > CACHED else 0
    return plan


def _arriving_shift(norm: Node, arrived: list[Sink], plan: Plan) -> Tensor:
    """The shift as one layer reads it, of the sizes of its input, along all ways on which it arrives there."""
    value = arrived[0].value
    if not any(sink.map.bordered for sink in arrived):
        return sum((sink.map.shift for sink in arrived), torch.zeros(value.known_shape(), dtype=torch.float64))
    if any(isinstance(node.op, Clamp) for node in plan.changes):
        raise Refused("behind an activation the shift is missing at the border")
    if any(isinstance(node.op, Spatial) and node.op.stands_in for node in plan.passed):
        raise Refused("what a resizing on the way makes of the shift is not known to the last digit")
    feeds = {
        value: torch.zeros(value.known_shape(), dtype=torch.float64)
        for node in plan.passed
        for value in node.inputs
        if value.producer not in plan.passed
    }
    shift = affine_op(norm).map.shift
    feeds[norm.output] = shift.expand(norm.output.known_shape()).contiguous()
    return evaluate([value], feeds)[value]

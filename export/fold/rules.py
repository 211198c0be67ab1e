"""The search: a home for every BatchNorm, or the reason why there is none.

Owns the cases, the choice between several exact homes, and the check of each fold by itself. Knows the vocabulary of
`graph` and the formulas of `algebra`, not where a network comes from.

A BatchNorm is a per-channel affine map, y = a x + s, that looks for layers to live in.

Backward, into what makes its input, if nothing else reads that:
    1   a layer (convolution, transposed convolution, Linear): any scale and shift
    2   another BatchNorm: the two become one
    3   through what commutes: linear operations that keep constants (average pooling without padding, resizing,
        reshaping), maxima where no scale is negative, a concatenation (each part by itself), a sum (the scale into
        both sides, the shift into one), positively homogeneous functions where the shift is zero
Forward, into everything that reads its output:
    4   a layer that reads no padding: scale into its weights, shift into its bias; Linear through flattening
    5   another BatchNorm: the two become one
    6   through what commutes, as in 3, but zeros may join at the border: the shift is then no constant any more
Where a layer reads zeros at the border, in its own padding or through 6, the scale is exact and the shift needs one of:
    7   ones: the layer that makes the input gets one more output channel, 1 everywhere; activations carry it as f(1),
        padding borders it with zeros as it borders the others, and the next layer weighs it with sum_c W_c s_c
    8   bias-map: what the shift alone makes of the layer, border included, is added as a constant; needs a fixed size
    9   floor: with t = sign(a) s, a relu(z) + s = sign(a) max(|a| z + t, t): scale and shift go into the layer before
        the ReLU, which becomes a maximum per channel; the signs go on as in 4 to 6, or a minimum takes them

Refused, with the reason in the report: statistics of the batch (such a node never gets here as a BatchNorm); a value
that something else reads or that is an input or output of the network; shared weights; an operation that does not
commute; a border on which no strategy allowed is exact; a result that misses 1e-9 in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from export.fold import algebra
from export.fold.graph import (
    Add,
    Clamp,
    Concat,
    Elementwise,
    Flatten,
    Graph,
    Identity,
    Layer,
    Node,
    Norm,
    Op,
    Opaque,
    Sizes,
    Spatial,
    Tensor,
    Value,
    evaluate,
    per_channel,
)
from export.fold.report import FoldedNorm, FoldReport, KeptNorm, Runtime, Strategy

TOLERANCE = 1e-9
"""Largest relative difference, in float64, that a fold may make to the part of the network it changes."""

ALIGNMENT = 4


@dataclass(frozen=True)
class Prices:
    """What a runtime takes for what folding adds, in multiply-adds.

    Attributes:
        mapped: of one element of an added map, a pass of its own through memory.
        clamped: of one element of a maximum per channel, in place of a ReLU.
        unaligned: of a channel of ones that leaves a layer's channels no multiple of ALIGNMENT any more, as a share of
            that layer's work and of those that read it.
    """

    mapped: float
    clamped: float
    unaligned: float


PRICES: dict[Runtime, Prices] = {
    "onnxruntime": Prices(mapped=32.0, clamped=96.0, unaligned=0.25),
    "torch": Prices(mapped=32.0, clamped=2.0, unaligned=0.25),
}
"""These order the ways as they were measured (two AVX-512 cores; docs/strategies.md).

onnxruntime joins a ReLU to the layer before and keeps both in its blocked layout, which a maximum per channel leaves,
and whose convolutions are not used with other than multiples of four channels: on the article's network, two channels
of ones, of which the second breaks 20 to 21, came to 0.88 to 0.94 of the throughput of one with a bias map.

To torch a maximum per channel is one operation, as the ReLU was: floors alone were 1 to 10 % faster than channels of
ones and maps.
"""


class _Refused(Exception):
    """This home is not exact or not allowed; the message is for the report."""


@dataclass
class _Plan:
    """A home: the operations to put in, the values that get more channels, and what that costs.

    `work` is counted in multiply-adds, `mapped` and `clamped` in elements for one image; `unaligned` is the work of the
    layers that a channel of ones puts out of step.
    """

    method: str
    changes: dict[Node, Op]
    passed: set[Node] = field(default_factory=set)
    wider: dict[Value, int] = field(default_factory=dict)
    work: float = 0.0
    mapped: int = 0
    clamped: int = 0
    unaligned: float = 0.0

    def cost(self, prices: Prices) -> float:
        """In multiply-adds: what layers have to do more, and the rest as it is priced."""
        return (
            self.work + prices.mapped * self.mapped + prices.clamped * self.clamped + prices.unaligned * self.unaligned
        )

    def into(self, norm: Node) -> tuple[str, ...]:
        return tuple(
            node.name for node, op in self.changes.items() if node is not norm and isinstance(op, Layer | Norm)
        )


@dataclass
class _Sink:
    """A layer or BatchNorm that reads the output, and the map as it arrives there.

    `bordered`: zeros have joined the shift on the way. `position` and `width`: where, and as how many inputs, one more
    channel of the BatchNorm's output would arrive.
    """

    node: Node
    scale: Tensor
    shift: Tensor
    bordered: bool
    position: int
    width: int


def fold(graph: Graph, strategy: Strategy = "auto", runtime: Runtime = "onnxruntime") -> FoldReport:
    """Fold what can be folded, in place. Every BatchNorm of the graph appears in the report.

    Where several ways are exact, that one is taken which costs `runtime` least.
    """
    folded: list[FoldedNorm] = []
    kept: dict[Node, str] = {}
    waiting = graph.norms()
    if strategy == "none":
        kept = dict.fromkeys(waiting, "strategy none: nothing is folded")
        waiting = []
    while waiting:
        left = []
        for norm in waiting:
            outcome = _fold_one(norm, strategy, PRICES[runtime])
            if isinstance(outcome, FoldedNorm):
                folded.append(outcome)
                kept.pop(norm, None)
            else:
                kept[norm] = outcome
                left.append(norm)
        # A fold can clear the way for another one, so those that stayed are asked again while anything moves.
        if len(left) == len(waiting):
            break
        waiting = left
    refused = (KeptNorm(name=node.name, reason=reason) for node, reason in kept.items())
    return FoldReport(folded=tuple(folded), kept=(*refused, *graph.unread))


def _fold_one(norm: Node, strategy: Strategy, prices: Prices) -> FoldedNorm | str:
    """Fold one BatchNorm in place, the cheapest way that holds, or say why not."""
    reasons: dict[str, str] = {}
    border = (("ones", _ones), ("bias-map", _bias_map), ("floor", _floor))
    # The ways over a border cost something to find and to run: they are looked for where no free home holds.
    for searches in (
        (("backward", _backward), ("forward", _forward)),
        tuple((way, search) for way, search in border if strategy in ("auto", way)),
    ):
        plans: list[_Plan] = []
        for label, search in searches:
            try:
                plans.append(search(norm))
            except _Refused as refusal:
                reasons[label] = str(refusal)
        for plan in sorted(plans, key=lambda plan: plan.cost(prices)):
            error = _apply(norm, plan)
            if error <= TOLERANCE:
                return FoldedNorm(name=norm.name, method=plan.method, into=plan.into(norm), error=error)
            reasons[plan.method] = f"the result was off by {error:.1e} (relative, float64), so it was undone"
    return "; ".join(f"{label}: {reason}" for label, reason in reasons.items())


# -- backward: cases 1 to 3 ------------------------------------------------------------------------------------------


def _backward(norm: Node) -> _Plan:
    op = _norm_op(norm)
    plan = _Plan("into the layer before", {norm: Identity()})
    _push_back(norm.inputs[0], norm, op.scale, op.shift, plan)
    return plan


def _push_back(value: Value, reader: Node, scale: Tensor, shift: Tensor, plan: _Plan) -> None:
    """Make `value` become scale·value + shift by changing what makes it."""
    node = _only_for(value, reader)
    op = plan.changes.get(node, node.op)
    if isinstance(op, Layer):  # case 1
        _require_own_weights(node, op)
        _require_channel_axis(op, value)
        plan.changes[node] = algebra.absorb_after(op, scale, shift)
    elif isinstance(op, Norm):  # case 2
        plan.changes[node] = Norm(op.scale * scale, op.shift * scale + shift)
    elif isinstance(op, Concat):  # case 3, each part by itself
        plan.passed.add(node)
        start = 0
        for part in node.inputs:
            end = start + _channels(part)
            _push_back(part, node, scale[start:end], shift[start:end], plan)
            start = end
    elif isinstance(op, Add):  # case 3, both sides
        plan.passed.add(node)
        first, second = node.inputs
        _push_back(first, node, scale, shift, plan)
        _push_back(second, node, scale, torch.zeros_like(shift), plan)
    elif isinstance(op, Flatten):  # case 3, where a channel's positions agree
        plan.passed.add(node)
        channels = _channels(node.inputs[0])
        scales, shifts = scale.reshape(channels, -1), shift.reshape(channels, -1)
        if not (scales == scales[:, :1]).all() or not (shifts == shifts[:, :1]).all():
            raise _Refused(
                f"behind {node.name} each position has a scale of its own, and the layer before has one a channel"
            )
        _push_back(node.inputs[0], node, scales[:, 0], shifts[:, 0], plan)
    else:  # case 3
        if _passes(node, op, scale, shift):
            raise _Refused(f"{node.name} reads or writes zeros at the border, so the shift does not pass")
        plan.passed.add(node)
        _push_back(node.inputs[0], node, scale, shift, plan)


def _passes(node: Node, op: Op, scale: Tensor, shift: Tensor) -> bool:
    """Whether zeros join the shift at the border on the way through `op`. Raises where the map doesn't commute."""
    if isinstance(op, Identity):
        return False
    if isinstance(op, Spatial):
        if not op.linear and (scale < 0).any():
            raise _Refused(
                f"{node.name} ({op.label}) takes a maximum, and {int((scale < 0).sum())} scales are negative"
            )
        joined = not op.keeps_constants and bool(shift.any())
        if joined and not op.linear:
            raise _Refused(f"{node.name} ({op.label}) takes a maximum over a border, where the shift is missing")
        return joined
    if isinstance(op, Elementwise) and op.homogeneous and not shift.any() and not (scale < 0).any():
        return False
    label = op.label if isinstance(op, Elementwise | Opaque) else type(op).__name__.lower()
    reason = f" ({op.reason})" if isinstance(op, Opaque) and op.reason else ""
    raise _Refused(f"a scale and shift does not pass through {label} at {node.name}{reason}")


# -- forward: cases 4 to 6 -------------------------------------------------------------------------------------------


def _forward(norm: Node) -> _Plan:
    op = _norm_op(norm)
    plan = _Plan("into the layers after", {norm: Identity()})
    for sink in _sinks(norm.outputs[0], op.scale, op.shift, plan):
        if _needs_border(sink):
            raise _Refused(f"{sink.node.name} reads zeros at its border, where the shift would be missing")
        plan.changes[sink.node] = _absorbed(plan.changes.get(sink.node, sink.node.op), sink)
    return plan


def _sinks(value: Value, scale: Tensor, shift: Tensor, plan: _Plan) -> list[_Sink]:
    """Everything that must absorb the map, or refuse. Notes the nodes on the way in `plan.passed`."""
    found: list[_Sink] = []

    def follow(value: Value, scale: Tensor, shift: Tensor, bordered: bool, position: int, width: int) -> None:
        if value.pinned:
            raise _Refused(f"{value.name} is {value.pinned}")
        for node in dict.fromkeys(value.readers):
            op = node.op
            if isinstance(op, Layer):  # case 4, and 7 to 9
                _require_own_weights(node, op)
                _require_channel_axis(op, value)
                found.append(_Sink(node, scale, shift, bordered, position, width))
            elif isinstance(op, Norm):  # case 5
                if bordered:
                    raise _Refused(f"{node.name} follows a border of zeros")
                found.append(_Sink(node, scale, shift, bordered, position, width))
            elif isinstance(op, Flatten):  # case 6
                plan.passed.add(node)
                positions = _channels(node.output) // _channels(value)
                wide, moved = (vector.repeat_interleave(positions) for vector in (scale, shift))
                follow(node.output, wide, moved, bordered, position * positions, width * positions)
            elif isinstance(op, Concat):  # case 6, the other parts stay as they are
                plan.passed.add(node)
                start = 0
                for part in node.inputs:
                    if part is value:
                        size = _channels(node.output)
                        wide, moved = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
                        wide[start : start + len(scale)] = scale
                        moved[start : start + len(shift)] = shift
                        follow(node.output, wide, moved, bordered, start + position, width)
                    start += _channels(part)
            else:  # case 6
                joined = _passes(node, op, scale, shift)
                if bordered and not (isinstance(op, Identity) or (isinstance(op, Spatial) and op.linear)):
                    raise _Refused(f"{node.name} does not pass a shift that is missing at the border")
                plan.passed.add(node)
                follow(node.output, scale, shift, bordered or joined, position, width)

    follow(value, scale, shift, False, len(scale), 1)
    return found


def _needs_border(sink: _Sink) -> bool:
    op = sink.node.op
    return bool(sink.shift.any()) and (sink.bordered or (isinstance(op, Layer) and op.reads_padding))


def _absorbed(op: Op, sink: _Sink) -> Op:
    """The sink's operation with the map inside, the shift left out where it needs a border."""
    if isinstance(op, Norm):
        return Norm(op.scale * sink.scale, op.shift + op.scale * sink.shift)
    assert isinstance(op, Layer)
    return algebra.scale_input(op if _needs_border(sink) else algebra.shift_input(op, sink.shift), sink.scale)


def _bordered_sinks(norm: Node, plan: _Plan) -> list[_Sink]:
    """The sinks, of which at least one needs help with the border: else the plain fold is the one to take."""
    op = _norm_op(norm)
    sinks = _sinks(norm.outputs[0], op.scale, op.shift, plan)
    if not any(_needs_border(sink) for sink in sinks):
        raise _Refused("not needed, no border is read")
    return sinks


# -- the border: cases 7 to 9 ----------------------------------------------------------------------------------------


def _ones(norm: Node) -> _Plan:
    """Case 7."""
    plan = _Plan("ones channel", {norm: Identity()})
    sinks = _bordered_sinks(norm, plan)
    passed_forward = set(plan.passed)
    if len({sink.node for sink in sinks}) < len(sinks):
        raise _Refused("a layer reads it twice, so one more channel has no one place")
    constant, producer = _carry_ones(norm, plan)
    breaks = _as_layer(producer.op).channels_out % ALIGNMENT == 0
    if breaks:
        plan.unaligned += _work(producer, _as_layer(producer.op))
    for sink in sinks:
        op = sink.node.op
        if not isinstance(op, Layer):
            raise _Refused(f"{sink.node.name}, a BatchNorm, reads it too and has no place for one more channel")
        _require_one_group(sink.node, op)
        kernel = algebra.no_kernel(op, sink.width)
        if _needs_border(sink):
            if sink.width > 1:
                raise _Refused(f"behind the flattening before {sink.node.name} one more channel is {sink.width} inputs")
            kernel = algebra.border_kernel(op, sink.shift) / constant
        plan.changes[sink.node] = algebra.add_inputs(_as_layer(_absorbed(op, sink)), sink.position, kernel)
        plan.work += kernel.numel() * _positions(sink.node, op)
        if breaks:
            plan.unaligned += _work(sink.node, op)
    _widen(norm.outputs[0], 1, passed_forward, plan)
    return plan


def _carry_ones(norm: Node, plan: _Plan) -> tuple[float, Node]:
    """Give the layer before `norm` a channel of ones and bring it there.

    Returns what has become of 1 on the way, and the layer's node.
    """
    path: list[Node] = []
    value, reader = norm.inputs[0], norm
    while True:
        if value.pinned or value.producer is None:
            raise _Refused(f"{value.name} is {value.pinned} and can't get one more channel")
        for user in dict.fromkeys(value.users):
            if user is reader:
                continue
            op = user.op
            if not isinstance(op, Layer):
                raise _Refused(f"{user.name} reads {value.name} too and has no place for one more channel")
            _require_own_weights(user, op)
            _require_channel_axis(op, value)
            _require_one_group(user, op)
            plan.changes[user] = algebra.add_inputs(op, op.channels_in, algebra.no_kernel(op, 1))
            plan.work += op.channels_out * _kernel_size(op) * _positions(user, op)
        plan.wider[value] = _channels(value) + 1
        node = value.producer
        if isinstance(node.op, Layer):
            break
        if not isinstance(node.op, Identity | Elementwise | Clamp) and not (
            isinstance(node.op, Spatial) and node.op.keeps_constants
        ):
            label = node.op.label if isinstance(node.op, Spatial | Opaque) else type(node.op).__name__.lower()
            raise _Refused(f"{label} at {node.name} carries no channel of ones from a layer before it")
        _require_any_channels(node)
        path.append(node)
        value, reader = node.inputs[0], node
    layer = node.op
    _require_own_weights(node, layer)
    _require_channel_axis(layer, value)
    _require_one_group(node, layer)
    if layer.bias is not None and layer.bias.dim() > 1:
        raise _Refused(f"{node.name} has a bias map already")
    plan.changes[node] = algebra.add_ones_output(layer)
    plan.work += layer.channels_in * _kernel_size(layer) * _positions(node, layer)
    constant = torch.ones((), dtype=torch.float64)
    for step in reversed(path):
        plan.passed.add(step)
        if isinstance(step.op, Elementwise):
            constant = step.op.function(constant)
        elif isinstance(step.op, Clamp):
            infinity = torch.full((1,), math.inf, dtype=torch.float64)
            plan.changes[step] = Clamp(torch.cat([step.op.low, -infinity]), torch.cat([step.op.high, infinity]))
    if not torch.isfinite(constant) or abs(float(constant)) < 1e-3:
        raise _Refused(f"the activations turn a channel of ones into {float(constant):.1e}, which carries nothing")
    return float(constant), node


def _widen(value: Value, extra: int, passed: set[Node], plan: _Plan) -> None:
    """Note that `value`, and what the passed nodes make of it, has more channels."""
    plan.wider[value] = _channels(value) + extra
    for node in dict.fromkeys(value.users):
        if isinstance(node.op, Sizes):
            raise _Refused(f"{node.name} asks for the sizes of {value.name}, which would change")
        if node in passed:
            _require_any_channels(node)
            positions = _channels(node.output) // _channels(value) if isinstance(node.op, Flatten) else 1
            _widen(node.output, extra * positions, passed, plan)


def _bias_map(norm: Node) -> _Plan:
    """Case 8."""
    plan = _Plan("bias map", {norm: Identity()})
    sinks = _bordered_sinks(norm, plan)
    shape = norm.outputs[0].shape
    needy: dict[Node, Layer] = {}
    for sink in sinks:
        plan.changes[sink.node] = _absorbed(plan.changes.get(sink.node, sink.node.op), sink)
        if _needs_border(sink):
            needy[sink.node] = _as_layer(sink.node.op)
    if shape is None or not norm.outputs[0].spatial_is_fixed or not all(n.output.spatial_is_fixed for n in needy):
        raise _Refused("a bias map needs a fixed size, and the size is not")
    shift = per_channel(_norm_op(norm).shift, len(shape)).expand(1, *shape[1:])
    feeds = {
        value: torch.zeros(1, *_sizes(value)[1:], dtype=torch.float64)
        for node in plan.passed
        for value in node.inputs
        if value.producer not in plan.passed
    }
    feeds[norm.outputs[0]] = shift
    for node in plan.passed:
        if isinstance(node.op, Spatial) and node.op.stands_in and len(needy):
            raise _Refused(f"what {node.name} ({node.op.label}) makes of a shift is not known to the last digit")
    for node, layer in needy.items():
        (arriving,) = evaluate(node.inputs, feeds)
        response = replace(layer, weight=layer.weight.detach().double().cpu(), bias=None).evaluate(arriving)[0]
        changed = _as_layer(plan.changes[node])
        bias = torch.zeros(layer.channels_out, dtype=torch.float64) if changed.bias is None else changed.bias
        bias = bias.detach().double().cpu()
        plan.changes[node] = replace(
            changed,
            bias=response + (bias if bias.dim() == response.dim() else bias.reshape(-1, *([1] * (response.dim() - 1)))),
        )
        plan.mapped += response.numel()
    return plan


def _floor(norm: Node) -> _Plan:
    """Case 9."""
    op = _norm_op(norm)
    plan = _Plan("floor", {norm: Identity()})
    value, reader = norm.inputs[0], norm
    relu: Node | None = None
    maxima = False
    while True:
        node = _only_for(value, reader)
        if isinstance(node.op, Layer):
            break
        if isinstance(node.op, Elementwise) and node.op.label == "relu" and relu is None:
            relu = node
        elif isinstance(node.op, Spatial) and node.op.keeps_constants:
            maxima = maxima or not node.op.linear
        elif not isinstance(node.op, Identity):
            raise _Refused(f"{node.name} stands between it and a layer")
        plan.passed.add(node)
        value, reader = node.inputs[0], node
    if relu is None:
        raise _Refused("no ReLU stands before it")
    _require_own_weights(node, node.op)
    _require_channel_axis(node.op, value)
    plan.clamped += _size(relu.output)

    infinity = torch.full_like(op.scale, math.inf)
    negative = op.scale < 0
    sign = torch.where(negative, -1.0, 1.0).double()
    turned = _Plan("", {})
    try:
        sinks = _sinks(norm.outputs[0], sign, torch.zeros_like(sign), turned) if negative.any() else []
    except _Refused as refusal:
        if maxima:
            raise _Refused(
                f"{int(negative.sum())} scales are negative and their signs can't go on: {refusal}"
            ) from None
        # A minimum takes the negative channels: a relu(z) + s = min(a z + s, s).
        plan.changes[node] = algebra.absorb_after(node.op, op.scale, op.shift)
        plan.changes[relu] = Clamp(
            torch.where(negative, -infinity, op.shift), torch.where(negative, op.shift, infinity)
        )
        plan.clamped += _size(relu.output)
        return plan
    plan.changes[node] = algebra.absorb_after(node.op, op.scale.abs(), sign * op.shift)
    plan.changes[relu] = Clamp(sign * op.shift, infinity)
    plan.passed |= turned.passed
    for sink in sinks:
        plan.changes[sink.node] = _absorbed(plan.changes.get(sink.node, sink.node.op), sink)
    return plan


# -- what all cases ask ----------------------------------------------------------------------------------------------


def _norm_op(norm: Node) -> Norm:
    assert isinstance(norm.op, Norm)
    return norm.op


def _as_layer(op: Op) -> Layer:
    assert isinstance(op, Layer)
    return op


def _only_for(value: Value, reader: Node) -> Node:
    """The node that makes `value`, if `reader` alone reads it."""
    others = [node.name for node in value.readers if node is not reader]
    if value.producer is None or value.pinned:
        raise _Refused(f"{value.name} is {value.pinned or 'not made by the network'}")
    if others:
        raise _Refused(f"{value.name} is also read by {', '.join(others[:3])}")
    if len(value.readers) > 1:
        raise _Refused(f"{reader.name} reads {value.name} twice")
    return value.producer


def _require_own_weights(node: Node, op: Layer) -> None:
    if op.shared:
        raise _Refused(f"the weights of {node.name} are shared with another layer")


def _require_one_group(node: Node, op: Layer) -> None:
    if op.groups > 1:
        raise _Refused(f"{node.name} has {op.groups} groups, which leave no place for one more channel")


def _require_any_channels(node: Node) -> None:
    if isinstance(node.op, Spatial | Flatten) and not node.op.any_channels:
        raise _Refused(f"{node.name} reshapes to fixed sizes, which leave no place for one more channel")


def _require_channel_axis(op: Layer, value: Value) -> None:
    if op.rank == 0 and value.shape is not None and len(value.shape) != 2:
        raise _Refused("a Linear there works on the last axis and not on the channel axis")


def _sizes(value: Value) -> tuple[int, ...]:
    if value.shape is None:
        raise _Refused(f"the shape of {value.name} is not known")
    return value.shape


def _channels(value: Value) -> int:
    return _sizes(value)[1]


def _size(value: Value) -> int:
    """Elements for one image."""
    return math.prod(_sizes(value)[1:])


def _kernel_size(op: Layer) -> int:
    return math.prod(op.weight.shape[2:])


def _work(node: Node, op: Layer) -> int:
    """Multiply-adds for one image."""
    return op.weight.numel() * _positions(node, op)


def _positions(node: Node, op: Layer) -> int:
    """How many times the kernel is applied to one image."""
    return math.prod(_sizes(node.inputs[0] if op.transposed else node.output)[2:])


# -- applying, checked -----------------------------------------------------------------------------------------------


def _apply(norm: Node, plan: _Plan) -> float:
    """Put the plan's operations in; returns the relative error in float64, and undoes everything if that is too large.

    Compared are all values that the changed part hands on to the rest of the network, for random inputs of the
    example's shapes. A NaN counts as an infinite error.
    """
    part = plan.passed | set(plan.changes)
    handed_on = [
        value
        for node in part
        for value in node.outputs
        if value.pinned or any(user not in part for user in value.readers)
    ]
    generator = torch.Generator().manual_seed(0)
    feeds = {
        value: torch.randn(_sizes(value), generator=generator, dtype=torch.float64)
        for node in part
        for value in node.inputs
        if value.producer not in part
    }
    before = evaluate(handed_on, feeds)
    former = {node: node.op for node in plan.changes}
    for node, op in plan.changes.items():
        node.op = op
    after = evaluate(handed_on, feeds)
    error = max((_relative(a, b) for a, b in zip(after, before, strict=True)), default=0.0)
    if error <= TOLERANCE:
        for value, channels in plan.wider.items():
            value.shape = (_sizes(value)[0], channels, *_sizes(value)[2:])
    else:
        for node, op in former.items():
            node.op = op
    return error


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
    return math.inf if math.isnan(error) else error

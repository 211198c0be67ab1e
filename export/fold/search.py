"""The search: a home for every BatchNorm, or the reason why there is none.

Owns the order, the choice between several exact homes, and the check of each fold by itself. Knows `neighbours` and
`border`, which find homes, not where a network comes from.

A BatchNorm is an affine map, y = a x + s, that looks for layers to live in.

Backward, into what makes its input, if nothing else reads that:
    1   a layer (convolution, transposed convolution, Linear): any scale and shift
    2   another BatchNorm, or constants' arithmetic: the two become one
    3   through what lets it pass (`operations`): linear operations that keep constants, maxima where no scale is
        negative, reshapes and transpositions, a concatenation (each part by itself), a sum (the scale into both sides,
        the shift into either), positively homogeneous functions where the shift is zero
Forward, into everything that reads its output:
    4   a layer that reads no padding: scale into its weights, shift into its bias
    5   another BatchNorm, or constants' arithmetic; through what lets it pass, as in 3, but zeros may join at
        the border
Beside:
    6   a layer of the same input, to whose output this one's is added: onto the centre of its kernel
Where a layer reads zeros at the border, in its own padding or through 5, the scale is exact and the shift needs one of:
    7   ones: the layer that makes the input gets one more output channel, 1 everywhere; activations carry it as f(1),
        padding borders it with zeros as it borders the others, and the next layer weighs it with sum_c W_c s_c
    8   bias-map: what the shift alone makes of the layer, border included, is added as a constant; needs a fixed size
    9   floor: as 1 to 3, but past a ReLU or another clamp, whose bounds become those of each channel: a relu(z) + s =
        max(a z + s, s). The signs of negative scales go on as in 4 and 5, or a minimum takes their place
And past a clamp that *follows* it, as 4, 5 and 8:
   10   pre-activation: relu(a x + s) = a max(x, -s/a) + s

Constants' arithmetic (multiplications and additions of constants, per channel) is folded by cases 1 to 6, and by the
others where it is a scale and a shift, as a BatchNorm that was taken apart is. At last, parallel layers of one input
become one. None of this is a BatchNorm, and none of it is reported as kept.

Refused, with the reason in the report: statistics of the batch (such a node never gets here as a BatchNorm); a value
that something else reads or writes into, or that is an input or output of the network; an operation that lets no map
pass; a border on which no strategy allowed is exact; weights that would overflow in the dtype they are written in; a
mean so far from zero that it would cancel in the next layer; a result that misses 1e-9 in float64. And, in `auto`, ways
that cost the runtime more than the BatchNorm does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from export.fold import border, neighbours
from export.fold.graph import Graph, Node, Op, Value, evaluate, forget
from export.fold.maps import Inapplicable, Refused
from export.fold.neighbours import affine_op
from export.fold.operations import Affine, Clamp, Layer, Select, Sum
from export.fold.plan import PRICES, Plan, Prices, elements
from export.fold.report import FoldedNorm, FoldReport, KeptNorm, Runtime, Strategy

Tensor = torch.Tensor

TOLERANCE = 1e-9
"""Largest relative difference, in float64, that a fold may make to the part of the network it changes."""

MOST_OFFSET = 1e3
"""So many standard deviations may a mean be away from zero for a fold into the next layer, which then adds numbers that
much larger than their sum. In front of a 1×1 convolution of 16 channels float32 results were off by 8.4e-5 at 1e3 and
by 1.2e-3 at 1e4, where the BatchNorm itself made 1.0e-6 and 1.3e-4 of it."""

Way = Callable[[Node], Plan]

FREE: dict[str, Way] = {
    "before it": neighbours.backward,
    "after it": neighbours.forward,
    "beside it": neighbours.beside,
}
"""By where they look."""


@dataclass(frozen=True)
class Limits:
    """What not to fold: nodes by name, with the reason; and after how many folds to stop."""

    skip: Mapping[str, str] = field(default_factory=dict)
    most: int | None = None


def fold(
    graph: Graph, strategy: Strategy = "auto", runtime: Runtime = "onnxruntime", limits: Limits | None = None
) -> FoldReport:
    """Fold what can be folded, in place. Every BatchNorm of the graph appears in the report.

    Where several ways are exact, that one is taken which costs `runtime` least.
    """
    search = _Search(strategy, PRICES[runtime], limits or Limits())
    norms = [node for node in graph.nodes if isinstance(node.op, Affine) and node.op.is_norm]
    if strategy == "none":
        kept = dict.fromkeys(norms, "strategy none: nothing is folded")
        return FoldReport(kept=(*_kept(kept), *graph.unread))

    def constants() -> list[Node]:
        affine = [node for node in graph.nodes if isinstance(node.op, Affine) and node.inputs]
        return [node for node in affine if not affine_op(node).is_norm]

    # Constants first: those that have a home stand in no BatchNorm's way. What is left of them may find one afterwards.
    simplified, _ = search.all_of(constants())
    folded, kept = search.all_of(norms)
    simplified += search.all_of(constants())[0]
    # Two layers that became one may be the home that two had no room for.
    while merged := search.parallel([node for node in graph.nodes if isinstance(node.op, Sum) and node.inputs]):
        simplified += merged
        more, kept = search.all_of(list(kept))
        folded += more
    return FoldReport(folded=tuple(folded), kept=(*_kept(kept), *graph.unread), simplified=tuple(simplified))


def _kept(reasons: Mapping[Node, str]) -> list[KeptNorm]:
    return [KeptNorm(name=node.name, reason=reason) for node, reason in reasons.items()]


class _Search:
    """One run over a graph: what may be done, and what has been."""

    def __init__(self, strategy: Strategy, prices: Prices, limits: Limits) -> None:
        self.strategy, self.prices, self.limits = strategy, prices, limits
        self.count = 0

    def all_of(self, nodes: list[Node]) -> tuple[list[FoldedNorm], dict[Node, str]]:
        """Fold each of `nodes` that can be; returns those, and the others with the reason."""
        folded: list[FoldedNorm] = []
        kept: dict[Node, str] = {}
        while nodes:
            left = []
            for node in nodes:
                outcome = self.one(node)
                if isinstance(outcome, FoldedNorm):
                    folded.append(outcome)
                    self.count += 1
                    kept.pop(node, None)
                else:
                    kept[node] = outcome
                    left.append(node)
            # A fold can clear the way for another one, so those that stayed are asked again while anything moves.
            if len(left) == len(nodes):
                break
            nodes = left
        return folded, kept

    def parallel(self, sums: list[Node]) -> list[FoldedNorm]:
        """Make one layer of two that read the same and are added; returns those sums."""
        merged: list[FoldedNorm] = []
        for total in sums:
            if self.stopped(total):
                continue
            try:
                plan = neighbours.parallel(total)
                error = apply(plan)
            except Exception:  # parallel layers that stay two are as right as before
                continue
            if error <= TOLERANCE:
                merged.append(FoldedNorm(name=total.name, method=plan.method, into=plan.into(total), error=error))
                self.count += 1
        return merged

    def stopped(self, node: Node) -> str:
        """Why this node must stay what it is, or nothing."""
        if self.limits.most is not None and self.count >= self.limits.most:
            return "so many folds were asked for and no more"
        return self.limits.skip.get(node.name, "")

    def one(self, node: Node) -> FoldedNorm | str:
        """Fold one map in place, the cheapest way that holds, or say why not."""
        reason = self.stopped(node)
        if reason:
            return reason
        for value in (*node.inputs, *node.outputs):
            if value.unstable:
                return f"{value.name} {value.unstable}"
        reasons: dict[str, str] = {}
        for priced, ways in ((False, FREE), (True, self.priced(affine_op(node)))):
            plans: list[Plan] = []
            for label, way in ways.items():
                try:
                    plans.append(way(node))
                except Inapplicable:
                    continue
                except Refused as refusal:
                    reasons[label] = str(refusal)
                except Exception as raised:  # whatever goes wrong in a fold, the network stays right without it
                    reasons[label] = f"folding it raised {type(raised).__name__}: {raised}"
            for plan in sorted(plans, key=lambda plan: plan.cost(self.prices)):
                problem = self.rejected(node, plan, priced)
                error = math.nan
                if not problem:
                    try:
                        error = apply(plan)
                    except Refused as refusal:
                        problem = str(refusal)
                    except Exception as raised:  # as above; `apply` has undone it
                        problem = f"checking it raised {type(raised).__name__}: {raised}"
                if error <= TOLERANCE:
                    return FoldedNorm(name=node.name, method=plan.method, into=plan.into(node), error=error)
                off = f"the result was off by {error:.1e} (relative, float64), so it was undone"
                reasons[plan.method] = problem or off
        return sentence(reasons)

    def priced(self, op: Affine) -> dict[str, Way]:
        """The ways that cost something to find and to run: they are looked for where no free home holds."""
        if not op.is_norm and not (op.map.shifts and bool((op.map.scale != 1).any())):
            return {}
        ways: dict[str, dict[str, Way]] = {
            "ones": {"ones channel": border.ones},
            "bias-map": {"bias map": border.bias_map},
            "floor": {
                "floor": lambda norm: neighbours.backward(norm, clamps=True),
                "floor, signs ahead": neighbours.floor,
                "pre-activation": lambda norm: neighbours.forward(norm, clamps=True),
            },
        }
        if self.strategy in ways:
            return ways[self.strategy]
        both = {"bias map, pre-activation": lambda norm: border.bias_map(norm, clamps=True)}
        return {**ways["ones"], **ways["bias-map"], **ways["floor"], **both}

    def rejected(self, node: Node, plan: Plan, priced: bool) -> str:
        """Why this exact way is not taken, or nothing."""
        op = affine_op(node)
        if plan.ahead and op.offset > MOST_OFFSET:
            return (
                f"its mean is {op.offset:.0e} standard deviations from zero, and would cancel in the next layer with "
                "the loss of as many digits"
            )
        bound = self.prices.kept * elements(node.output)
        cost = plan.cost(self.prices)
        if priced and self.strategy == "auto" and cost > bound:
            return (
                f"it costs {cost / max(bound, 1):.1f} times what the BatchNorm does; strategy all takes it all the same"
            )
        return ""


def sentence(reasons: Mapping[str, str]) -> str:
    """One sentence of all obstacles, the nearest first: reasons by the way of folding or by where it looked."""
    near = [f"{place} {reasons[place]}" for place in FREE if place in reasons]
    return "; ".join([*near, *(f"{way}: {reason}" for way, reason in reasons.items() if way not in FREE)])


def apply(plan: Plan) -> float:
    """Put the plan's operations in; returns the relative error in float64, and undoes everything if that is too large.

    Compared are all values that the changed part hands on to the rest of the network, for random inputs of the
    example's shapes. A NaN counts as an infinite error where there was none before. Refused, with everything undone,
    where a weight overflows in the dtype it is written in.
    """
    for node, op in plan.changes.items():
        _require_finite(node, op)
    part = plan.passed | set(plan.changes)
    dead = {value for node, op in plan.changes.items() if isinstance(op, Select) for value in _unread(node, op)}
    handed_on = [
        value
        for node in part
        for value in node.outputs
        if value not in dead and (value.pinned or any(user not in part for user in value.readers))
    ]
    generator = torch.Generator().manual_seed(0)
    feeds = {
        value: torch.randn(value.known_shape(), generator=generator, dtype=torch.float64)
        for node in sorted(part, key=lambda node: node.name)
        for value in node.inputs
        if value.producer not in part
    }
    before = evaluate(handed_on, feeds)
    wanted = [before[value] for value in handed_on]
    del before
    if any(math.isnan(float(right.sum())) and not bool(torch.isfinite(right).any()) for right in wanted):
        raise Refused("random numbers make nothing there that could be compared")
    former = {node: node.op for node in plan.changes}
    error = math.inf
    try:
        for node, op in plan.changes.items():
            node.op = op
        after = evaluate(handed_on, feeds)
        error = max(
            [relative(after[value], right) for value, right in zip(handed_on, wanted, strict=True)], default=0.0
        )
    finally:
        if not error <= TOLERANCE:
            for node, op in former.items():
                node.op = op
    if error <= TOLERANCE:
        for value, shape in plan.wider.items():
            value.shape = shape
            sizes = zip(shape[1:], value.sizes[1:], strict=True)
            value.sizes = (value.sizes[0], *((size, ()) if not old[1] else old for size, old in sizes))
        for node, op in plan.changes.items():
            if isinstance(op, Select):
                for value in _unread(node, op):
                    forget(node, value)
    return error


def _unread(node: Node, op: Select) -> list[Value]:
    return [value for index, value in enumerate(node.inputs) if index != op.index]


def _require_finite(node: Node, op: Op) -> None:
    """Refused where numbers are not finite in the dtype that they are written in."""
    tensors: list[Tensor | None] = []
    dtype = torch.float64
    if isinstance(op, Layer):
        tensors, dtype = [op.weight, op.bias], op.dtype
    elif isinstance(op, Affine):
        tensors, dtype = [op.map.scale, op.map.shift], op.dtype
    elif isinstance(op, Clamp) and isinstance(node.op, Clamp):
        # An infinite bound is none; one that was finite has to stay a number, in float32 at least.
        tensors = [torch.where(torch.isinf(bound), 0.0, bound) for bound in (op.low, op.high)]
        dtype = torch.float32
    largest = torch.finfo(dtype).max
    for tensor in tensors:
        if tensor is not None and not bool((tensor.detach().abs() <= largest).all()):
            name = str(dtype).removeprefix("torch.")
            raise Refused(f"{node.name} would get a number that {name} can't hold")


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest absolute value; infinite for other shapes, or NaN in other places.

    Values below 1e-6 count as that: where nothing but zeros should come out, rounding noise may.
    """
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not math.isfinite(difference + largest):
        numbers = torch.isfinite(wanted)
        if not torch.equal(found.nan_to_num(nan=1.5)[~numbers], wanted.nan_to_num(nan=1.5)[~numbers]):
            return math.inf
        if not bool(numbers.any()):
            return 0.0
        difference = float((found - wanted)[numbers].abs().max())
        largest = float(wanted[numbers].abs().max())
    return math.inf if math.isnan(difference) else difference / max(largest, 1e-6)

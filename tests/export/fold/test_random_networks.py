"""Torch networks drawn at random: folding never makes a wrong number, never raises, and reports each BatchNorm once.

    python tests/export/fold/test_random_networks.py 10000 --processes 2
    python tests/export/fold/test_random_networks.py --only 1234 --reduce

draws that many and prints what became of them, and one of them alone, cut down to the steps that still fail.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import operator
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import campaign
from campaign import Outcome
from choosing import Chooser, Draw
from enliven import BatchNorm
from programs import norms_in
from random_networks import Drawn, draw_network, without

import export.fold
from export.fold import Folded, FoldError, FoldReport
from export.fold.report import Runtime, Strategy

EXACT = 1e-9
"""Largest relative difference in float64, between eager runs of the original and the fold."""

FEW_TIMES = 8.0
"""In other precisions: how many times the unfolded network's own error, against float64, the folded one's may be."""

ROUNDINGS = 16.0
"""And how many of the dtype's last places above that: an output may be right by chance before."""

NOISE = 0.1
"""A network whose unfolded error is larger than this shows nothing about a fold."""

BATCH_NORMS = ("aten.batch_norm.", "aten._native_batch_norm", "aten.native_batch_norm", "aten.cudnn_batch_norm")


class NotCounted(Exception):
    """The case says nothing about folding; another is drawn."""


Leaves = list[Any]


def run(model: nn.Module, inputs: tuple[Tensor, ...], times: int = 1) -> Leaves:
    """Everything that a caller sees after some calls: outputs, and what has become of the inputs."""
    model = copy.deepcopy(model) if times > 1 else model
    seen: Leaves = []
    with torch.no_grad():
        for _ in range(times):
            own = tuple(x.clone() for x in inputs)
            seen += [*(t.clone() if isinstance(t, Tensor) else t for t in pytree.tree_leaves(model(*own))), *own]
    return seen


def errors(wanted: Leaves, found: Leaves, *, dtypes: bool = True) -> list[float]:
    """Largest difference of each, relative to the largest value wanted; infinite where the two can't be compared.

    Values below 1e-3 count as 1e-3: what a softmax over one channel, say, leaves of a signal is rounding noise alone.
    """
    if len(wanted) != len(found):
        return [math.inf]

    def error(a: Any, b: Any) -> float:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return 0.0 if type(a) is type(b) and a == b else math.inf
        if a.shape != b.shape or (dtypes and a.dtype != b.dtype):
            return math.inf
        a, b = a.double(), b.double()
        value = float((b - a).abs().max() / a.abs().max().clamp_min(1e-3))
        return math.inf if math.isnan(value) else value

    return [error(a, b) for a, b in zip(wanted, found, strict=True)]


def finite(leaves: Leaves) -> bool:
    return all(bool(t.isfinite().all()) for t in leaves if isinstance(t, Tensor))


class Trial:
    """One network on one set of inputs: what is wanted, and how far a module may be from it."""

    def __init__(
        self, subject: nn.Module, reference: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, times: int
    ):
        self.inputs = tuple(x.to(dtype) for x in inputs)
        self.times = times
        if not finite([*subject.parameters(), *subject.buffers()]):
            raise NotCounted("its weights or statistics are not finite in this dtype, and folding refuses it")
        wanted = run(subject, self.inputs, times)
        if not finite(wanted):
            raise NotCounted("its own result is not finite")
        self.wanted, self.exact = wanted, dtype == torch.float64
        self.limits = [EXACT] * len(wanted)
        if not self.exact:
            self.reference = run(reference, tuple(x.double() for x in self.inputs), times)
            own = errors(self.reference, wanted, dtypes=False)
            if not finite(self.reference) or max(own) > NOISE:
                raise NotCounted("its own error is too large")
            self.limits = [FEW_TIMES * e + ROUNDINGS * torch.finfo(dtype).eps for e in own]

    def worst(self, module: nn.Module) -> tuple[float, float]:
        """The largest error, as a share of what is allowed, and as it is."""
        found = run(module, self.inputs, self.times)
        if self.exact:
            distances = errors(self.wanted, found)
        else:
            same = [math.inf if math.isinf(e) else 0.0 for e in errors(self.wanted, found)]  # dtypes and sizes
            distances = list(map(max, same, errors(self.reference, found, dtypes=False)))
        if len(distances) != len(self.limits):
            return math.inf, math.inf
        return max((e / limit, e) for e, limit in zip(distances, self.limits, strict=True))


def graph_modules(module: nn.Module) -> list[fx.GraphModule]:
    return list(dict.fromkeys(m for m in module.modules() if isinstance(m, fx.GraphModule)))


def batch_norm_nodes(module: nn.Module) -> int:
    """In the graph and in those of its regions and branches."""
    return sum(
        str(node.target).startswith(BATCH_NORMS)
        for graph_module in graph_modules(module)
        for node in graph_module.graph.nodes
    )


def memory(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    for graph_module in graph_modules(module):
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                tensors.append(operator.attrgetter(str(node.target))(graph_module))
    return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor) and t.numel()}


def exported(subject: nn.Module, drawn: Drawn) -> nn.Module:
    """The unfolded network as torch.export sees it, to tell its mistakes from the fold's. Raises NotCounted."""
    inputs = tuple(x.to(drawn.dtype) for x in drawn.inputs)
    attempts = [drawn.dynamic_shapes]
    if drawn.sizes == "default":
        batch = torch.export.Dim("batch")
        attempts = [tuple({0: batch} for _ in inputs), None]
    for attempt in attempts:
        try:
            with torch.no_grad():
                # Of a copy: what torch.export returns shares the weights.
                return torch.export.export(copy.deepcopy(subject), inputs, dynamic_shapes=attempt).module(
                    check_guards=False
                )
        except Exception:  # torch.export raises many kinds
            continue
    raise NotCounted("torch.export refuses it")


def blame(subject: nn.Module, drawn: Drawn, trial: Trial | None) -> None:
    """Raise NotCounted where torch.export's own program, unfolded, does no better."""
    program = exported(subject, drawn)
    if trial is None:
        return
    try:
        share, _ = trial.worst(program)
    except Exception as error:  # whatever the program raises, the fold has no part in it
        raise NotCounted("torch.export's program raises") from error
    if share > 1:
        raise NotCounted("torch.export's program differs")


def other_inputs(folded: nn.Module, drawn: Drawn) -> Iterator[tuple[Tensor, ...]]:
    """Larger values, of other sizes where the graph has symbols, and of the example's sizes."""
    placeholders = [n for m in graph_modules(folded)[:1] for n in m.graph.nodes if n.op == "placeholder"]
    values = [node.meta.get("val") for node in placeholders]
    seeds = itertools.count(1)

    def normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(next(seeds)), dtype=torch.float64) * 3
        x = x.to(drawn.dtype).double()
        return x if like.is_contiguous() else x.to(memory_format=torch.channels_last)

    def size(x: Tensor, value: Any, axis: int) -> int:
        symbolic = drawn.sizes != "fixed" and (axis == 0 or drawn.sizes == "all")
        if isinstance(value, Tensor) and value.dim() == x.dim():
            symbolic = not isinstance(value.shape[axis], int)
        return x.shape[axis] + symbolic * (2, 0, 3, 1, 2)[axis]

    values += [None] * len(drawn.inputs)
    yield tuple(normal(tuple(size(x, v, a) for a in range(x.dim())), x) for x, v in zip(drawn.inputs, values))  # noqa: B905
    yield tuple(normal(tuple(x.shape), x) for x in drawn.inputs)


def incomplete(report: FoldReport, network: nn.Module, folded: nn.Module, expected: int) -> str:
    """What is wrong with the report, or nothing."""
    total = len(report.folded) + len(report.kept)
    if total != expected:
        return f"{total} BatchNorms are reported, of {expected}"
    left = batch_norm_nodes(folded)
    if left > len(report.kept):
        return f"{left} BatchNorms are left in the graph, {len(report.kept)} are reported as kept"
    # A module that stands in a region too has several paths, of which a report may use any.
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = norms_in(network)
    names = (re.sub(r"@\d+$", "", norm.name) for norm in (*report.folded, *report.kept))
    reported = collections.Counter(modules[name] for name in names if isinstance(modules.get(name), BatchNorm))
    for module, count in reported.items():
        if count > calls[module]:
            return f"{module} is called {calls[module]} times and reported {count} times"
    return ""


def judged(drawn: Drawn, strategy: Strategy, runtime: Runtime) -> Outcome:
    """Fold the network and compare. Raises NotCounted where it says nothing about the fold."""
    subject = copy.deepcopy(drawn.network).to(drawn.dtype).eval()
    reference = copy.deepcopy(subject).double()
    times = 2 if drawn.stateful else 1
    try:
        first = Trial(subject, reference, drawn.inputs, drawn.dtype, times)
    except (RuntimeError, NotImplementedError) as error:
        raise NotCounted("torch does not run it in this dtype") from error
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    example = tuple(x.to(drawn.dtype) for x in drawn.inputs)
    context = f"strategy {strategy}, runtime {runtime}, {drawn.dtype}, sizes {drawn.sizes}"
    features = sorted(drawn.features() | {f"strategy: {strategy}", f"runtime: {runtime}"})
    try:
        folded = export.fold.fold_batchnorm(
            subject, example, dynamic_shapes=drawn.dynamic_shapes, strategy=strategy, runtime=runtime
        )
    except Exception as error:  # none is allowed
        blame(subject, drawn, first if isinstance(error, FoldError) else None)
        return Outcome("exception", f"{type(error).__name__}: {error}\n{context}", features=features)
    account = campaign.account(folded.report)

    def outcome(verdict: str, detail: str = "") -> Outcome:
        return Outcome(verdict, f"{detail}\n{context}", features=features, **account)

    state = subject.state_dict()
    if subject.training or any(not torch.equal(state[name], tensor) for name, tensor in before.items()):
        return outcome("wrong", "folding changed the model")
    if not all(torch.equal(a, b.to(drawn.dtype)) for a, b in zip(example, drawn.inputs, strict=True)):
        return outcome("wrong", "folding changed the example inputs")
    if memory(subject) & memory(folded.module):
        return outcome("wrong", "the folded module shares memory with the model")
    trials = [first]
    for inputs in other_inputs(folded.module, drawn):
        try:
            trials.append(Trial(subject, reference, inputs, drawn.dtype, times))
        except (NotCounted, RuntimeError, NotImplementedError):  # sizes that the network itself does not take
            continue
    for trial in trials:
        sizes = ", ".join(str(tuple(x.shape)) for x in trial.inputs)
        try:
            share, error = trial.worst(folded.module)
        except Exception as raised:  # the original ran
            blame(subject, drawn, trial)
            return outcome("exception", f"the folded module raises {type(raised).__name__}: {raised}\nat {sizes}")
        if share > 1:
            blame(subject, drawn, trial)
            changed = ", of which an input left changed is a part" if not inputs_agree(trial, folded.module) else ""
            return outcome("wrong", f"error {error:.1e}, {share:.1e} × what is allowed{changed}\nat {sizes}")
    expected = norms_in(subject).total()
    problem = incomplete(folded.report, subject, folded.module, expected)
    if problem:
        # torch.export drops what nothing reads.
        problem = incomplete(folded.report, subject, folded.module, batch_norm_nodes(exported(subject, drawn)))
    return outcome("report", problem) if problem else outcome("right")


def inputs_agree(trial: Trial, module: nn.Module) -> bool:
    count = len(trial.inputs)
    wanted, found = trial.wanted[-count:], run(module, trial.inputs, trial.times)[-count:]
    return max(errors(wanted, found)) <= max(trial.limits[-count:])


def case(draw: Draw) -> tuple[Drawn, Strategy, Runtime, Outcome]:
    """The first network drawn that counts."""
    choose, strategies = Chooser(draw), get_args(Strategy)
    passed_over: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of much that such networks do
        while True:
            strategy: Strategy = choose.pick(["auto"] * 3 + list(strategies))
            runtime: Runtime = choose.pick(get_args(Runtime))
            drawn = draw_network(draw)
            try:
                outcome = judged(drawn, strategy, runtime)
            except NotCounted as reason:
                passed_over[str(reason)] += 1
                continue
            outcome.passed_over = dict(passed_over)
            return drawn, strategy, runtime, outcome


def check(seed: int) -> Outcome:
    return case(random.Random(seed).randint)[-1]


def show(seed: int, reduce: bool) -> None:
    drawn, strategy, runtime, outcome = case(random.Random(seed).randint)
    if reduce and outcome.verdict != "right":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn, outcome = campaign.reduced(
                drawn, outcome, without, lambda smaller: judged(smaller, strategy, runtime)
            )
    shapes = ", ".join(str(tuple(x.shape)) for x in drawn.inputs)
    campaign.print_case(f"inputs: {shapes}\n{drawn.network.listing()}", outcome)


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    outcome = check(seed)
    assert outcome.verdict == "right", outcome.detail


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_networks_that_hypothesis_draws(data: st.DataObject) -> None:
    """It cuts down what fails by itself."""
    outcome = case(lambda low, high: data.draw(st.integers(low, high)))[-1]
    assert outcome.verdict == "right", outcome.detail


def one_weight_off(folded: Folded) -> Folded:
    for weight in folded.module.parameters():
        if weight.dtype == torch.float64:
            weight.data.view(-1)[0] += 1e-6
            break
    return folded


def not_a_number(folded: Folded) -> Folded:
    for weight in folded.module.parameters():
        weight.data.view(-1)[0] = math.nan
        break
    return folded


def one_unreported(folded: Folded) -> Folded:
    report = folded.report
    less = {"kept": report.kept[1:]} if report.kept else {"folded": report.folded[1:]}
    return dataclasses.replace(folded, report=report.model_copy(update=less))


def one_twice(folded: Folded) -> Folded:
    report = folded.report
    more = {"kept": report.kept[:1] * 2 + report.kept[2:]} if len(report.kept) > 1 else {"kept": report.kept * 2}
    return dataclasses.replace(folded, report=report.model_copy(update=more))


def nothing_in_place(folded: Folded) -> Folded:
    """As a fold would that takes what is written in place for a fresh value."""
    for module in graph_modules(folded.module):
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_"):
                name, overload = node.target._schema.name.removeprefix("aten::")[:-1], node.target._overloadname
                twin = getattr(torch.ops.aten, name, None)
                if twin is not None and overload in twin.overloads():
                    node.target = getattr(twin, overload)
        module.recompile()
    return folded


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (one_weight_off, "wrong"),
        (not_a_number, "wrong"),
        (nothing_in_place, "wrong"),
        (one_unreported, "report"),
        (one_twice, "report"),
    ],
)
def test_the_check_sees(spoil: Callable[[Folded], Folded], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = export.fold.fold_batchnorm
    monkeypatch.setattr(export.fold, "fold_batchnorm", lambda *args, **options: spoil(fold(*args, **options)))
    assert any(check(seed).verdict == verdict for seed in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_networks(block: int) -> None:
    outcomes = {seed: campaign.checked(check, seed) for seed in range(100 * block + 1000, 100 * block + 1100)}
    assert not {seed: outcome.detail for seed, outcome in outcomes.items() if outcome.verdict != "right"}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are small
    sys.exit(campaign.main(__file__, check, show, "networks"))

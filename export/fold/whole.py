"""The whole network, folded against unfolded: the last word, and what happens when it is no.

Owns how a wrong result is traced to the fold that makes it, and how two modules are compared. Each fold was held to
1e-9 in float64 by itself before; what only shows in the whole is what the graph does not say.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from export.fold.errors import FoldError
from export.fold.report import FoldReport
from export.fold.search import Limits, relative

T = TypeVar("T")

MOST_RETRIES = 8
"""So many folds are found to break the whole, one after another, before nothing is folded at all."""

QUICK = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative differences that need no second look. In 315 random float32 networks rounding came to 5.3e-6 at most; where
it comes to more, and in the coarser dtypes, float64 decides whose fault that is."""

AS_GOOD = 8.0
"""By this factor may the folded network be further from float64's truth than the unfolded one is: both are one sample
of rounding noise. In the same 315 networks the ratio was 0.96 in the median and below 2.6 in 99 %."""


def until_right(
    attempt: Callable[[Limits], T], problem: Callable[[T], str | None], report: Callable[[T], FoldReport]
) -> T:
    """Fold, look at the whole, and where it is wrong do it again without the fold that makes it so.

    `attempt` folds anew within limits; `problem` says what is wrong with the result, or None; `report` is its report.
    Raises FoldError where the network is wrong although nothing is folded.
    """
    skip: dict[str, str] = {}
    for _ in range(MOST_RETRIES):
        result = attempt(Limits(skip))
        wrong = problem(result)
        if wrong is None:
            return result
        right, too_many = 0, _names(report(result)).total()
        if too_many == 0:
            break
        while too_many - right > 1:
            middle = (right + too_many) // 2
            if problem(attempt(Limits(skip, middle))) is None:
                right = middle
            else:
                too_many = middle
        before, after = (_names(report(attempt(Limits(skip, count)))) for count in (right, too_many))
        skip |= dict.fromkeys(after - before, f"folded, {wrong}, so it was undone")
    result = attempt(Limits(skip, 0))
    wrong = problem(result)
    if wrong is not None:
        raise FoldError(
            f"Even with nothing folded {wrong}. The network can't be written again as it is: report this model."
        )
    return result


def _names(report: FoldReport) -> Counter[str]:
    """Of everything that was folded; a module that is used twice counts twice."""
    return Counter(norm.name for norm in (*report.folded, *report.simplified))


def difference(
    model: nn.Module,
    folded: nn.Module,
    inputs: tuple[Any, ...],
    state: Sequence[torch.Tensor] = (),
    folded_state: Sequence[torch.Tensor] = (),
) -> str | None:
    """What is wrong with `folded`, on random inputs like `inputs`, or None.

    Both get copies of their own, and must leave them alike. `state` and `folded_state` are tensors of the two that a
    call changes; they are put back.
    """
    sample = _random_like(inputs)
    try:
        wanted = _results(model, sample, state)
    except Exception:  # random numbers may be no input for it; the example is
        sample = inputs
        wanted = _results(model, sample, state)
    try:
        found = _results(folded, sample, folded_state)
    except Exception as raised:  # whatever a wrong graph may raise
        return f"the network raises {type(raised).__name__}: {' '.join(str(raised).split())[:120]}"
    error = _error(found, wanted)
    dtype = _coarsest(model, wanted)
    if error <= QUICK.get(dtype, 0.0):
        return None
    if dtype == torch.float64:
        return f"the network's results differ by {error:.1e} (relative, float64)"
    try:
        exact = copy.deepcopy(model).double()
        truth = _results(exact, pytree.tree_map(_to_double, sample), ())
    except Exception:  # it does not run in float64: its own dtype has to do
        own = 0.0
    else:
        own, error = _error(wanted, truth), _error(found, truth)
    allowed = AS_GOOD * own + 64 * torch.finfo(dtype).eps
    if error <= allowed:
        return None
    return f"the network's results are off by {error:.1e} (relative); unfolded, {dtype} makes {own:.1e} of it"


def _random_like(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        return torch.empty_like(x).copy_(noise)  # with its strides: what is a view of what may depend on them

    return tuple(pytree.tree_map(drawn, inputs))


def _to_double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _results(module: nn.Module, inputs: tuple[Any, ...], state: Sequence[torch.Tensor]) -> list[Any]:
    """What the module returns for copies of the inputs, and what it leaves of them."""
    saved = [tensor.detach().clone() for tensor in state]
    own = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = module(*own)
    finally:
        with torch.no_grad():
            for tensor, former in zip(state, saved, strict=True):
                tensor.copy_(former)
    return [leaf for leaf in pytree.tree_leaves((result, own)) if isinstance(leaf, torch.Tensor)]


def _error(found: list[Any], wanted: list[Any]) -> float:
    if len(found) != len(wanted):
        return float("inf")
    errors = [0.0]
    for one, other in zip(found, wanted, strict=True):
        if other.is_floating_point() and one.is_floating_point():
            errors.append(relative(one.double(), other.double()))
        else:
            errors.append(0.0 if torch.equal(one, other) else float("inf"))
    return max(errors)


def _coarsest(model: nn.Module, results: list[Any]) -> torch.dtype:
    tensors = [*model.parameters(), *model.buffers(), *results]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

"""What float64 hides: overflow in half precision, NaN, and means a thousand times larger than what varies around them.

A fold is exact in real numbers. In the dtype that the network runs in it was not: float16 weights overflowed and NaN
was reported as a difference of 0, and statistics of 10,000 standard deviations cost float32 all but three digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Net, conv, fold_exactly, image
from networks import enliven
from torch import Tensor, nn

from export.fold import Folded, FoldError, fold_batchnorm

IMAGE = image(3, 4, 5, 7)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value; infinite where NaN or infinity stands."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    return error if error == error else float("inf")


def fold_no_worse(model: nn.Module, x: Tensor, **options: object) -> Folded:
    """Fold, in the dtype of `x`, and be no further from float64 than four times the unfolded model, or some digits."""
    folded = fold_batchnorm(model, (x,), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
        unfolded, found = model(x), folded.module(x)
    assert torch.isfinite(unfolded).all()
    assert torch.isfinite(found).all(), folded.report
    assert found.dtype == unfolded.dtype
    assert difference(found, oracle) <= 4 * difference(unfolded, oracle) + 8 * torch.finfo(x.dtype).eps, folded.report
    assert len(folded.report.folded) + len(folded.report.kept) == 1
    return folded


def block(*layers: nn.Module) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*copy.deepcopy(layers))

    return make


PLACES: dict[str, Callable[[], nn.Module]] = {
    "after a convolution": block(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU()),
    "after average pooling": block(conv(4, 6), nn.AvgPool2d(2), nn.BatchNorm2d(6)),
    "before 1x1": block(nn.BatchNorm2d(4), conv(4, 6, 1)),
    "before Linear": block(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(140, 6)),
    "before a border": block(nn.BatchNorm2d(4), conv(4, 6)),
    "between layers": block(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5)),
    "at the output": block(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6)),
}

STRATEGIES = ["auto", "ones", "bias-map", "floor"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_costs_no_more_than_it_did(place: str, dtype: torch.dtype) -> None:
    for strategy in STRATEGIES:
        fold_no_worse(enliven(PLACES[place](), IMAGE).to(dtype), IMAGE.to(dtype), strategy=strategy)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_overflows_in_half_precision_stays(place: str, strategy: str) -> None:
    """Weights of one, small signals, large scales: all that float16 computes is finite, and a scaled weight is not."""
    model = PLACES[place]()
    x = IMAGE * 1e-3
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)
    enliven(model, x)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var.fill_(1e-6)  # type: ignore[union-attr]
    norm.weight.data.mul_(1000)
    norm.bias.data.mul_(0.01)
    fold_no_worse(model.half(), x.half(), strategy=strategy)


@pytest.mark.parametrize("place", PLACES)
def test_what_overflows_in_single_precision_stays(place: str) -> None:
    """Weights of 1e15 and scales of 1e30, which meet in nothing that the unfolded network computes."""
    model = enliven(PLACES[place](), IMAGE)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(1e15)
            module.bias.data.zero_()  # type: ignore[union-attr]
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # type: ignore[union-attr]
            module.running_var.fill_(1e-10)  # type: ignore[union-attr]
            module.eps = 1e-12
            module.weight.data.fill_(1e25)
            module.bias.data.zero_()
    fold_no_worse(model.float(), IMAGE.float() * 1e-30)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mean_of_ten_thousand_deviations(place: str, strategy: str) -> None:
    """BatchNorm subtracts first, and what is left is exact; folded, two sums of 10,000 cancel: 1.5e-3 in float32."""
    x = IMAGE + 10_000
    fold_no_worse(enliven(PLACES[place](), x).float(), x.float(), strategy=strategy)


@pytest.mark.parametrize("spoil", ["variance", "mean", "gamma"])
def test_nan_is_no_difference_of_zero(spoil: str) -> None:
    """A network that gives NaN is refused, or keeps its BatchNorm, with the reason: nothing was shown to be exact."""
    model = enliven(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)), IMAGE)
    norm = model[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    if spoil == "variance":
        norm.running_var[2] = -1  # type: ignore[index]
    else:
        (norm.running_mean if spoil == "mean" else norm.weight.data)[2] = float("nan")  # type: ignore[index]
    try:
        folded = fold_batchnorm(model, (IMAGE,))
    except FoldError:
        return
    assert not folded.report.folded
    assert [norm.name for norm in folded.report.kept] == ["1"]


def test_scales_of_zero_variance_are_no_infinity_in_disguise() -> None:
    """eps 0 and a dead channel: a scale of infinity."""
    model = enliven(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6, eps=0.0)), IMAGE)
    model[1].running_var[2] = 0  # type: ignore[index,union-attr]
    try:
        folded = fold_batchnorm(model, (IMAGE,))
    except FoldError:
        return
    assert not folded.report.folded


INFINITE: dict[str, Callable[[Net, Tensor], object]] = {
    "a root of what is negative": lambda m, x: m.c(m.n(m.a(x).sqrt())),
    "a logarithm of zeros": lambda m, x: m.n(m.a(x)).relu().log(),
    "an output filled with -inf": lambda m, x: m.c(m.n(m.a(x).relu())).masked_fill(x[:, :1] > 0, -torch.inf),
    "padding with -inf": lambda m, x: m.c(
        F.max_pool2d(F.pad(m.n(m.a(x).relu()), (1, 1, 1, 1), value=-torch.inf), 3, 2)
    ),
    "0 / 0": lambda m, x: (y := m.n(m.a(x)).relu()) / y,
}


@pytest.mark.parametrize("program", INFINITE)
def test_infinity_and_nan_stand_where_they_stood(program: str) -> None:
    """They are no reason to refuse: what is finite is held to the model, and the rest must be the same."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(4, 6), n=nn.BatchNorm2d(6), c=conv(6, 5))
    enliven(model, IMAGE)
    model.body = INFINITE[program]
    for strategy in STRATEGIES:
        fold_exactly(model, IMAGE, strategy=strategy)


class Attention(nn.Module):
    """A mask of infinities as a buffer, as decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.l = conv(4, 6), nn.BatchNorm2d(6), nn.Linear(7, 7)
        self.register_buffer("mask", torch.full((5, 7), -torch.inf, dtype=torch.float64).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.l(self.n(self.a(x))) + self.mask, -1)


def test_a_mask_of_infinities_is_no_broken_weight() -> None:
    torch.manual_seed(0)
    folded = fold_exactly(enliven(Attention(), IMAGE), IMAGE)
    assert not folded.report.kept


def test_weights_that_are_not_finite_are_refused() -> None:
    model = enliven(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)), IMAGE)
    model[0].weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(FoldError, match="weight"):
        fold_batchnorm(model, (IMAGE,))

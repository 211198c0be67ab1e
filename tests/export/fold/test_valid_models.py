"""Models that are in order, and that folding refused or broke off at with an exception.

Sizes in arithmetic, operations that are not torch's own, pools on values of another rank, chains deeper than Python's
stack. A model passes when it folds without an exception, right, and with each BatchNorm in the report; what must stay
stays.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Net, Program, assert_all_folded, conv, fold_exactly, image, net
from networks import enliven
from torch import Tensor, export, nn
from torch.nn.utils import parametrizations

from export.fold import FoldError, fold_batchnorm

IMAGE = image(3, 4, 5, 7)
WAVE = image(3, 4, 16)

# -- sizes in arithmetic ---------------------------------------------------------------------------------------------

SIZES: dict[str, Program] = {
    "arange of the batch": lambda m, x: m.c(m.n(F.relu(m.a(x)))) + torch.arange(x.shape[0]).view(-1, 1, 1, 1),
    "plus the batch": lambda m, x: m.n(F.relu(m.a(x))) + x.shape[0],
    "the batch plus": lambda m, x: x.shape[0] + m.n(F.relu(m.a(x))),
    "the batch minus": lambda m, x: x.shape[0] - m.n(F.relu(m.a(x))),
    "plus in place": lambda m, x: m.n(F.relu(m.a(x))).add_(x.shape[0]),
    "times, divided by": lambda m, x: m.n(m.a(x)) * x.shape[0] / x.shape[0],
    "between the layer and the norm": lambda m, x: m.n(m.a(x) + x.shape[0]).relu(),
    "between the norm and the layer": lambda m, x: m.c(m.n(m.a(x).relu()) * x.shape[0]),
    "ones of a size": lambda m, x: m.n(m.a(x)) + torch.ones(x.shape[0], 1, 1, 1, dtype=x.dtype),
    "sizes added": lambda m, x: m.n(m.a(x)).reshape(x.shape[0] + 0, -1).sum(1) / (x.shape[0] + x.shape[1]),
    "a size of channels": lambda m, x: (y := m.n(m.a(x).relu())) / y.shape[1],
    "a mean by hand": lambda m, x: m.n(m.a(x)).sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "sizes returned": lambda m, x: (m.n(m.a(x)), x.shape[0]),
    "positions appended": lambda m, x: m.c(
        torch.cat([m.n(m.a(x))[:, :5], torch.arange(x.shape[0]).to(x).view(-1, 1, 1, 1).expand(-1, 1, 5, 7)], 1)
    ),
    "a batch that depends on the data": lambda m, x: (m.n(m.a(x)), x.nonzero()),
}


@pytest.mark.parametrize("program", SIZES)
def test_sizes_in_arithmetic(program: str) -> None:
    """A size where a tensor was expected: `SymInt` has no shape."""
    fold_exactly(enliven(net(SIZES[program]), IMAGE), IMAGE)


def chosen(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y[y.flatten(1).sum(1) > -1e9]
    torch._check(y.shape[0] >= 1)
    return m.k(m.n(y))


def test_norms_of_a_batch_that_depends_on_the_data() -> None:
    """No size is known there, not even in the example."""
    fold_exactly(enliven(net(chosen, k=nn.BatchNorm2d(6)), IMAGE), IMAGE)


class Inception(nn.Module):
    """inception_v3's stem, a padded average pool beside convolutions, and a reduction by two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.unit(4, 6, 3, stride=2)
        self.one, self.pooled = self.unit(6, 4, 1), self.unit(6, 4, 1)
        self.wide = nn.Sequential(self.unit(6, 4, (1, 7), padding=(0, 3)), self.unit(4, 4, (7, 1), padding=(3, 0)))
        self.down, self.last = self.unit(12, 6, 3, stride=2), self.unit(18, 5, 1)

    @staticmethod
    def unit(i: int, o: int, k: object, **options: object) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, k, bias=False, **options), nn.BatchNorm2d(o, eps=0.001), nn.ReLU(True))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.wide(x), self.pooled(F.avg_pool2d(x, 3, 1, 1))], 1)
        return self.last(torch.cat([self.down(x), F.max_pool2d(x, 3, 2)], 1)).mean((2, 3))


@pytest.mark.parametrize("how", ["any", "named"])
def test_inception_of_any_size(how: str) -> None:
    torch.manual_seed(0)
    example = image(2, 4, 19, 21)
    dim = export.Dim
    height, width = (dim.AUTO, dim.AUTO) if how == "any" else (dim("height", min=15), dim("width", min=15))
    options: dict[str, Any] = {"dynamic_shapes": ({0: dim("batch"), 2: height, 3: width},)}
    model = enliven(Inception(), example)
    assert_all_folded(fold_exactly(model, example, others=[(image(2, 4, 24, 31),)], **options))


# -- operations that are not torch's own -----------------------------------------------------------------------------


@torch.library.custom_op("fold_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("fold_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :3] * 1, x[:, 3:] * 1


@torch.library.custom_op("fold_tests::grow", mutates_args=("x",))
def grow(x: Tensor) -> None:
    x.mul_(2)


double.register_fake(lambda x: torch.empty_like(x))
halves.register_fake(lambda x: (torch.empty_like(x[:, :3]), torch.empty_like(x[:, 3:])))
grow.register_fake(lambda x: None)


def grown(m: Net, x: Tensor) -> Tensor:
    """It writes into what the BatchNorm has read."""
    y = m.a(x)
    h = m.n(y)
    grow(y)
    return m.k(m.c(h)) + y


FOREIGN: dict[str, Program] = {
    "before two norms": lambda m, x: m.k(m.n(double(m.a(x)))),
    "before two norms and a layer": lambda m, x: m.c(m.k(m.n(double(m.a(x))))),
    "after two norms": lambda m, x: double(m.k(m.n(m.a(x).relu()))),
    "between two norms": lambda m, x: m.c(m.k(double(m.n(m.a(x))))),
    "of two results": lambda m, x: m.k(m.n(torch.cat(halves(m.a(x))[::-1], 1))),
    "in place": grown,
    "softmax before two norms": lambda m, x: m.k(m.n(m.a(x).softmax(1))),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_operations_that_are_unknown(program: str) -> None:
    """A refusal outside of what catches refusals; and one that writes into its argument is an alias like others."""
    fold_exactly(enliven(net(FOREIGN[program], k=nn.BatchNorm2d(6)), IMAGE.clone()), IMAGE)


# -- pools on values of another rank ---------------------------------------------------------------------------------

POOLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, 8)), 2),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((2, 8)), 2),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), 3),
    "AvgPool2d, the same size": (lambda: nn.AvgPool2d(3, 1, 1), 6),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), 3),
    "MaxPool2d, the same size": (lambda: nn.MaxPool2d(3, 1, 1), 6),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), 3),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), 8),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), 8),
    "Upsample": (lambda: nn.Upsample(scale_factor=2.0), 6),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_of_images_on_a_value_of_rank_three(pool: str) -> None:
    """It takes the batch for the channels, and the channels for rows."""
    make, channels = POOLS[pool]
    torch.manual_seed(0)
    first = [nn.Conv1d(4, 6, 3, padding=1), nn.ReLU()]
    before = nn.Sequential(*first, nn.BatchNorm1d(6), make(), nn.Conv1d(channels, 3, 1))
    fold_exactly(enliven(before, WAVE), WAVE)
    after = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), make(), nn.BatchNorm1d(channels), nn.ReLU())
    fold_exactly(enliven(after, WAVE), WAVE)


# -- layers that compute their weights, and normalisations that are not BatchNorm ------------------------------------


class Standardised(nn.Conv2d):
    """A convolution that normalises its weights, by `batch_norm` in training mode, as ResNet-v2 of BiT does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


OTHERS: dict[str, Callable[[], list[nn.Module]]] = {
    "weight_norm": lambda: [parametrizations.weight_norm(conv(4, 6))],
    "spectral_norm": lambda: [parametrizations.spectral_norm(conv(4, 6))],
    "InstanceNorm with statistics": lambda: [
        conv(4, 6),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.ReLU(),
    ],
    "InstanceNorm": lambda: [conv(4, 6), nn.InstanceNorm2d(6)],
    "GroupNorm": lambda: [conv(4, 6), nn.GroupNorm(2, 6)],
    "LocalResponseNorm": lambda: [conv(4, 6), nn.LocalResponseNorm(3)],
}


@pytest.mark.parametrize("others", OTHERS)
def test_beside_other_normalisations(others: str) -> None:
    torch.manual_seed(0)
    layers = OTHERS[others]()
    at = str(len(layers))
    fold_exactly(enliven(nn.Sequential(*layers, nn.BatchNorm2d(6), conv(6, 5)), IMAGE), IMAGE, norms=[at])


def test_a_batch_norm_of_weights() -> None:
    """It is no BatchNorm of the network's: its input is a constant. Whether it is reported or computed away is open."""
    torch.manual_seed(0)
    model = enliven(nn.Sequential(Standardised(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()), IMAGE)
    names = [
        norm.name for part in (lambda r: (r.folded, r.kept))(fold_batchnorm(model, (IMAGE,)).report) for norm in part
    ]
    assert names.count("1") == 1
    fold_exactly(model, IMAGE, norms=names)


# -- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["after", "before", "between"])
def test_a_chain_longer_than_the_stack(place: str) -> None:
    """1,200 operations that change nothing were a RecursionError; here 250, and less stack to go with them."""
    chain = [nn.Dropout() for _ in range(250)]
    first, last = conv(4, 6), conv(6, 5)
    layers = {
        "after": [first, *chain, nn.BatchNorm2d(6), nn.ReLU()],
        "before": [nn.Sigmoid(), nn.BatchNorm2d(4), *chain, conv(4, 6, 1)],
        "between": [first, nn.SiLU(), nn.BatchNorm2d(6), *chain, last],
    }[place]
    torch.manual_seed(0)
    model = enliven(nn.Sequential(*layers), IMAGE)
    fold_batchnorm(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)).eval().double(), (IMAGE,))  # what is imported late is
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 220)
    try:
        folded = fold_batchnorm(model, (IMAGE,))
    finally:
        sys.setrecursionlimit(limit)
    assert_all_folded(folded)


# -- and models that are not in order ----------------------------------------------------------------------------------


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(FoldError, match="eval"):
        fold_batchnorm(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)), (IMAGE,))
    branching = Net(lambda m, x: m.n(x) if x.sum() > 0 else x, n=nn.BatchNorm2d(4)).eval().double()
    with pytest.raises(FoldError, match=r"torch\.export"):
        fold_batchnorm(branching, (IMAGE,))
    with pytest.raises(FoldError):
        fold_batchnorm(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)).eval().double(), (image(3, 5, 5, 7),))

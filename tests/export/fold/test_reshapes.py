"""Reshapes: those that leave no place for one more channel, and those behind which a BatchNorm could go on and did not.

A channel of ones went through `reshape(b, 6, -1)`, which names the six channels: the folded module then failed on every
call. And BatchNorms stayed wherever a layer writes its channels last, or the flattening names its width and not the
batch: LeViT's and token networks', decoders' that start from a Linear, Keras' flatten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Net, assert_all_folded, conv, fold_exactly, image
from networks import enliven
from torch import Tensor, nn

IMAGE = image(3, 4, 5, 7)
TOKENS = image(3, 7, 4)
CODE = image(3, 5)
WAVE = image(3, 4, 12)

Program = Callable[[Net, Tensor], Tensor]


def net(program: Program, x: Tensor, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in modules.values():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return enliven(Net(program, **modules), x)


# -- a channel more has no place -------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape(b, 6, -1)": lambda y: y.reshape(y.shape[0], 6, -1),
    "reshape(b, c, h * w)": lambda y: y.reshape(y.shape[0], y.shape[1], y.shape[2] * y.shape[3]),
    "view(*shape)": lambda y: y.view(*y.shape[:2], y.shape[2] * y.shape[3]),
    "view(-1, 6, 35)": lambda y: y.view(-1, 6, 35),
    "flatten(2)": lambda y: y.flatten(2),
    "unflatten, flatten": lambda y: y.unflatten(1, (2, 3)).flatten(1, 2).flatten(2),
}


@pytest.mark.parametrize("strategy", ["auto", "ones"])
@pytest.mark.parametrize("late", [False, True], ids=["before the norm", "after the norm"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_channels_that_a_reshape_names(spelling: str, late: bool, strategy: str) -> None:
    """Before a Conv1d with a border, where `ones` is among the ways."""
    reshape = SPELLINGS[spelling]
    if late:
        layers = {"a": conv(4, 6), "n": nn.BatchNorm2d(6), "c": nn.Conv1d(6, 5, 3, padding=1)}
        model = net(lambda m, x: m.c(reshape(m.n(F.relu(m.a(x))))), IMAGE, **layers)
    else:
        layers = {"a": conv(4, 6), "n": nn.BatchNorm1d(6), "c": nn.Conv1d(6, 5, 3, padding=1)}
        model = net(lambda m, x: m.c(m.n(reshape(F.relu(m.a(x))))), IMAGE, **layers)
    fold_exactly(model, IMAGE, strategy=strategy)


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(y.shape[0], 6, 5, 7),
    "view(-1, ...)": lambda y: y.view(-1, 6, 5, 7),
    "reshape": lambda y: y.reshape(y.shape),
    "reshape of the fixed": lambda y: y.reshape(y.shape[0], *[6, 5, 7]),
    "expand": lambda y: y.expand(y.shape[0], 6, 5, 7),
    "two views": lambda y: y.view(y.shape[0], 2, 3, 35).view(y.shape[0], 6, 5, 7),
}
"""To the size that the value has already, which is not the identity of one channel more."""


@pytest.mark.parametrize("strategy", ["auto", "ones"])
@pytest.mark.parametrize("spelling", SAME)
def test_a_reshape_to_the_same_size_names_the_channels_too(spelling: str, strategy: str) -> None:
    layers: dict[str, nn.Module] = {"a": conv(4, 6), "n": nn.BatchNorm2d(6), "c": conv(6, 5)}
    for program in (
        lambda m, x: m.c(m.n(SAME[spelling](F.relu(m.a(x))))),
        lambda m, x: m.c(SAME[spelling](m.n(F.relu(m.a(x))))),
    ):
        fold_exactly(net(program, IMAGE, **layers), IMAGE, strategy=strategy)


# -- flattening before a Linear --------------------------------------------------------------------------------------

FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "view(-1, K)": lambda y: y.view(-1, 140),
    "reshape(-1, K)": lambda y: y.reshape(-1, 140),
    "reshape(b, K)": lambda y: y.reshape(y.shape[0], 140),
    "view(b, c * h * w)": lambda y: y.view(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3]),
    "pool, squeeze": lambda y: F.pad(y.mean((2, 3), keepdim=True).squeeze(3).squeeze(2), (0, 136)),
    "flatten twice": lambda y: y.flatten(2).flatten(1),
    "channels last, flatten(1)": lambda y: y.permute(0, 2, 3, 1).flatten(1),
    "channels last, reshape(b, -1)": lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], -1),
    "channels last, reshape(-1, K)": lambda y: y.permute(0, 2, 3, 1).reshape(-1, 140),
    "channels last, contiguous, view": lambda y: y.permute(0, 2, 3, 1).contiguous().view(y.shape[0], -1),
    "movedim, flatten": lambda y: y.movedim(1, -1).flatten(1),
    "rows and columns change places": lambda y: y.transpose(2, 3).flatten(1),
}
FOLDED_THROUGH = [name for name in FLATTENINGS if name != "pool, squeeze"]


@pytest.mark.parametrize("flattening", FOLDED_THROUGH)
@pytest.mark.parametrize("batch", ["any", "fixed"])
def test_before_a_linear_through_a_flattening(flattening: str, batch: str) -> None:
    """`view(-1, K)` with a batch of any size, and Keras' order, each channel's positions far apart."""
    options: dict[str, Any] = {}
    if batch == "fixed":
        options = {"dynamic_shapes": ({},), "batches": False}
    model = net(
        lambda m, x: m.l(FLATTENINGS[flattening](m.n(torch.sigmoid(x)))),
        IMAGE,
        n=nn.BatchNorm2d(4),
        l=nn.Linear(140, 3),
    )
    assert_all_folded(fold_exactly(model, IMAGE, **options))


@pytest.mark.parametrize("flattening", FLATTENINGS)
def test_after_a_layer_through_a_flattening(flattening: str) -> None:
    """Each position has a scale of its own there, so nothing but a fold into what comes after can be right."""
    model = net(
        lambda m, x: m.l(m.n(FLATTENINGS[flattening](m.a(x)))).relu(),
        IMAGE,
        a=conv(4, 4),
        n=nn.BatchNorm1d(140),
        l=nn.Linear(140, 3),
    )
    fold_exactly(model, IMAGE)


# -- layers that write their channels last ---------------------------------------------------------------------------

LAST: dict[str, tuple[Program, Tensor, dict[str, Callable[[], nn.Module]]]] = {
    "LeViT: flatten(0, 1), norm, reshape_as": (
        lambda m, x: m.n((y := m.l(x)).flatten(0, 1)).reshape_as(y).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6, bias=False), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "flatten(0, 1), norm, view": (
        lambda m, x: m.n(m.l(x).flatten(0, 1)).view(x.shape[0], x.shape[1], 6).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "view(-1, C), norm, view": (
        lambda m, x: m.n(m.l(x).view(-1, 6)).view(x.shape[0], -1, 6).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "tokens: transpose, norm": (
        lambda m, x: m.n(m.l(x).transpose(1, 2)).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "tokens: transpose, norm, transpose": (
        lambda m, x: m.n(m.l(x).transpose(1, 2)).transpose(1, 2).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "tokens: transpose, norm, transpose, Linear": (
        lambda m, x: m.k(m.n(m.l(x).relu().transpose(1, 2)).transpose(1, 2)),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6), "k": lambda: nn.Linear(6, 3)},
    ),
    "tokens: norm on the input": (
        lambda m, x: m.l(m.n(x.transpose(1, 2)).transpose(1, 2)),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(4)},
    ),
    "channels last: permute, norm, permute": (
        lambda m, x: m.n(m.l(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).relu(),
        IMAGE,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm2d(6)},
    ),
    "channels last: norm, permute, Linear": (
        lambda m, x: m.l(m.n(x).permute(0, 2, 3, 1)),
        IMAGE,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm2d(4)},
    ),
    "image tokens: flatten, transpose, norm": (
        lambda m, x: m.n(m.a(x).flatten(2)).transpose(1, 2).relu(),
        IMAGE,
        {"a": lambda: conv(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "decoder: Linear, view, norm": (
        lambda m, x: m.n(m.l(x).view(x.shape[0], 6, 2, 3)).relu(),
        CODE,
        {"l": lambda: nn.Linear(5, 36), "n": lambda: nn.BatchNorm2d(6)},
    ),
    "decoder: Linear, view(-1, ...), norm": (
        lambda m, x: m.c(m.n(m.l(x).view(-1, 6, 2, 3)).relu()),
        CODE,
        {"l": lambda: nn.Linear(5, 36), "n": lambda: nn.BatchNorm2d(6), "c": lambda: nn.ConvTranspose2d(6, 3, 2, 2)},
    ),
    "decoder: Linear, unflatten, norm": (
        lambda m, x: m.n(m.l(x).unflatten(1, (6, 2, 3))).relu(),
        CODE,
        {"l": lambda: nn.Linear(5, 36), "n": lambda: nn.BatchNorm2d(6)},
    ),
    "decoder: Linear, [..., None, None], norm": (
        lambda m, x: m.n(m.l(x)[..., None, None]).relu(),
        CODE,
        {"l": lambda: nn.Linear(5, 6), "n": lambda: nn.BatchNorm2d(6)},
    ),
    "decoder: Linear, norm, view, convolution": (
        lambda m, x: m.c(m.n(m.l(x)).view(x.shape[0], 6, 2, 3).relu()),
        CODE,
        {"l": lambda: nn.Linear(5, 36), "n": lambda: nn.BatchNorm1d(36), "c": lambda: conv(6, 3)},
    ),
    "squeezed: Conv1d, squeeze, norm, unsqueeze": (
        lambda m, x: m.n(m.a(x).squeeze(2)).unsqueeze(2).relu(),
        WAVE,
        {"a": lambda: nn.Conv1d(4, 6, 12), "n": lambda: nn.BatchNorm1d(6)},
    ),
    "excited: mean, Linear, norm": (
        lambda m, x: x * torch.sigmoid(m.n(m.l(x.mean((2, 3))))).view(x.shape[0], 4, 1, 1),
        IMAGE,
        {"l": lambda: nn.Linear(4, 4), "n": lambda: nn.BatchNorm1d(4)},
    ),
}


@pytest.mark.parametrize("case", LAST)
def test_channels_written_last(case: str) -> None:
    program, x, modules = LAST[case]
    torch.manual_seed(0)
    model = enliven(Net(program, **{name: make() for name, make in modules.items()}), x)
    assert_all_folded(fold_exactly(model, x))


MIXED: dict[str, tuple[Program, Tensor, dict[str, Callable[[], nn.Module]]]] = {
    "a norm over the tokens": (
        lambda m, x: m.n(m.l(x)).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(7)},
    ),
    "a norm over rows": (
        lambda m, x: m.n(m.a(x).transpose(1, 2)).relu(),
        IMAGE,
        {"a": lambda: conv(4, 6), "n": lambda: nn.BatchNorm2d(5)},
    ),
    "flatten(0, 1) of images": (
        lambda m, x: m.n(m.a(x).flatten(0, 1)).relu(),
        IMAGE,
        {"a": lambda: conv(4, 6), "n": lambda: nn.BatchNorm1d(5)},
    ),
    "a view that mixes channels and rows": (
        lambda m, x: m.n(m.a(x).view(x.shape[0], 10, 3, 7)).relu(),
        IMAGE,
        {"a": lambda: conv(4, 6), "n": lambda: nn.BatchNorm2d(10)},
    ),
    "heads: view(b, n, 2, 3), norm over two": (
        lambda m, x: m.n(m.l(x).view(x.shape[0], 7, 2, 3).transpose(1, 2)).relu(),
        TOKENS,
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm2d(2)},
    ),
    "pixel shuffle": (
        lambda m, x: m.n(F.pixel_shuffle(m.a(x), 2)).relu(),
        IMAGE,
        {"a": lambda: conv(4, 12), "n": lambda: nn.BatchNorm2d(3)},
    ),
    "a square, transposed": (
        lambda m, x: m.n(m.l(x).transpose(1, 2)).relu(),
        image(3, 6, 4),
        {"l": lambda: nn.Linear(4, 6), "n": lambda: nn.BatchNorm1d(6)},
    ),
}
"""Where the BatchNorm's channels are not the layer's, or are so by their number alone."""


@pytest.mark.parametrize("case", MIXED)
def test_channels_that_are_others(case: str) -> None:
    program, x, modules = MIXED[case]
    torch.manual_seed(0)
    fold_exactly(enliven(Net(program, **{name: make() for name, make in modules.items()}), x), x)

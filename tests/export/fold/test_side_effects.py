"""What a network changes besides what it returns: the caller's input, its own statistics and weights.

A fold must leave both as the model leaves them. BatchNorm on the input and an operation in place on what it made, and
the caller's tensor was written into; statistics that forward changes through a view were taken for constants.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Net, assert_all_folded, conv, fold_exactly, fresh, image
from networks import enliven
from torch import Tensor, nn

IMAGE = image(3, 4, 5, 7)


def net(forward: Callable[[Net, Tensor], object]) -> Net:
    """Four channels to six by `a`, a BatchNorm `n`, and a 1x1 convolution `c`."""
    torch.manual_seed(0)
    return Net(forward, a=conv(4, 6), n=nn.BatchNorm2d(6), c=conv(6, 6, 1))


def on_input(forward: Callable[..., object]) -> Net:
    """A BatchNorm `n` on the network's input, and a convolution `c`."""
    torch.manual_seed(0)
    return Net(forward, n=nn.BatchNorm2d(4), c=conv(4, 5))


# -- the caller's input ----------------------------------------------------------------------------------------------


IN_PLACE: dict[str, nn.Module] = {
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.1, inplace=True),
    "ReLU6": nn.ReLU6(inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "Dropout, ReLU": nn.Sequential(nn.Dropout(inplace=True), nn.ReLU(inplace=True)),
    "Identity, ReLU": nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
    "add_": Net(lambda _, x: x.add_(1)),
    "a slice": Net(lambda _, x: (x.__setitem__((slice(None), 0), 0), x)[1]),
    "a view": Net(lambda _, x: (x.flatten(1).mul_(2), x)[1]),
}


@pytest.mark.parametrize("activation", IN_PLACE)
@pytest.mark.parametrize("revive", [fresh, lambda model: enliven(model, IMAGE.clone())], ids=["fresh", "trained"])
def test_the_caller_keeps_its_input(activation: str, revive: Callable[[nn.Module], nn.Module]) -> None:
    """BatchNorm on the input, an operation in place on what it made: that was written into the caller's tensor."""
    torch.manual_seed(0)
    fold_exactly(revive(nn.Sequential(nn.BatchNorm2d(4), IN_PLACE[activation], conv(4, 5))), IMAGE)


def test_two_norms_on_the_input_of_which_one_is_written_into() -> None:
    model = on_input(lambda m, x: m.c(m.n(x).relu_()) + m.c(x))
    fold_exactly(fresh(model), IMAGE)


@pytest.mark.parametrize("strategy", ["auto", "ones", "bias-map", "floor"])
def test_a_model_that_changes_its_input_still_does(strategy: str) -> None:
    """Its function is what it leaves in the input, too: the same must be left, no more and no less."""
    model = on_input(lambda m, x: m.c(m.n(x.mul_(0.5))) + x[:, :1])
    fold_exactly(enliven(model, IMAGE.clone()), IMAGE, strategy=strategy)


# -- the network's own state -----------------------------------------------------------------------------------------

STATES: dict[str, Callable[[Net], object]] = {
    "the mean, through a view": lambda m: m.n.running_mean.view(-1).add_(0.25),
    "the mean, a part": lambda m: m.n.running_mean[:2].mul_(0.5),
    "the mean": lambda m: m.n.running_mean.mul_(0.5),
    "the variance, through a view": lambda m: m.n.running_var.view(2, 3)[0].mul_(0.5),
    "the scale, through a view": lambda m: m.n.weight.detach().view(-1).mul_(0.5),
    "the scale": lambda m: m.n.weight.mul_(0.5),
    "the shift": lambda m: m.n.bias[1:].add_(0.5),
    "a layer's weights": lambda m: m.a.weight.mul_(0.9),
    "a layer's weights, through a view": lambda m: m.c.weight.flatten(1)[2:].mul_(0.9),
    "a layer's bias, through a view": lambda m: m.a.bias.view(2, 3)[1].mul_(0.9),
    "a buffer that holds the mean": lambda m: m.all.mul_(0.9),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_forward_changes_is_no_constant(state: str, late: bool) -> None:
    """Statistics that forward changes through a view were read as they happened to be."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        if not late:
            STATES[state](m)
        z = F.relu(m.c(m.n(y)))
        if late:
            STATES[state](m)
        return z

    model = enliven(net(lambda m, x: m.c(m.n(m.a(x)))), IMAGE)
    if "holds" in state:
        model.register_buffer("all", torch.stack([model.n.running_mean, model.n.running_var]))  # type: ignore[list-item]
        model.n.running_mean = model.all[0]  # type: ignore[union-attr,index]
    model.body = forward  # type: ignore[assignment]
    fold_exactly(model, IMAGE)


# -- and what is harmless stays foldable -----------------------------------------------------------------------------


class Residual(nn.Module):
    """ResNet's block: every activation and the sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.a, self.n, self.b, self.k = conv(6, 6), nn.BatchNorm2d(6), conv(6, 6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.k(self.b(self.relu(self.n(self.a(x)))))
        out += x
        return self.relu(out)


def test_operations_in_place_that_harm_nobody_do_not_hinder() -> None:
    assert_all_folded(fold_exactly(enliven(Residual(), IMAGE.clone()), IMAGE))
    torch.manual_seed(0)
    late = nn.Sequential(conv(4, 6), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.Dropout(inplace=True), conv(6, 5))
    assert_all_folded(fold_exactly(enliven(late, IMAGE.clone()), IMAGE))

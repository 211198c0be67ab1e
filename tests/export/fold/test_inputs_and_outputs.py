"""Inputs and outputs of every form, each compared as what it is, and none of them a reason to refuse.

Random outputs, whole numbers, complex ones, nested ones, inputs that are no floats, and batches that differ: a
comparison that can't take them can't stand behind a fold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Net, Pair, Program, fold_exactly, image, net
from networks import enliven
from torch import Tensor, nn

IMAGE = image(3, 4, 5, 7)

OUTPUTS: dict[str, Program] = {
    "random beside": lambda m, x: (m.c(m.n(m.a(x).relu())), torch.rand_like(x)),
    "random within": lambda m, x: m.c(m.n(m.a(x).relu()) + torch.randn_like(x[:, :1])),
    "dropout that is on": lambda m, x: m.c(F.dropout(m.n(m.a(x).relu()), 0.5, training=True)),
    "whole numbers": lambda m, x: (y := m.n(m.a(x))).argmax(1) + (y > 0).sum(1),
    "truth": lambda m, x: m.n(m.a(x)) > 0,
    "complex": lambda m, x: torch.fft.rfft(m.n(m.a(x))),
    "nested, with None and numbers": lambda m, x: {"a": [y := m.n(m.a(x))], "b": (m.c(y), None, 3, "name")},
    "a number": lambda m, x: m.n(m.a(x)).sum(),
    "the input": lambda m, x: (x, m.n(m.a(x).relu())),
    "a constant": lambda m, x: (m.n(m.a(x)), torch.arange(4)),
    "one value twice": lambda m, x: (y := m.c(m.n(m.a(x).relu())), y),
    "nothing of the norm": lambda m, x: (m.n(m.a(x)), m.c(m.a(x)))[1],
}


@pytest.mark.parametrize("program", OUTPUTS)
def test_outputs_of_every_form(program: str) -> None:
    """What is random is drawn alike, and what is no real number is compared as what it is."""
    fold_exactly(enliven(net(OUTPUTS[program]), IMAGE), IMAGE)


INPUTS: dict[str, tuple[Program, type[Net], tuple[Any, ...], dict[str, Callable[[], nn.Module]]]] = {
    "indices": (
        lambda m, x, i: m.c(m.n(F.relu(m.a(x))) + m.e(i)[..., None, None]),
        Pair,
        (IMAGE, torch.tensor([0, 4, 2])),
        {"e": lambda: nn.Embedding(5, 6)},
    ),
    "a mask": (lambda m, x, k: m.c(m.n(F.relu(m.a(x))).masked_fill(k, 0)), Pair, (IMAGE, IMAGE[:, :1] > 0), {}),
    "bytes": (
        lambda m, x: m.c(m.n(F.relu(m.a(x.double() / 255)))),
        Net,
        ((image(3, 4, 5, 7).abs() * 50).to(torch.uint8),),
        {},
    ),
    "a number": (lambda m, x, s: m.c(m.n(F.relu(m.a(x)))) * s, Pair, (IMAGE, 2.0), {}),
    "a list": (lambda m, xs: m.n(F.relu(m.a(xs[0]))) + m.c(m.a(xs[1])), Net, ([IMAGE, image(3, 4, 5, 7, seed=2)],), {}),
    "a dict": (lambda m, xs: m.n(F.relu(m.a(xs["x"]))) + xs["y"], Net, ({"x": IMAGE, "y": image(3, 6, 5, 7)},), {}),
    "two batches": (lambda m, x, y: m.c(m.n(F.relu(m.a(x)))) + m.a(y), Pair, (IMAGE, IMAGE[:1] * 2), {}),
    "one that is not read": (lambda m, x, y: m.c(m.n(F.relu(m.a(x)))), Pair, (IMAGE, IMAGE[:1] * 2), {}),
    "a batch of one": (lambda m, x: m.c(m.n(F.relu(m.a(x)))), Net, (IMAGE[:1],), {}),
    "no batch": (lambda m, x: m.n(m.a(x).unsqueeze(0)), Net, (IMAGE[0],), {}),
    "another memory format": (
        lambda m, x: m.c(m.n(F.relu(m.a(x)))),
        Net,
        (IMAGE.to(memory_format=torch.channels_last),),
        {},
    ),
    "a transposed view": (lambda m, x: m.c(m.n(F.relu(m.a(x)))), Net, (image(3, 4, 7, 5).transpose(2, 3),), {}),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_of_every_form(case: str) -> None:
    program, kind, inputs, modules = INPUTS[case]
    model = net(program, kind, **{name: make() for name, make in modules.items()})
    fold_exactly(enliven(model, *inputs), *inputs, batches=False)


class Many(Net):
    """Its inputs have no names."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def test_inputs_without_names() -> None:
    model = net(lambda m, x, y: m.c(m.n(F.relu(m.a(x)))) + m.a(y), Many)
    fold_exactly(enliven(model, IMAGE, IMAGE * 2), IMAGE, IMAGE * 2, batches=False)

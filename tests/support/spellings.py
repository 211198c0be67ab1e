"""How operations are spelled: the many ways to write what is one thing to whoever reads the graph.

Tables of names and functions of values, from which `random_networks` draws. What works in place and has a result of
its own returns it; a statement returns None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from choosing import Chooser
from torch import Tensor

Spelling = tuple[str, Callable[..., Any]]


def _statement(function: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        function(x)

    return run


def plus(x: Tensor, y: Tensor) -> None:
    x += y


def _plus_one(x: Tensor) -> None:
    x += 1


def _write_all(x: Tensor, c: Tensor) -> None:
    x[:] = c


def _write_slice(x: Tensor) -> None:
    x[:, :2] = 0


def _write_sizes(x: Tensor) -> None:
    x[..., 0] = 0.5


def _times_slice(x: Tensor) -> None:
    x[:, 1:] *= -0.6


def _write_slice_of(x: Tensor, y: Tensor) -> None:
    x[:, 1:] = y[:, :-1] * 2


def _add_slice_of(x: Tensor, y: Tensor) -> None:
    x[:, :1] += y[:, -1:]


def counted(x: Tensor, counter: Tensor) -> Tensor:
    counter.add_(1)
    return x * (counter / 4 + 1)


def frozen_norm(x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """As detection models write a BatchNorm that is never trained."""
    spread = (1, -1, *([1] * (x.dim() - 2)))
    scale = w.reshape(spread) * (v.reshape(spread) + 1e-5).rsqrt()
    return x * scale + (b.reshape(spread) - m.reshape(spread) * scale)


ACTIVATIONS: list[Spelling] = [
    ("F.relu_", lambda x: F.relu_(x)),
    ("F.relu, in place", lambda x: F.relu(x, inplace=True)),
    ("clamp(min)", lambda x: x.clamp(min=-0.3)),
    ("clamp(max)", lambda x: x.clamp(max=0.9)),
    ("clamp", lambda x: torch.clamp(x, -0.5, 1.5)),
    ("clamp_", lambda x: x.clamp_(-0.5, 1.5)),
    ("clamp_min_", lambda x: x.clamp_min_(0)),
    ("swish", lambda x: x * torch.sigmoid(x)),
    ("maximum", lambda x: torch.maximum(x, x.new_zeros(()))),
    ("dropout", lambda x: F.dropout(x, 0.5, training=False)),
    ("identity", lambda x: x),
    ("contiguous", lambda x: x.contiguous()),
    ("clone", lambda x: x.clone()),
    ("detach", lambda x: x.detach()),
    ("to its own dtype", lambda x: x.to(x.dtype)),
    ("view of its own shape", lambda x: x.view(x.shape)),
    ("expand_as itself", lambda x: x.expand_as(x)),
    ("abs", lambda x: x.abs()),
    ("neg", lambda x: -x),
    ("square", lambda x: x * x),
]
"""Some of these hand on their input itself."""

COMBINATIONS: list[Spelling] = [
    *[("add", lambda a, b: a + b)] * 4,
    ("add, alpha", lambda a, b: torch.add(a, b, alpha=0.5)),
    ("sub", lambda a, b: a - b),
    ("gate", lambda a, b: a * torch.sigmoid(b)),
    ("mul", lambda a, b: a * b),
    ("maximum of two", torch.maximum),
    ("cat, sizes", lambda a, b: torch.cat([a, b], -1)),
    ("cat, batch", lambda a, b: torch.cat([a, b], 0)),
    ("stack", lambda a, b: torch.stack([a, b], 2)),
    ("mean of two", lambda a, b: (a + b) / 2),
    ("sum of both ways", lambda a, b: (a + b) + (a - 2 * b)),
]
"""Of two values of the same sizes."""

WRITES: list[Spelling] = [
    ("relu_", lambda x: x.relu_()),
    ("relu_ without its result", _statement(lambda x: x.relu_())),
    ("add_", lambda x: x.add_(0.7)),
    ("+=", _plus_one),
    ("mul_", lambda x: x.mul_(-1.5)),
    ("div_", lambda x: x.div_(1.7)),
    ("clamp_", lambda x: x.clamp_(-0.4, 0.8)),
    ("sigmoid_", lambda x: x.sigmoid_()),
    ("neg_", lambda x: x.neg_()),
    ("hardtanh_", lambda x: F.hardtanh_(x, -1.0, 0.6)),
    ("leaky_relu_", lambda x: F.leaky_relu_(x, 0.1)),
    ("slice written", _write_slice),
    ("slice written, sizes", _write_sizes),
    ("slice zeroed", _statement(lambda x: x[:, :1].zero_())),
    ("slice of relu_", _statement(lambda x: x[:, :1].relu_())),
    ("slice *=", _times_slice),
    ("transposed mul_", _statement(lambda x: x.transpose(0, 1).mul_(1.3))),
    ("detached add_", _statement(lambda x: x.detach().add_(0.3))),
    ("flat add_", _statement(lambda x: x.view(-1).add_(0.3))),
    ("chunks", _statement(lambda x: x.chunk(2, 1)[0].mul_(0.5))),
    ("masked_fill_", lambda x: x.masked_fill_(x > 1, 0.25)),
    ("unsqueezed fill_", _statement(lambda x: x[:, -1].unsqueeze(1).fill_(0.5))),
]
"""Into a value, in place."""

WRITES_OF_A_VALUE: list[Spelling] = [
    ("add_ of a value", lambda x, y: x.add_(y)),
    ("+= of a value", plus),
    ("sub_ of a value", lambda x, y: x.sub_(y, alpha=0.5)),
    ("mul_ of a gate", lambda x, y: x.mul_(torch.sigmoid(y))),
    ("copy_", lambda x, y: x.copy_(y)),
    ("slice of a value written", _write_slice_of),
    ("slice += a value", _add_slice_of),
]
"""Into the first of two, in place."""

WRITES_OF_A_CONSTANT: list[Spelling] = [
    ("mul_ per channel", lambda x, c: x.mul_(c)),
    ("add_ per channel", lambda x, c: x.add_(c)),
    ("channels written by constants", _write_all),
]
"""With one for each channel, `c`."""

ARITHMETIC: list[Spelling] = [
    ("2 x", lambda x: 2 * x),
    ("x / 3", lambda x: x / 3),
    ("1 - x", lambda x: 1 - x),
    ("x - 0.5", lambda x: x - 0.5),
    ("x + 1", lambda x: torch.add(x, 1)),
    ("rsub", lambda x: torch.rsub(x, 0.5, alpha=2)),
    ("x + batch size", lambda x: x + x.shape[0]),
    ("x * arange(batch)", lambda x: x * (1 + torch.arange(x.shape[0])).view(-1, *[1] * (x.dim() - 1))),
    ("x + channels", lambda x: x + x.shape[1]),
    ("size scaled", lambda x: x * (x.shape[-1] ** -0.5)),
]
"""With numbers and sizes."""


def views(x: Tensor, choose: Chooser) -> list[Spelling]:
    """Views and reshapes of values like `x`, which has two dimensions or more."""
    rank, shape = x.dim(), tuple(x.shape)
    channels = shape[1]
    options: list[Spelling] = [("transpose(0, 1)", lambda x: x.transpose(0, 1))] if choose.one_in(8) else []
    if rank > 1:
        start = choose.number(0, channels - 1)
        stop = choose.number(start + 1, channels)
        order = torch.randperm(channels, generator=choose.generator())
        options += [
            ("slice of channels", lambda x: x[:, start:stop]),
            ("every other channel", lambda x: x[:, ::2]),
            ("narrow", lambda x: x.narrow(1, start, stop - start)),
            ("chunk", lambda x: torch.chunk(x, 2, 1)),
            ("split", lambda x: torch.split(x, [start + 1, channels - start - 1], 1)),
            ("index_select", lambda x: x[:, order.to(x.device)]),
            ("unsqueeze", lambda x: x.unsqueeze(2)),
            ("unsqueeze at the end", lambda x: x[..., None]),
            ("reshape(-1, K)", lambda x: x.reshape(-1, math.prod(shape[1:]))),
            ("view(*shape)", lambda x: x.view(*x.shape)),
            ("reshape of its own shape", lambda x: x.reshape(x.shape)),
            ("flatten(1)", lambda x: x.flatten(1)),
            ("view(b, -1)", lambda x: x.view(x.size(0), -1)),
            ("reshape(b, -1)", lambda x: x.reshape(x.shape[0], -1)),
            ("last of the batch", lambda x: x[1:]),
            ("repeat", lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2))),
        ]
        if channels % 2 == 0:
            half = channels // 2
            options += [
                (
                    "channel shuffle",
                    lambda x: x.view(x.size(0), 2, half, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
                ),
                (
                    "channel shuffle, all sizes",
                    lambda x: (
                        x.reshape(x.size(0), 2, half, *x.shape[2:]).transpose(1, 2).contiguous()
                        .view(x.size(0), -1, *x.shape[2:])
                    ),
                ),
                ("unflatten of channels", lambda x: x.unflatten(1, (2, half))),
                ("glu", lambda x: F.glu(x, 1)),
                ("two halves, one gate", lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1))),
            ]  # fmt: skip
    if rank > 2:
        options += [
            ("transpose(1, 2)", lambda x: x.transpose(1, 2)),
            ("transpose(-1, -2)", lambda x: x.transpose(-1, -2)),
            ("last permuted to channel", lambda x: x.movedim(-1, 1)),
            ("channel permuted to last", lambda x: x.movedim(1, -1)),
            ("there and back", lambda x: x.movedim(1, -1).movedim(-1, 1)),
            ("view(b, c, -1)", lambda x: x.view(x.size(0), x.size(1), -1)),
            ("reshape(b, C, -1)", lambda x: x.reshape(x.shape[0], channels, -1)),
            ("reshape(b, c, h * w)", lambda x: x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))),
            ("flatten(2)", lambda x: x.flatten(2)),
            ("flatten(0, 1)", lambda x: x.flatten(0, 1)),
            ("slice of sizes", lambda x: x[..., 1:]),
            ("slice of sizes, before", lambda x: x[:, :, :-1]),
            ("every other position", lambda x: x[:, :, ::2]),
            ("select", lambda x: x.select(2, 1)),
            ("roll", lambda x: x.roll(1, 2)),
            ("flip of sizes", lambda x: x.flip(-1)),
            ("squeeze", lambda x: x.squeeze(-1)),
            ("squeeze, unsqueeze", lambda x: x.unsqueeze(-1).squeeze(-1)),
            ("tokens", lambda x: x.flatten(2).transpose(1, 2)),
        ]
    if rank == 2:
        options += [("view(b, c, 1, 1)", lambda x: x.view(x.size(0), -1, 1, 1))]
        for size in (2, 3, 4):
            if channels % size == 0:
                options.append(("unflatten to sizes", lambda x, n=size: x.view(x.size(0), -1, n)))
    return options


def flattenings(x: Tensor) -> list[Spelling]:
    """[N, C, *sizes] → two dimensions."""
    width = x[0].numel()
    return [
        ("flatten(1)", lambda x: x.flatten(1)),
        ("view(b, -1)", lambda x: x.view(x.size(0), -1)),
        ("reshape(-1, K)", lambda x: x.reshape(-1, width)),
        ("reshape(b, -1)", lambda x: x.reshape(x.shape[0], -1)),
        ("channel last, flatten(1)", lambda x: x.movedim(1, -1).flatten(1)),
        ("squeeze of the mean", lambda x: x.mean(-1, keepdim=True).squeeze(-1)),
    ]


def same_channels(x: Tensor) -> list[Spelling]:
    """Reshapes behind the channel axis; `x` has three dimensions or more."""
    channels, sizes = x.shape[1], tuple(x.shape[1:])
    return [
        ("view(b, c, -1)", lambda x: x.view(x.size(0), x.size(1), -1)),
        ("reshape(b, C, -1)", lambda x: x.reshape(x.shape[0], channels, -1)),
        ("reshape(b, c, h * w)", lambda x: x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))),
        ("view(*shape)", lambda x: x.view(*x.shape)),
        ("view of fixed sizes", lambda x: x.view(-1, *sizes)),
        ("flatten(2)", lambda x: x.flatten(2)),
        ("unsqueeze, squeeze", lambda x: x.unsqueeze(2).squeeze(2)),
        ("one row", lambda x: x.reshape(x.shape[0], channels, 1, -1)),
    ]


def with_constants(
    x: Tensor, shape: tuple[int, ...], random: Callable[..., Tensor]
) -> list[tuple[str, Callable[..., Any], Mapping[str, Tensor]]]:
    """Arithmetic with constants, most of which are one for each channel, of that `shape`; and the constants."""
    channels = x.shape[1]
    spread = [1, channels, *([1] * (x.dim() - 2))]
    c, d = random(*shape), random(*shape)
    return [
        ("mul", lambda x, c: x * c, {"c": c}),
        ("mul, constant first", lambda x, c: c * x, {"c": c}),
        ("add", lambda x, c: x + c, {"c": c}),
        ("add, constant first", lambda x, c: c + x, {"c": c}),
        ("sub", lambda x, c: x - c, {"c": c}),
        ("sub, constant first", lambda x, c: c - x, {"c": c}),
        ("div", lambda x, c: x / c, {"c": c.abs() + 0.5}),
        ("mul and add", lambda x, c, d: x * c + d, {"c": c, "d": d}),
        ("input normalisation", lambda x, c, d: (x - c) / d, {"c": c, "d": d.abs() + 0.5}),
        ("LayerScale", lambda x, c: x * c.view(spread), {"c": c.reshape(-1) * 0.3}),
        ("addcmul", lambda x, c, d: torch.addcmul(d, x, c), {"c": c, "d": d}),
        (
            "FrozenBatchNorm",
            frozen_norm,
            {
                "w": c.reshape(-1),
                "b": d.reshape(-1),
                "m": random(channels),
                "v": random(channels).abs(),
            },
        ),
        ("constant computed", lambda x, c, d: x * (c.exp() / (d * d + 1)), {"c": c, "d": d}),
        ("map of all sizes", lambda x, c: x + c, {"c": random(1, *x.shape[1:])}),
        ("last axis", lambda x, c: x * c, {"c": random(x.shape[-1])}),
    ]

"""What the network multiplies in: float32, or bf16 where that was asked for.

Owns the two ways to bf16: autocast where the hardware has such arithmetic, and rounded float32 where it hasn't. Knows
neither data nor training. The times in this file are of two cores of a Xeon at 2.5 GHz (AVX-512, no bf16 instructions),
torch 2.14.1, variants taking turns in one process, the least of the rounds because the machine was shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer.model import Net

PRECISIONS = ("float32", "bf16")

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def forbid_tf32() -> None:
    """float32 means float32: TF32 is a choice of the library, not of the recipe.

    By the older of torch's two settings, as everywhere here: after the newer one (`fp32_precision`) torch.export raises
    in the same process.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def logits_in(precision: str, model: Net, device: torch.device) -> LogitsOf:
    """A function from images to the model's logits in float32, computed in `precision`; bf16 may change the layers."""
    autocast = precision == "bf16" and _has_bf16_arithmetic(device)
    rounding = precision == "bf16" and not autocast
    if rounding:
        _round_to_bf16(model)

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        # Each weight is used once in a pass: a cache of converted ones would gain nothing, and a graph can't hold it.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            logits: torch.Tensor = model(_rounded_to_bf16(images) if rounding else images)
        return logits.float()

    return logits_of


def _has_bf16_arithmetic(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def _rounded_to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest bf16, as float32: Veltkamp's splitting, which keeps the upper 8 of 24 significant bits.

    Three operations that the compiler vectorises: working on the bits instead took an evaluation from 0.7 s to 1.4 s,
    and it is free to drop the pair `.bfloat16().float()`. From 2**111 on, and for infinity, the result is not a number.
    """
    scaled = tensor * 65537.0
    return scaled - (scaled - tensor)


class _Round(torch.autograd.Function):
    """A float32 tensor rounded to bf16; gradients pass as they are."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _rounded_to_bf16(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _RoundBothWays(_Round):
    """A float32 tensor rounded to bf16, and its gradient too."""

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _rounded_to_bf16(gradient)


def _round_to_bf16(model: nn.Module) -> None:
    """Make the model compute as bf16 hardware does: what is multiplied is in bf16, what is summed up is in float32.

    For a CPU without bf16 instructions: there torch emulates them in every kernel, and a compiled step in autocast's
    bf16 takes 73 ms where float32 takes 42, an evaluation 2.2 s against 0.9 s. Here float32 kernels run on rounded
    numbers: the weights of convolutions and linear layers, their results (hence what goes through ReLU, pooling and
    dropout into the next layer) with the gradients that come back to them, and BatchNorm's results. The model's input
    has to be rounded as well. The weights that are trained, and their names, stay what they are.

    Results are rounded before the ReLU, not after it, though that is the same number: what ReLU's gradient needs is
    then the very tensor that the next layer keeps anyway. Otherwise the compiler keeps a mask, in a kernel that it
    can't vectorise: 4.7 ms of a step's 36.
    """

    def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return _round_both_ways(F.linear(x, _round(layer.weight), layer.bias))

    def convolution(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return _round_both_ways(F.conv2d(x, _round(layer.weight), layer.bias, layer.stride, layer.padding))

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = functools.partial(linear, layer)  # type: ignore[method-assign]
        elif isinstance(layer, nn.Conv2d):
            layer.forward = functools.partial(convolution, layer)  # type: ignore[method-assign]
        elif isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, inputs, result: _round(result))


def _round(tensor: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _Round.apply(tensor)
    return rounded


def _round_both_ways(tensor: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _RoundBothWays.apply(tensor)
    return rounded

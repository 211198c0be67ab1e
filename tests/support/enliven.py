"""BatchNorms that matter: a fresh one is the identity and hides every mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def wake(norm: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Give a BatchNorm a gamma of both signs, with a zero, a random beta, and the statistics of the data that arrives.

    With any other statistics signals die out, or grow, on their way through a network.
    """
    assert isinstance(norm, BatchNorm)
    if norm.affine:
        gamma = 0.5 + torch.rand(norm.num_features, generator=generator, dtype=torch.float64)
        gamma *= torch.where(torch.rand(norm.num_features, generator=generator) < 0.5, -1.0, 1.0)
        if norm.num_features > 3:
            gamma[3] = 0
        norm.weight.data.copy_(gamma)
        norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator, dtype=torch.float64))
    if norm.track_running_stats:
        others = [axis for axis in range(x.dim()) if axis != 1]
        norm.running_mean.copy_(x.mean(others))
        norm.running_var.copy_(x.var(others, unbiased=False) + 0.1)


def enliven(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """Wake every BatchNorm of a model, in float64 and eval mode, layer by layer as the data arrives."""
    generator = torch.Generator().manual_seed(seed)
    model = model.eval().double()
    hooks = [
        norm.register_forward_pre_hook(lambda norm, arguments: wake(norm, arguments[0], generator))
        for norm in model.modules()
        if isinstance(norm, BatchNorm)
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return model

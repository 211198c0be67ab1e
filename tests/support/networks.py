"""Networks whose BatchNorms matter, drawn at random or brought to life, and how far two of them differ."""

from __future__ import annotations

import torch
from choosing import Draw
from enliven import enliven
from random_networks import random_network
from torch import Tensor, nn

__all__ = ["Draw", "difference", "enliven", "random_network"]


def difference(model: nn.Module, folded: nn.Module, *inputs: Tensor) -> float:
    """Largest difference between the outputs of two networks, relative to the output's largest value.

    Values below 1e-3 count as 1e-3: what a softmax over one channel, say, leaves of a signal is rounding noise alone.
    """
    with torch.no_grad():
        wanted, found = model(*(x.clone() for x in inputs)), folded(*(x.clone() for x in inputs))
    pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
    return max(float((b - a).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)

"""Where TorchScript's tensors are, in files that hide them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bench.backends.torchscript import _placement


class Shifted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.ones(2, device="cpu")


def traced(freeze: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(Shifted().eval(), torch.zeros(4, 3))
        return torch.jit.freeze(module) if freeze else module


def test_a_module_on_its_own_device_is_accepted() -> None:
    for freeze in (True, False):
        placement = _placement(traced(freeze), "cpu")
        assert placement.stray == ()
        assert placement.nodes["cpu"] >= 2


def test_weights_elsewhere_are_refused() -> None:
    stray = _placement(traced(freeze=False), "cuda").stray
    assert "linear.weight is on cpu" in stray


def test_frozen_weights_and_baked_devices_are_refused() -> None:
    """Freezing turns weights into constants of the graph, where no list of parameters shows them."""
    stray = _placement(traced(freeze=True), "cuda").stray
    assert any(" is on cpu" in line for line in stray)
    assert any("names the device cpu" in line for line in _placement(traced(freeze=False), "cuda").stray)

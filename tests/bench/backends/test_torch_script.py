"""Where TorchScript's tensors are, in files that hide them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.backends.contract import Options, Profile
from bench.backends.registry import find_backend
from bench.backends.torch_script import _placement, convolutions_allow_tf32
from export.bundle import Bundle


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


@pytest.mark.parametrize("allowed", [True, False])
def test_a_trace_fixes_whether_a_convolution_may_use_tf32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 a file traced while it was allowed came to 356 times float32's error, in the profile `strict`."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(torch.nn.Conv2d(1, 1, 3).eval(), torch.zeros(2, 1, 5, 5))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    assert convolutions_allow_tf32(module) is allowed
    assert convolutions_allow_tf32(traced(freeze=False)) is None


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("folded", [True, False])
def test_the_exported_file_is_float32_on_a_gpu_too(folded: bool, profile: Profile, small_bundle: Path) -> None:
    options = Options(threads=1, profile=profile, folded=folded)
    session = find_backend("torchscript-cpu").load(Bundle.open(small_bundle), options)
    assert session.settings()["file_allows_tf32_in_convolutions"] is False

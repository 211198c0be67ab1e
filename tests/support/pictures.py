"""Pictures to test with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, height: int, width: int, seed: int = 0, mode: str = "RGB") -> None:
    """A smooth picture with noise, as JPEG, PNG, … by the name of the file."""
    draw = np.random.default_rng([seed, height, width])
    coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    noisy = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(noisy + draw.integers(-20, 20, noisy.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy).convert(mode).save(path)

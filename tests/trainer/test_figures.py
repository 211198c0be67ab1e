"""The figures are PNG files that show what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from trainer import figures
from trainer.history import Evaluation

PNG = b"\x89PNG\r\n\x1a\n"


def history(points: int) -> list[Evaluation]:
    return [Evaluation(50 * n, 2.0 / n, 99 - 10 / n, 0.5 * n) for n in range(1, points + 1)]


@pytest.mark.parametrize("points", [1, 2, 120])
def test_curves(tmp_path: Path, points: int) -> None:
    path = tmp_path / "curves.png"
    figures.curves(history(points), path, "title")
    assert path.read_bytes().startswith(PNG)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (720, 960)
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5, "something is drawn, on white"


def test_curves_of_a_network_that_has_learned_nothing(tmp_path: Path) -> None:
    figures.curves([Evaluation(50, 2.3, 9.8, 1.0)], tmp_path / "curves.png", "title")


def test_digits_start_at_index_0(tmp_path: Path) -> None:
    """The article's listing starts at 1. Only the first image has ink here: it must be in the top left corner."""
    images = np.zeros((41, 28, 28), np.uint8)
    images[0] = 255
    figures.digits(images, np.arange(41) % 10, tmp_path / "digits.png")
    pixels = image.imread(tmp_path / "digits.png")[..., 0]
    rows, columns = figures.DIGITS // 10, 10
    height, width = pixels.shape[0] / rows, pixels.shape[1] / columns
    ink = [
        (pixels[int(r * height) : int((r + 1) * height), int(c * width) : int((c + 1) * width)] < 0.5).mean()
        for r in range(rows)
        for c in range(columns)
    ]
    assert np.argmax(ink) == 0
    assert ink[0] > 0.3
    assert max(ink[1:]) < 0.1, "beside the first image there are only the labels"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        figures.curves(history(2), tmp_path / "nowhere" / "curves.png", "title")

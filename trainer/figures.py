"""The article's figures, as PNG files.

Owns how they look. Knows neither torch nor where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

DIGITS = 40
_COLUMNS = 10


class Point(Protocol):
    """A point of the curves: an evaluation as `trainer.history` has it."""

    @property
    def iteration(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def top1(self) -> float: ...


def curves(history: Sequence[Point], path: Path, title: str, evaluated: str = "test") -> None:
    """Training loss and accuracy (of which images, `evaluated` says) over the iterations.

    Raises OSError where `path` can't be written.
    """
    from matplotlib.figure import Figure

    iterations = [point.iteration for point in history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title)
    upper.plot(iterations, [point.loss for point in history], color="tab:red", linewidth=1)
    upper.set(ylabel="training loss (one batch)", yscale="log")
    lower.plot(iterations, [point.top1 for point in history], color="tab:blue", linewidth=1)
    lower.axhline(99, color="grey", linewidth=0.8, linestyle="--")
    # The first evaluations lie far below: leaving them out of the picture shows the last points of a percent.
    lowest = min(96.0, max(point.top1 for point in history) - 1)
    lower.set(ylabel=f"{evaluated} top-1 (%)", xlabel="iteration", ylim=(lowest, 100))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def digits(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], path: Path) -> None:
    """The first 40 digits, each under its label; images uint8 [n, 28, 28], labels [n].

    The article's listing starts at index 1 and so leaves out the first image; this starts at 0. Raises OSError where
    `path` can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_COLUMNS, DIGITS / _COLUMNS * 1.2), layout="constrained")
    for axes, image, label in zip(
        figure.subplots(DIGITS // _COLUMNS, _COLUMNS).flat, images[:DIGITS], labels[:DIGITS], strict=True
    ):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(str(label), fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=100, format="png")

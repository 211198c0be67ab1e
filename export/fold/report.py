"""What became of each BatchNorm: the value that folding returns and the bundle's manifest keeps.

Owns the words of the report. Knows neither graphs nor algebra, and imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Strategy = Literal["auto", "all", "ones", "bias-map", "floor", "none"]
"""How a shift gets over a border of zeros, see `search`.

``"all"`` takes the cheapest way, ``"auto"`` too, unless it costs more than the BatchNorm does; ``"none"`` folds
nothing.
"""


Runtime = Literal["onnxruntime", "torch"]
"""What will run the folded network: what is cheapest differs."""


class FoldedNorm(BaseModel):
    """A BatchNorm that is gone: its function now lives in other layers' weights.

    Attributes:
        name: the BatchNorm's module path, or its graph node where it has none.
        method: how it was folded, e.g. ``"into producer"``, ``"ones channel"``.
        into: the layers that took its scale and shift.
        error: largest absolute difference over largest absolute value (relative, float64) between the part of the
            network that this fold changed, before and after, on random inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str
    into: tuple[str, ...]
    error: float


class KeptNorm(BaseModel):
    """A BatchNorm that stays in the graph, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str


class FoldReport(BaseModel):
    """Every BatchNorm of the network is in exactly one of the first two lists.

    Attributes:
        simplified: what else was folded, by the same cases: constants' multiplications and additions, and parallel
            layers of one input, named by the sum of their outputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folded: tuple[FoldedNorm, ...] = ()
    kept: tuple[KeptNorm, ...] = ()
    simplified: tuple[FoldedNorm, ...] = ()

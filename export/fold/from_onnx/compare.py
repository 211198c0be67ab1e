"""A folded ONNX file against the original, run by onnxruntime on the same inputs with every optimisation off.

Owns how far two files may be apart. Each fold was held to 1e-9 in float64 by itself; this shows that the file says what
the folded graph means. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.fold.from_onnx import trial
from export.formats.onnx_session import open_session

BASE: Mapping[ir.DataType, float] = {
    ir.DataType.DOUBLE: 1e-9,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 8e-2,
}
"""Relative differences that rounding makes in a network of usual depth, by the coarsest type that it computes in."""

ABOVE_NOISE = 8.0
"""A folded file may be this much further from the original than the original is from itself under another rounding: of
the inputs by one step, and of the operations as onnxruntime's optimisations order them."""

LOUD = 1 / 16
"""An output whose own noise is larger can't be compared: it is random, or chaotic."""

QUIET = 1e-2
"""Outputs smaller than this are compared as if they were as large: of zeros, rounding alone would be left."""


@dataclass
class Original:
    """The file before the fold, and what it makes of inputs of one or two sizes.

    Attributes:
        inputs: the sizes of its inputs, by name; a string is a size that is not fixed.
        sizes: to be tried for those, from the one on which the fold's example rests.
        coarsest: the type with the fewest digits that it computes in.
        not_run: why onnxruntime does not run it, else empty.
    """

    source: Path
    inputs: Mapping[str, Sequence[int | str] | None]
    sizes: Sequence[int]
    coarsest: ir.DataType
    not_run: str = ""
    runs: list[tuple[trial.Feeds, list[Any]]] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run it, once, for a batch of each size of `trial.BATCHES` that it takes."""
        if self.runs or self.not_run:
            return
        try:
            session = open_session(str(self.source), silent=True)
            size, manner, given, results = trial.first_that_runs(session, self.inputs, self.sizes)
        except Exception as error:  # onnxruntime has a class for each failure; the original's own are not this fold's
            self.not_run = (str(error).splitlines() or [type(error).__name__])[0][:200]
            return
        self.runs = [(given, results)]
        if any(isinstance(dims[0], str) for dims in self.inputs.values() if dims):
            try:
                given = trial.feeds(session, self.inputs, size, trial.BATCHES[1], manner)
                self.runs.append((given, trial.run(session, given)))
            except Exception:
                pass  # written for one size of the batch, whatever it declares

    def differences(self, folded: Path) -> list[float]:
        """Of each output, relative. Raises what onnxruntime does where it doesn't run the folded file."""
        session = open_session(str(folded), silent=True)
        return _worst(
            [apart(before, after) for before, after in zip(results, trial.run(session, given), strict=True)]
            for given, results in self.runs
        )

    def limits(self, differences: Sequence[float]) -> list[float]:
        """How large each may be; its noise is looked at where that matters. Infinite where it can't be compared."""
        base = BASE.get(self.coarsest, BASE[ir.DataType.FLOAT])
        if all(difference <= base for difference in differences):
            return [base] * len(differences)
        self.noise = self.noise or self._noise()
        return [np.inf if noise > LOUD else max(base, ABOVE_NOISE * noise) for noise in self.noise]

    def _noise(self) -> list[float]:
        """How far the original is from itself: run once more, with inputs of another rounding, and optimised."""
        found: list[list[float]] = []
        plain = open_session(str(self.source), silent=True)
        for given, results in self.runs:
            found += [
                [apart(before, after) for before, after in zip(results, trial.run(plain, feeds), strict=True)]
                for feeds in (given, _rounded(given))
            ]
        del plain
        try:
            optimised = open_session(str(self.source), silent=True, optimised=True)
            given, results = self.runs[0]
            found.append([apart(*pair) for pair in zip(results, trial.run(optimised, given), strict=True)])
        except Exception:
            pass  # then the other roundings have to do
        return _worst(found)


def _worst(found: Iterable[list[float]]) -> list[float]:
    return [max(differences) for differences in zip(*found, strict=True)]


def _rounded(given: trial.Feeds) -> trial.Feeds:
    """The inputs, each number rounded one step up or down."""
    generator = np.random.default_rng(1)
    return {
        name: np.nextafter(x, np.where(generator.random(x.shape) < 0.5, -np.inf, np.inf).astype(x.dtype))
        if isinstance(x, np.ndarray) and x.dtype.kind == "f"
        else x
        for name, x in given.items()
    }


def apart(before: Any, after: Any) -> float:
    """How far one output is from another, relative: infinite for other sizes, or NaN and infinities in other places.

    Of numbers that are no floating-point ones, it is the share of those that differ, or by how much, whichever is less:
    a rounding moves few of them far, or many by little.
    """
    if isinstance(before, Mapping):
        return apart(list(before.items()), list(after.items())) if isinstance(after, Mapping) else np.inf
    if isinstance(before, list | tuple):
        if not isinstance(after, list | tuple) or len(before) != len(after):
            return np.inf
        return max(itertools.starmap(apart, zip(before, after, strict=True)), default=0.0)
    if isinstance(before, float | int) and not isinstance(before, bool):
        before, after = np.asarray(before), np.asarray(after)
    if not isinstance(before, np.ndarray):
        return 0.0 if type(before) is type(after) and before == after else np.inf
    if not isinstance(after, np.ndarray) or before.shape != after.shape or before.dtype != after.dtype:
        return np.inf
    if before.dtype.kind not in "fiub":
        return float(np.mean(before != after)) if before.size else 0.0
    x, y = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return np.inf
    far = float(np.abs(x[finite] - y[finite]).max(initial=0))
    far /= max(float(np.abs(x[finite]).max(initial=0)), QUIET)
    return far if before.dtype.kind == "f" or not before.size else min(far, float(np.mean(before != after)))

"""Which layers the error of an int8 file comes from: what leaving each in float wins, and what it costs.

Owns that ranking and the choice by it. Errors are those of inputs that no range was taken from, against the float32
file that the int8 file is made of.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from export.bundle import Int8Layer, Int8Layers
from export.bundle.limits import rms, spread
from export.formats.onnx_int8 import Quantiser
from export.formats.onnx_session import open_session
from export.int8.layers import multiply_adds

BATCH = 20
SECONDS = 2.0
"""About how long the inputs take that one file is looked at with; at least one batch."""
TARGET = 0.8
"""Of the largest error that the precision may have: other inputs may be harder."""


class Ranked:
    """An int8 file that is being made, and inputs [N, …] to look at it with. `folder` is for what lies in between."""

    def __init__(self, quantiser: Quantiser, float32_file: Path, inputs: np.ndarray, folder: Path) -> None:
        self._quantiser, self._path = quantiser, folder / "ranked.onnx"
        began = time.perf_counter()
        first = _outputs(float32_file, inputs[:BATCH])
        count = max(BATCH, int(BATCH * SECONDS / (time.perf_counter() - began)))
        self._inputs = inputs[:count]
        self._truth = _outputs(float32_file, self._inputs) if count > BATCH else first
        self._unit = spread(self._truth)
        self._costs = multiply_adds(quantiser.model, self._inputs[:1])

    def error_percent(self, in_float: Collection[str] = ()) -> float:
        """The RMS error of the file with these layers in float, in percent of the spread of the float32 file's outputs.

        0 where these are constant.
        """
        self._quantiser.write(self._path, in_float)
        error = rms(_outputs(self._path, self._inputs).astype(np.float64) - self._truth)
        return 100 * error / self._unit if self._unit else 0.0

    def layers(self, limit_percent: float) -> Int8Layers:
        """Every layer with what it costs and wins, and which to leave in float to be well within `limit_percent`.

        One after the other, that whose part of the error is largest for what it costs, until the error is within: none
        where it is from the start, and where all together don't suffice, none either.
        """
        whole = self.error_percent()
        alone = {name: self.error_percent([name]) for name in self._costs}
        names = list(self._costs)
        order = sorted(names, key=lambda name: (whole**2 - alone[name] ** 2) / max(self._costs[name], 1), reverse=True)
        error, chosen = whole, list[str]()
        for name in order:
            if error <= TARGET * limit_percent:
                break
            chosen.append(name)
            error = self.error_percent(chosen)
        if error > TARGET * limit_percent:
            chosen, error = [], whole
        total = sum(self._costs.values()) or 1
        return Int8Layers(
            error_percent=error,
            inputs=len(self._inputs),
            layers=tuple(
                Int8Layer(
                    name=name,
                    error_percent=alone[name],
                    multiply_adds_percent=100 * self._costs[name] / total,
                    in_float=name in chosen,
                )
                for name in sorted(names, key=lambda name: alone[name])
            ),
            all_int8_error_percent=whole,
        )


def _outputs(file: Path, inputs: np.ndarray) -> np.ndarray:
    session = open_session(str(file), optimised=True, silent=True)
    (name,) = (each.name for each in session.get_inputs())
    parts = [session.run(None, {name: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(parts)

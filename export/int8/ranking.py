"""Which layers the error of an int8 file comes from: what leaving each in float wins, and what it costs.

Owns that ranking and the choice by it. Errors are those of inputs that no range was taken from, against the float32
file that the int8 file is made of.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle import Int8Layer, Int8Layers
from export.bundle.limits import are_class_scores, rms, spread
from export.bundle.rows import Rows
from export.formats import onnx_file
from export.formats.onnx_int8 import Quantiser
from export.formats.running import run_in_batches
from export.int8.layers import multiply_adds

BATCH = 20
SECONDS = 2.0
"""About how long the inputs take that one file is looked at with; at least one batch."""
RANKED_S = 60.0
"""A file that is good enough as it is is not looked at layer by layer where that would take longer."""
TARGET = 0.8
"""Of the largest error that the precision may have: other inputs may be harder."""


class Ranked:
    """An int8 file that is being made, and inputs [N, …] to look at it with, `labels` [N] where they are known.

    `folder` is for what lies in between.
    """

    def __init__(
        self, quantiser: Quantiser, float32_file: Path, inputs: Rows, labels: np.ndarray | None, folder: Path
    ) -> None:
        self._quantiser, self._path = quantiser, folder / "ranked.onnx"
        began = time.perf_counter()
        first = _outputs(float32_file, inputs[:BATCH])
        count = max(BATCH, int(BATCH * SECONDS / (time.perf_counter() - began)))
        self._inputs, self._labels = inputs[:count], None if labels is None else labels[:count]
        self._truth = _outputs(float32_file, self._inputs) if len(self._inputs) > BATCH else first
        self._unit = spread(self._truth)
        self._costs = multiply_adds(quantiser.model, np.asarray(self._inputs[:1]))
        self._weights = {node.name: node.input[1] for node in quantiser.model.graph.node if node.name in self._costs}

    def looked_at(self, in_float: Collection[str] = ()) -> Look:
        """The file with these layers in float."""
        self._quantiser.write(self._path, in_float)
        outputs = _outputs(self._path, self._inputs)
        error = rms(outputs.astype(np.float64) - self._truth)
        drop = None
        if self._labels is not None and are_class_scores(self._truth):
            right, now = (found.argmax(1) == self._labels for found in (self._truth, outputs))
            drop = 100 * (float(right.mean()) - float(now.mean()))
        return Look(100 * error / self._unit if self._unit else 0.0, drop)

    def layers(self, limit_percent: float, max_drop: float | None) -> Int8Layers:
        """Every layer with what it costs and wins, and which to leave in float to be well within `limit_percent`, and
        for top-1 to drop by no more than `max_drop` points of 100. No layers where none has to be left and to try each
        would take more than a minute.

        One after the other, that whose part of the error is largest for what it costs, until both hold. None where that
        is so from the start. Raises ValueError where `max_drop` is given and top-1 is not known.
        """
        began = time.perf_counter()
        whole = self.looked_at()
        took = time.perf_counter() - began
        if max_drop is not None and whole.drop is None:
            raise ValueError("how much top-1 drops is not known: there are no labels, or the outputs are no scores")
        needed = not whole.within(limit_percent, max_drop)
        tried = self._costs if needed or took * len(self._costs) < RANKED_S else ()
        alone = {name: self.looked_at([name]).error_percent for name in tried}

        def won(name: str) -> float:
            return (whole.error_percent**2 - alone[name] ** 2) / max(self._costs[name], 1)

        found, chosen = whole, list[str]()
        for name in sorted(alone, key=won, reverse=True):
            if found.within(limit_percent, max_drop):
                break
            chosen.append(name)
            found = self.looked_at(chosen)
        total = sum(self._costs.values()) or 1
        return Int8Layers(
            error_percent=found.error_percent,
            all_int8_error_percent=whole.error_percent,
            top1_drop_points=found.drop,
            inputs=len(self._inputs),
            layers=tuple(
                Int8Layer(
                    name=name,
                    weights=self._weights[name],
                    error_percent=alone[name],
                    multiply_adds_percent=100 * self._costs[name] / total,
                    in_float=name in chosen,
                )
                for name in sorted(alone, key=lambda name: alone[name])
            ),
        )


@dataclass(frozen=True)
class Look:
    """An int8 file's RMS error, in percent of the spread of the float32 file's outputs, 0 where these are constant; and
    by how many points of 100 its top-1 is lower, None where that is not known.
    """

    error_percent: float
    drop: float | None

    def within(self, limit_percent: float, max_drop: float | None) -> bool:
        """Whether the error is well within its limit, and top-1 drops by no more than it may."""
        small = self.error_percent <= TARGET * limit_percent
        return small and (max_drop is None or self.drop is None or self.drop <= max_drop)


def _outputs(file: Path, inputs: Rows) -> np.ndarray:
    (outputs,) = run_in_batches(onnx_file.runner(file, optimised=True), (inputs,), BATCH)
    return outputs

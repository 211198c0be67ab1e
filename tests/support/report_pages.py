"""Many results from a real one, for pages of many."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bench.backends.contract import Emulation
from bench.results.load import Source
from bench.results.schema import Result
from bench.results.statistics import PairedRatio, Spread


def with_tails(result: Result) -> Result:
    """The result with a p99 in every row, which a short run has too few calls for."""
    rows = []
    for row in result.rows:
        latency = row.end_to_end_latency_ms
        p99 = latency.model_copy(update={"p99": 1.5 * (latency.p50 or 1.0), "p99_upper": 1.7 * (latency.p50 or 1.0)})
        rows.append(row.model_copy(update={"end_to_end_latency_ms": p99}))
    return result.model_copy(update={"rows": tuple(rows)})


def with_parity(result: Result, label: str, **changes: Any) -> Result:
    """The result with another verdict on one of its subjects."""
    subjects = [
        subject.model_copy(update={"parity": replace(subject.parity, **changes)})
        if subject.label == label and subject.parity is not None
        else subject
        for subject in result.subjects
    ]
    return result.model_copy(update={"subjects": tuple(subjects)})


def with_emulated(result: Result, label: str, why: Emulation, precision: str) -> Result:
    """The result with one of its subjects in another precision that is emulated."""
    subjects = []
    for subject in result.subjects:
        if subject.label == label and subject.placement is not None and subject.file is not None:
            changes = {
                "placement": replace(subject.placement, emulated=why),
                "file": subject.file.model_copy(update={"precision": precision}),
            }
            subject = subject.model_copy(update=changes)
        subjects.append(subject)
    return result.model_copy(update={"subjects": tuple(subjects)})


def many(result: Result, count: int) -> list[Source]:
    """Copies of a result, every figure of which was moved by itself by up to a tenth: repetition would compress."""
    draw = random.Random(0)
    return [Source(Path(f"results/{place:03}.json"), (_moved(result, draw),)) for place in range(count)]


def _moved(result: Result, draw: random.Random) -> Result:
    def moved(value: Any) -> Any:
        if isinstance(value, float):
            return value * draw.uniform(0.9, 1.1)
        if isinstance(value, Spread | PairedRatio):
            return replace(value, **{name: moved(part) for name, part in vars(value).items()})
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: moved(part) for name, part in value})
        return value

    return result.model_copy(
        update={
            "rows": tuple(map(moved, result.rows)),
            "ratios": tuple(map(moved, result.ratios)),
            "roofline": tuple(replace(p, **{n: moved(v) for n, v in vars(p).items()}) for p in result.roofline),
        }
    )

"""The verdict on a model's one output, without a bundle around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.backends.contract import Profile
from bench.results import parity
from bench.results.parity import ParityVerdict
from export.bundle import Oracle, Output, Precision, Tolerances


def _manifest(tolerances: Tolerances, oracle: Oracle) -> Any:
    output = Output(name="logits", dtype="float32", shape=("batch", *oracle.logits.shape[1:]))
    return SimpleNamespace(outputs=(output,), tolerances=tolerances)


def judge(
    logits: np.ndarray, oracle: Oracle, tolerances: Tolerances, profile: Profile, precision: Precision = "float32"
) -> ParityVerdict:
    """`bench.results.parity.judge` of one output."""
    return parity.judge((logits,), oracle, _manifest(tolerances, oracle), profile, precision)


def at_batch(
    logits: np.ndarray, oracle: Oracle, tolerances: Tolerances, profile: Profile, precision: Precision = "float32"
) -> str | None:
    """`bench.results.parity.at_batch` of one output."""
    return parity.at_batch((logits,), oracle, _manifest(tolerances, oracle), profile, precision)

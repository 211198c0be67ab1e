"""From samples to numbers.

Owns pure functions over samples: throughput, percentiles, spread, and the ratio of two series that were measured in the
same rounds. Knows neither clocks nor backends. Whatever it returns can be computed again from the raw samples of a
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
# With n rounds the widest interval that any order statistics can give the median misses it with probability 2 · 0.5^n:
# 6 % for five rounds, 3 % for six. Below six, 95 % can't be promised.
MIN_ROUNDS_FOR_INTERVAL = 6


@dataclass(frozen=True)
class Spread:
    """The middle of a few values and the middle half of them. `n` is how many there were."""

    median: float
    lower_quartile: float
    upper_quartile: float
    n: int


@dataclass(frozen=True)
class PairedRatio:
    """The median of ratios that were formed round by round, and its bootstrap interval (None below six rounds)."""

    median: float
    low: float | None
    high: float | None
    confidence: float
    rounds: int


def throughput(images_per_call: int, durations_ns: Sequence[int]) -> float:
    """Images per second of a block: all its images over all its time, hiccups included."""
    return images_per_call * len(durations_ns) / (sum(durations_ns) * 1e-9)


def percentile_ms(durations_ns: Sequence[int], percent: float) -> float | None:
    """The order statistic at `percent` (0 to 100) in ms, or None where the samples are too few to have it.

    No interpolation: a value that was measured, at which at least `percent` % of the samples are not larger. The 99th
    percentile of fewer than 100 samples would just be the largest of them.
    """
    if len(durations_ns) * (100 - percent) < 100:
        return None
    return float(np.percentile(np.asarray(durations_ns), percent, method="inverted_cdf")) * 1e-6


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (linear interpolation) of at least one value."""
    lower, median, upper = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return Spread(float(median), float(lower), float(upper), len(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> PairedRatio:
    """The ratio of two series of which the i-th values belong to the same round, so that drift hits both alike.

    The median over the rounds resists a round that another process disturbed. Its interval is the percentile
    bootstrap's (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13) with a fixed seed: the same samples
    always give the same interval.

    Raises:
        ValueError: the series differ in length or are empty.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(
            f"paired series of the same length ≥ 1 are needed, got {len(numerators)} and {len(denominators)}"
        )
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    low = high = None
    if len(ratios) >= MIN_ROUNDS_FOR_INTERVAL:
        interval = stats.bootstrap(
            (ratios,),
            np.median,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return PairedRatio(float(np.median(ratios)), low, high, CONFIDENCE, len(ratios))

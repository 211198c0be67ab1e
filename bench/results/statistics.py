"""From samples to numbers.

Owns pure functions over samples: throughput, percentiles, spread, and the ratio of two series that were measured in the
same rounds. Knows neither clocks nor backends. Whatever it returns can be computed again from the raw samples of a
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
# With n rounds the widest interval that any order statistics can give the median misses it with probability 2 · 0.5^n:
# 6 % for five rounds, 3 % for six. Below six, 95 % can't be promised.
MIN_ROUNDS_FOR_INTERVAL = 6
# A median is known well enough when its interval reaches no further than this to either side.
STABLE_WITHIN_PERCENT = 1.0
# Twice the rounds should shrink an interval to 0.71 of its width; where it stays above this, more rounds don't help.
SHRINKING = 0.9


@dataclass(frozen=True)
class Spread:
    """The middle of a few values, the middle half of them, and the interval of the median (None below six values).

    `low` and `high` hold the true median with 95 % confidence where the values are independent. `n` is how many values
    there were.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width_percent(self) -> float | None:
        """Half the interval's width in percent of the median."""
        return None if self.low is None or self.high is None else 50 * (self.high - self.low) / self.median

    @property
    def stable(self) -> bool:
        """Whether the median is known to within `STABLE_WITHIN_PERCENT`."""
        return self.half_width_percent is not None and self.half_width_percent <= STABLE_WITHIN_PERCENT


@dataclass(frozen=True)
class PairedRatio:
    """The median of ratios that were formed round by round, and its bootstrap interval (None below six rounds)."""

    median: float
    low: float | None
    high: float | None
    confidence: float
    rounds: int


@dataclass(frozen=True)
class MedianRatio:
    """The ratio of two medians, of series of separate runs, and its bootstrap interval (None where one has fewer than
    six values). `median` is the ratio, as in `PairedRatio`.
    """

    median: float
    low: float | None
    high: float | None
    numerator_median: float
    denominator_median: float


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


def percentile_upper_bound_ms(durations_ns: Sequence[int], percent: float) -> float | None:
    """The order statistic, in ms, that the true percentile does not exceed with 95 % confidence; None if there is none.

    Of n independent samples a binomially distributed number lies below the percentile (David & Nagaraja, Order
    Statistics, ch. 7.1). Neighbouring calls are not quite independent, so the confidence is a little less.
    """
    rank = int(stats.binom.ppf(CONFIDENCE, len(durations_ns), percent / 100))
    if rank >= len(durations_ns):
        return None
    return float(np.partition(np.asarray(durations_ns), rank)[rank]) * 1e-6


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles (linear interpolation) and the median's interval, of at least one value.

    The interval's ends are order statistics, so it supposes no distribution (same source as the percentile's bound).
    """
    ordered = np.sort(np.asarray(values, np.float64))
    lower, median, upper = np.percentile(ordered, [25, 50, 75])
    low = high = None
    if len(values) >= MIN_ROUNDS_FOR_INTERVAL:
        rank = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(values), 0.5))
        low, high = float(ordered[rank - 1]), float(ordered[-rank])
    return Spread(float(median), float(lower), float(upper), low, high, len(values))


def settled(values: Sequence[float]) -> bool:
    """Whether more rounds would tell little more: the median is stable, or its interval has stopped shrinking."""
    now, before = spread(values), spread(values[: len(values) // 2] or values)
    if now.stable or now.half_width_percent is None or before.half_width_percent is None:
        return now.stable
    return now.half_width_percent >= SHRINKING * before.half_width_percent


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
    low, high = _bootstrap_interval(np.median, ratios)
    return PairedRatio(float(np.median(ratios)), low, high, CONFIDENCE, len(ratios))


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> MedianRatio:
    """The ratio of the medians of two series that have nothing in common but what was measured.

    Its interval is the two-sample percentile bootstrap's, each series resampled by itself (Efron & Tibshirani, An
    Introduction to the Bootstrap, ch. 8 and 13), with a fixed seed: the same samples always give the same interval. It
    holds what scattered within the two runs, not what differed between them.

    Raises:
        ValueError: a series is empty.
    """
    if not numerators or not denominators:
        raise ValueError(f"two series of at least one value are needed, got {len(numerators)} and {len(denominators)}")
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    low, high = _bootstrap_interval(lambda x, y, axis: np.median(x, axis=axis) / np.median(y, axis=axis), above, below)
    numerator, denominator = float(np.median(above)), float(np.median(below))
    return MedianRatio(numerator / denominator, low, high, numerator, denominator)


def shown_slower(ratio: PairedRatio | MedianRatio, threshold_percent: float) -> bool:
    """Whether the whole interval lies below 1 - threshold: slower beyond what the scatter explains."""
    return ratio.high is not None and ratio.high < 1 - threshold_percent / 100


def _bootstrap_interval(statistic: Callable[..., Any], *series: np.ndarray) -> tuple[float | None, float | None]:
    """The percentile bootstrap's interval, each series resampled by itself; None where one is too short for it."""
    if min(map(len, series)) < MIN_ROUNDS_FOR_INTERVAL:
        return None, None
    interval = stats.bootstrap(
        series,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)

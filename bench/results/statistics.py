"""From samples to numbers.

Owns pure functions over samples: throughput, percentiles, spread, and the ratio of two series that were measured in the
same rounds. Knows neither clocks nor backends. Whatever it returns can be computed again from the raw samples of a
result.

Values come in groups, one for each process, in the order of its rounds. Processes differ by more than rounds do: where
memory lies and threads run is drawn once for each, and stays. So an interval is made of the processes' medians, each
one observation, by Student's t on their logarithms (Georges, Buytaert & Eeckhout, Statistically Rigorous Java
Performance Evaluation, OOPSLA 2007; Kalibera & Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013): whatever
scatters within a process is in its median too. From eight processes on, one in eight is trimmed at either end (Tukey &
McLaughlin 1963; Yuen 1974), so that a process which something disturbed doesn't decide alone how wide the interval is.
Of one process alone, the interval is that of its rounds, and says nothing of the next process. Resampling both levels
was not chosen: a bootstrap of five processes has intervals too narrow by a quarter (the variance of five draws is 4/5
of that it stands for, and t's wider tails are missing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
# With n rounds the widest interval that any order statistics can give the median misses it with probability 2 · 0.5^n:
# 6 % for five rounds, 3 % for six. Below six, 95 % can't be promised.
MIN_ROUNDS_FOR_INTERVAL = 6
# Two processes have a difference, and nothing to hold it against.
MIN_PROCESSES_FOR_INTERVAL = 3
# Of so many processes and more, the least and the greatest median are trimmed.
TRIMMED_FROM = 8
# A median is known well enough when its interval reaches no further than this to either side.
STABLE_WITHIN_PERCENT = 1.0
# A ratio that is known to no better than this says nothing that a reader could use.
DROWNED_PERCENT = 25.0
# Twice the rounds should shrink an interval to 0.71 of its width; where it stays above this, more rounds don't help.
SHRINKING = 0.9


@dataclass(frozen=True)
class Spread:
    """The middle of a few values and the middle half of them, with the interval of the middle.

    `median` is that of the processes' medians. `low` and `high` hold it with 95 % confidence for processes to come,
    where there were three or more; of one process, where the rounds are independent, for rounds to come. None where
    there are too few: two processes, or less than six rounds of one. `n` is how many values there were.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    low: float | None
    high: float | None
    n: int
    processes: int = 1

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
    """The middle of ratios that were formed round by round, as in `Spread`, with its interval."""

    median: float
    low: float | None
    high: float | None
    confidence: float
    rounds: int
    processes: int = 1

    @property
    def drowned(self) -> bool:
        """Whether noise leaves nothing of it: half the interval's width exceeds `DROWNED_PERCENT` of the ratio."""
        if self.low is None or self.high is None:
            return False
        return 50 * (self.high - self.low) > DROWNED_PERCENT * self.median


@dataclass(frozen=True)
class MedianRatio:
    """The ratio of two medians, of series of separate runs, and its interval (None where one of them has too few
    processes). `median` is the ratio, as in `PairedRatio`; `processes` those of the run that has fewer.
    """

    median: float
    low: float | None
    high: float | None
    numerator_median: float
    denominator_median: float
    processes: int


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


def percentile_bound_ms(processes: Sequence[Sequence[int]], percent: float) -> float | None:
    """What the true percentile does not exceed, in ms, with 95 % confidence, of durations in ns; None if nothing is.

    Of n independent samples a binomially distributed number lies below the percentile (David & Nagaraja, Order
    Statistics, ch. 7.1): that is the bound of all calls together. Neighbouring calls are not quite independent, and
    calls of one process still less: where three or more processes have the percentile, the bound is at least Student's
    one-sided one on the logarithms of theirs.
    """
    every = np.concatenate([np.asarray(calls) for calls in processes]) if processes else np.empty(0)
    rank = int(stats.binom.ppf(CONFIDENCE, len(every), percent / 100))
    if rank >= len(every):
        return None
    bound = float(np.partition(every, rank)[rank]) * 1e-6
    each = [value for calls in processes if (value := percentile_ms(calls, percent)) is not None]
    if len(each) < MIN_PROCESSES_FOR_INTERVAL:
        return bound
    logarithms = np.log(each)
    reach = float(stats.t.ppf(CONFIDENCE, len(each) - 1)) * float(logarithms.std(ddof=1)) / len(each) ** 0.5
    return max(bound, math.exp(float(logarithms.mean()) + reach))


def spread(processes: Sequence[Sequence[float]]) -> Spread:
    """Middle, quartiles (linear interpolation, over all values) and interval, of at least one value of one process.

    Of one process, the interval's ends are order statistics, so it supposes no distribution (same source as the
    percentile's bound).
    """
    values = np.sort(np.concatenate([np.asarray(group, np.float64) for group in processes]))
    lower, upper = np.percentile(values, [25, 75])
    median, low, high = _between_processes(processes)
    if len(processes) == 1 and len(values) >= MIN_ROUNDS_FOR_INTERVAL:
        rank = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(values), 0.5))
        low, high = float(values[rank - 1]), float(values[-rank])
    return Spread(median, float(lower), float(upper), low, high, len(values), len(processes))


def _between_processes(
    processes: Sequence[Sequence[float] | np.ndarray], confidence: float = CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """The median of the processes' medians, and the interval of their trimmed geometric mean (None below three)."""
    medians = _medians(processes)
    middle = float(np.median(medians))
    if len(medians) < MIN_PROCESSES_FOR_INTERVAL:
        return middle, None, None
    logarithms, count = np.sort(np.log(medians)), len(medians)
    cut = count // TRIMMED_FROM
    winsorised = np.clip(logarithms, logarithms[cut], logarithms[count - 1 - cut])
    error = float(winsorised.std(ddof=1)) / ((1 - 2 * cut / count) * count**0.5)
    centre = float(logarithms[cut : count - cut].mean())
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 2 * cut - 1)) * error
    return middle, min(math.exp(centre - reach), middle), max(math.exp(centre + reach), middle)


def _medians(processes: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The median of each process, float64 [P]."""
    return np.asarray([np.median(group) for group in processes], np.float64)


def settled(values: Sequence[float]) -> bool:
    """Whether more rounds of this process would tell little more: the median is stable, or its interval has stopped
    shrinking.
    """
    now, before = spread([values]), spread([values[: len(values) // 2] or values])
    if now.stable or now.half_width_percent is None or before.half_width_percent is None:
        return now.stable
    return now.half_width_percent >= SHRINKING * before.half_width_percent


def paired_ratio(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]], confidence: float = CONFIDENCE
) -> PairedRatio:
    """The ratio of two series of which the i-th values of the k-th processes belong to the same round, so that drift
    hits both alike.

    The median over the rounds resists a round that another process disturbed. Of one process, the interval is the
    percentile bootstrap's (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13) with a fixed seed: the same
    samples always give the same interval.

    Raises:
        ValueError: the series differ in length or are empty.
    """
    lengths = [[len(group) for group in series] for series in (numerators, denominators)]
    if lengths[0] != lengths[1] or not lengths[0] or 0 in lengths[0]:
        raise ValueError(f"paired series of the same lengths ≥ 1 are needed, got {lengths[0]} and {lengths[1]}")
    ratios = [
        np.asarray(above, np.float64) / np.asarray(below, np.float64)
        for above, below in zip(numerators, denominators, strict=True)
    ]
    median, low, high = _between_processes(ratios, confidence)
    if len(ratios) == 1:
        low, high = _bootstrap_interval(ratios[0], confidence)
    return PairedRatio(median, low, high, confidence, sum(lengths[0]), len(ratios))


def ratio_of_medians(numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]) -> MedianRatio:
    """The ratio of two series that have nothing in common but what was measured: each process's values of both.

    Its interval is Welch's, on the logarithms of the processes' medians (Welch 1947): the two runs may scatter
    differently. It holds what scattered between the processes of each run, not what differed between the runs'
    moments.

    Raises:
        ValueError: a series is empty.
    """
    if not numerators or not denominators:
        raise ValueError(
            f"two series of at least one process are needed, got {len(numerators)} and {len(denominators)}"
        )
    above, below = _medians(numerators), _medians(denominators)
    middles = float(np.median(above)), float(np.median(below))
    ratio, processes = middles[0] / middles[1], min(len(above), len(below))
    low = high = None
    if processes >= MIN_PROCESSES_FOR_INTERVAL:
        interval = stats.ttest_ind(np.log(above), np.log(below), equal_var=False).confidence_interval(CONFIDENCE)
        if math.isnan(interval.low):  # none of both scatters at all
            low = high = ratio
        else:
            low, high = min(math.exp(interval.low), ratio), max(math.exp(interval.high), ratio)
    return MedianRatio(ratio, low, high, *middles, processes)


Decision = Literal["slower", "not slower", "inconclusive"]


def decide(ratio: PairedRatio | MedianRatio, threshold_percent: float) -> Decision:
    """Whether the whole interval lies below 1 - threshold, or at it and above: slower beyond what the scatter explains,
    or not slower than is allowed. Anything else is inconclusive, and so is one process: the next may differ.
    """
    bound = 1 - threshold_percent / 100
    if ratio.low is None or ratio.high is None or ratio.processes < MIN_PROCESSES_FOR_INTERVAL:
        return "inconclusive"
    if ratio.high < bound:
        return "slower"
    return "not slower" if ratio.low >= bound else "inconclusive"


def _bootstrap_interval(values: np.ndarray, confidence: float) -> tuple[float | None, float | None]:
    """The percentile bootstrap's interval of the median; None below six values."""
    if len(values) < MIN_ROUNDS_FOR_INTERVAL:
        return None, None
    interval = stats.bootstrap(
        (values,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)

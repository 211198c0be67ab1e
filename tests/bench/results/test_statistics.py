"""Against values that a textbook or a closed form gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.results.statistics import (
    paired_ratio,
    percentile_ms,
    percentile_upper_bound_ms,
    ratio_of_medians,
    settled,
    spread,
    throughput,
)


def test_throughput_is_all_images_over_all_time() -> None:
    assert throughput(64, [1_000_000, 3_000_000]) == pytest.approx(128 / 0.004)


def test_percentiles_are_measured_values() -> None:
    durations = [ms * 1_000_000 for ms in range(1, 101)]
    np.random.default_rng(0).shuffle(durations)
    assert [percentile_ms(durations, percent) for percent in (50, 90, 99)] == [50.0, 90.0, 99.0]


@pytest.mark.parametrize(("percent", "enough"), [(50, 2), (90, 10), (99, 100)])
def test_no_percentile_of_too_few_samples(percent: float, enough: int) -> None:
    assert percentile_ms([1_000_000] * (enough - 1), percent) is None
    assert percentile_ms([1_000_000] * enough, percent) == 1.0


def test_spread_is_median_and_quartiles() -> None:
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.lower_quartile, found.median, found.upper_quartile, found.n) == (2.0, 3.0, 4.0, 5)
    assert (found.low, found.high, found.stable) == (None, None, False), "five values promise no interval"


def test_the_medians_interval_is_that_of_order_statistics() -> None:
    """Conover, Practical Nonparametric Statistics, table of the sign test: for n = 10 the second and the ninth value,
    for n = 16 the fourth and the thirteenth.
    """
    for n, rank in ((6, 1), (10, 2), (16, 4)):
        found = spread([float(value) for value in range(1, n + 1)])
        assert (found.low, found.high) == (rank, n + 1 - rank)


def test_the_medians_interval_covers_the_median() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        found = spread(list(rng.lognormal(0, 0.5, 15)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert held >= 375


def test_stable_is_within_one_percent() -> None:
    assert spread([100 + 0.1 * value for value in range(-5, 6)]).stable
    assert not spread([100.0 + value for value in range(-5, 6)]).stable


def test_settled_when_stable_or_no_longer_shrinking() -> None:
    rng = np.random.default_rng(0)
    noise = list(rng.normal(100, 10, 400))
    assert not settled(noise[:5]), "no interval yet"
    assert not settled(noise), "twice the rounds still halve the error's square"
    assert settled(list(rng.normal(100, 1, 100)))
    drifting = [100.0 + value for value in range(40)]
    assert settled(drifting), "more rounds only make it wider"


def test_the_percentiles_bound_is_exceeded_by_chance_only() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        bound = percentile_upper_bound_ms([int(value) for value in rng.uniform(0, 1e6, 500)], 99)
        assert bound is not None
        held += bound >= 0.99
    assert held >= 280
    assert percentile_upper_bound_ms([1_000_000] * 298, 99) is None
    assert percentile_upper_bound_ms([1_000_000] * 299, 99) == 1.0


def test_a_ratio_is_paired_so_that_drift_cancels() -> None:
    """A machine that gets three times slower during the run: medians of the two series overlap, the pairs don't."""
    drift = np.linspace(3, 1, 12)
    ratio = paired_ratio(list(110 * drift), list(100 * drift))
    assert ratio.median == pytest.approx(1.1)
    assert ratio.low == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.1)


def test_one_disturbed_round_does_not_move_it() -> None:
    numerators = [102.0, 98, 101, 99, 100, 10, 100, 101]
    ratio = paired_ratio(numerators, [100.0] * 8)
    assert ratio.median == pytest.approx(1.0, abs=0.01)


def test_the_interval_is_the_bootstraps() -> None:
    """The survival times of the treated mice, Efron & Tibshirani, An Introduction to the Bootstrap, table 2.1.

    The bootstrap distribution of a median of seven is known exactly: the median of a resample is at most the
    k-th value when at least four of seven draws are among the k smallest.
    """
    mice = sorted([94.0, 197, 16, 38, 99, 141, 23])
    below = [stats.binom.sf(3, 7, k / 7) for k in range(1, 8)]
    low = mice[next(k for k, share in enumerate(below) if share >= 0.025)]
    high = mice[next(k for k, share in enumerate(below) if share >= 0.975)]
    ratio = paired_ratio(mice, [1.0] * 7)
    assert ratio.median == 94
    assert (ratio.low, ratio.high) == (low, high) == (23, 141)
    assert ratio == paired_ratio(mice, [1.0] * 7), "the seed is fixed"


def test_five_rounds_promise_no_interval() -> None:
    five = paired_ratio([1.0, 2, 3, 4, 5], [1.0] * 5)
    assert (five.median, five.low, five.high, five.rounds) == (3.0, None, None, 5)
    assert paired_ratio([1.0, 2, 3, 4, 5, 6], [1.0] * 6).low is not None


def test_the_interval_covers_the_truth() -> None:
    """Of 200 series of ten rounds with 3 % noise, 95 % of the intervals should hold the true ratio, give or take."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        noise = rng.lognormal(0, 0.03, (2, 10))
        ratio = paired_ratio(list(1.05 * noise[0]), list(noise[1]))
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.05 <= ratio.high
    assert held >= 180


@pytest.mark.parametrize("series", [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_series_are_refused(series: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="paired series of the same length"):
        paired_ratio(*series)


def test_a_ratio_of_medians_needs_no_pairs() -> None:
    """Seven rounds against nine, in any order, and the rounds of neither are matched with the other's."""
    above, below = [11.0, 12, 13, 14, 15, 16, 17], [7.0 + n / 10 for n in range(-4, 5)]
    ratio = ratio_of_medians(above, below)
    assert (ratio.median, ratio.numerator_median, ratio.denominator_median) == (2.0, 14.0, 7.0)
    assert ratio.low is not None
    assert ratio.high is not None
    assert 1.5 < ratio.low < 2.0 < ratio.high < 2.5
    assert ratio == ratio_of_medians(above, below), "the seed is fixed"


def test_its_interval_is_the_bootstraps() -> None:
    """Against a constant, it is the interval of one median: the mice's again, known exactly."""
    ratio = ratio_of_medians([94.0, 197, 16, 38, 99, 141, 23], [1.0] * 7)
    assert (ratio.low, ratio.high) == (23, 141)


def test_its_interval_covers_the_truth() -> None:
    """Of 100 pairs of runs of ten and twelve rounds with 3 % noise, 95 % should hold the true ratio, give or take."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(100):
        ratio = ratio_of_medians(list(1.05 * rng.lognormal(0, 0.03, 10)), list(rng.lognormal(0, 0.03, 12)))
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.05 <= ratio.high
    assert held >= 90


def test_five_rounds_on_either_side_promise_no_interval() -> None:
    five, six = [1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5, 6]
    for above, below in ((five, six), (six, five)):
        ratio = ratio_of_medians(above, below)
        assert (ratio.low, ratio.high) == (None, None)
    assert ratio_of_medians(six, six).low is not None
    with pytest.raises(ValueError, match="got 0 and 6"):
        ratio_of_medians([], six)

"""Against values that a textbook or a closed form gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.results.statistics import (
    decide,
    paired_ratio,
    percentile_bound_ms,
    percentile_ms,
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
    found = spread([[5.0, 1.0, 3.0, 2.0, 4.0]])
    assert (found.lower_quartile, found.median, found.upper_quartile, found.n) == (2.0, 3.0, 4.0, 5)
    assert (found.low, found.high, found.stable) == (None, None, False), "five values promise no interval"


def test_the_medians_interval_is_that_of_order_statistics() -> None:
    """Conover, Practical Nonparametric Statistics, table of the sign test: for n = 10 the second and the ninth value,
    for n = 16 the fourth and the thirteenth.
    """
    for n, rank in ((6, 1), (10, 2), (16, 4)):
        found = spread([[float(value) for value in range(1, n + 1)]])
        assert (found.low, found.high) == (rank, n + 1 - rank)


def test_the_medians_interval_covers_the_median() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        found = spread([list(rng.lognormal(0, 0.5, 15))])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert held >= 375


def test_stable_is_within_one_percent() -> None:
    assert spread([[100 + 0.1 * value for value in range(-5, 6)]]).stable
    assert not spread([[100.0 + value for value in range(-5, 6)]]).stable


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
        bound = percentile_bound_ms([[int(value) for value in rng.uniform(0, 1e6, 500)]], 99)
        assert bound is not None
        held += bound >= 0.99
    assert held >= 280
    assert percentile_bound_ms([[1_000_000] * 298], 99) is None
    assert percentile_bound_ms([[1_000_000] * 299], 99) == 1.0


def test_a_ratio_is_paired_so_that_drift_cancels() -> None:
    """A machine that gets three times slower during the run: medians of the two series overlap, the pairs don't."""
    drift = np.linspace(3, 1, 12)
    ratio = paired_ratio([list(110 * drift)], [list(100 * drift)])
    assert ratio.median == pytest.approx(1.1)
    assert ratio.low == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.1)


def test_one_disturbed_round_does_not_move_it() -> None:
    numerators = [102.0, 98, 101, 99, 100, 10, 100, 101]
    ratio = paired_ratio([numerators], [[100.0] * 8])
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
    ratio = paired_ratio([mice], [[1.0] * 7])
    assert ratio.median == 94
    assert (ratio.low, ratio.high) == (low, high) == (23, 141)
    assert ratio == paired_ratio([mice], [[1.0] * 7]), "the seed is fixed"


def test_five_rounds_promise_no_interval() -> None:
    five = paired_ratio([[1.0, 2, 3, 4, 5]], [[1.0] * 5])
    assert (five.median, five.low, five.high, five.rounds) == (3.0, None, None, 5)
    assert paired_ratio([[1.0, 2, 3, 4, 5, 6]], [[1.0] * 6]).low is not None


def test_the_interval_covers_the_truth() -> None:
    """Of 200 series of ten rounds with 3 % noise, 95 % of the intervals should hold the true ratio, give or take."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        noise = rng.lognormal(0, 0.03, (2, 10))
        ratio = paired_ratio([list(1.05 * noise[0])], [list(noise[1])])
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.05 <= ratio.high
    assert held >= 180


@pytest.mark.parametrize("series", [([], []), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [[1.0], [1.0]]), ([[]], [[]])])
def test_unpaired_series_are_refused(series: tuple[list[list[float]], list[list[float]]]) -> None:
    with pytest.raises(ValueError, match="paired series of the same lengths"):
        paired_ratio(*series)


# -- processes -------------------------------------------------------------------------------------------------------


def drawn(rng: np.random.Generator, processes: int, rounds: int, between: float, within: float) -> list[list[float]]:
    """Values around 1 of processes that differ by `between`, and scatter by `within` (standard deviations of logs)."""
    levels = rng.lognormal(0, between, processes)
    return [list(level * rng.lognormal(0, within, rounds)) for level in levels]


def test_the_interval_is_students_on_the_processes_medians() -> None:
    """A worked example: logs 0, 0.1, 0.2 have mean 0.1 and deviation 0.1; t with 2 degrees of freedom is 4.303."""
    found = spread([[float(np.exp(log))] * 4 for log in (0.1, 0.0, 0.2)])
    assert found.median == pytest.approx(np.exp(0.1))
    assert found.low == pytest.approx(np.exp(0.1 - 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    assert found.high == pytest.approx(np.exp(0.1 + 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    assert (found.n, found.processes) == (12, 3)
    two = spread([[1.0] * 9, [1.1] * 9])
    assert (two.low, two.high, two.stable) == (None, None, False), "two processes promise no interval"


@pytest.mark.parametrize("processes", [3, 5])
def test_intervals_hold_for_the_next_process(processes: int) -> None:
    """Between processes 10 %, within them 1 %: the rounds of one say nothing of the others. 95 % of 400, give or take
    three standard deviations; of the rounds alone, as if they were independent, not half would hold.
    """
    rng = np.random.default_rng(11)
    held, naive = 0, 0
    for _ in range(400):
        series = drawn(rng, processes, 6, 0.1, 0.01)
        found, pooled = spread(series), spread([[value for group in series for value in group]])
        assert None not in (found.low, found.high, pooled.low, pooled.high)
        held += found.low <= 1 <= found.high  # type: ignore[operator]
        naive += pooled.low <= 1 <= pooled.high  # type: ignore[operator]
    assert 367 <= held <= 393
    assert naive < 320


def test_one_disturbed_process_of_many_does_not_decide() -> None:
    """Seven have no trimming. Of eight the least and the greatest are left out, and the interval still holds the truth
    as often as it says: 95 % of 600, give or take three standard deviations.
    """
    calm = [[1 + 0.01 * (number % 3)] for number in range(7)]
    widths = [spread([*calm, *more]).half_width_percent for more in ([], [[0.5]])]
    assert None not in widths
    assert widths[1] < 2 * widths[0]  # type: ignore[operator]
    assert spread([*calm[:6], [0.5]]).half_width_percent > 10 * widths[0]  # type: ignore[operator]
    rng = np.random.default_rng(14)
    held = 0
    for _ in range(600):
        found = spread(drawn(rng, 10, 3, 0.05, 0.01))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 <= found.high
    assert 554 <= held <= 586


def test_a_ratios_interval_is_that_of_the_processes_too() -> None:
    rng = np.random.default_rng(12)
    held = 0
    for _ in range(400):
        above, below = drawn(rng, 5, 3, 0.05, 0.02), drawn(rng, 5, 3, 0.05, 0.02)
        ratio = paired_ratio([[1.05 * value for value in group] for group in above], below)
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.05 <= ratio.high
    assert 367 <= held <= 393
    assert (ratio.rounds, ratio.processes) == (15, 5)


def test_a_percentiles_bound_knows_of_processes() -> None:
    """Each has a p99 of its own; all calls together, as if they were independent, would hold too seldom."""
    rng = np.random.default_rng(13)
    truth = float(np.exp(0.2 * stats.norm.ppf(0.5)))  # the median process, whose calls are all alike
    held = naive = 0
    for _ in range(300):
        calls = [[int(1e6 * level)] * 150 for level in rng.lognormal(0, 0.2, 5)]
        bound = percentile_bound_ms(calls, 50)
        pooled = percentile_bound_ms([[duration for process in calls for duration in process]], 50)
        assert bound is not None
        assert pooled is not None
        held, naive = held + (bound >= truth), naive + (pooled >= truth)
    assert held >= 277
    assert naive < 240


@pytest.mark.parametrize(
    ("logs", "decision"),
    [
        ([-0.2, -0.21, -0.19], "slower"),
        ([0.0, 0.01, -0.01], "not slower"),
        ([0.0, 0.2, -0.2], "inconclusive"),
        ([-0.06, -0.05, -0.04], "inconclusive"),
        ([-0.2, -0.2], "inconclusive"),  # two processes
    ],
)
def test_three_decisions(logs: list[float], decision: str) -> None:
    """5 % are allowed. Both ends of the interval decide, and never one process or two."""
    ratio = paired_ratio([[float(np.exp(log))] * 3 for log in logs], [[1.0] * 3 for _ in logs])
    assert decide(ratio, 5) == decision


def test_one_process_decides_nothing() -> None:
    ratio = paired_ratio([[0.5] * 20], [[1.0] * 20])
    assert ratio.high == 0.5
    assert decide(ratio, 5) == "inconclusive"


def test_a_ratio_of_medians_needs_no_pairs() -> None:
    """Three processes against five, whose rounds are not matched: the medians 14 and 7."""
    above = [[13.5, 14.0, 99.0], [14.0], [14.2, 14.4]]
    below = [[7.0 + n / 10] * 4 for n in range(-2, 3)]
    ratio = ratio_of_medians(above, below)
    assert (ratio.median, ratio.numerator_median, ratio.denominator_median) == (2.0, 14.0, 7.0)
    assert ratio.processes == 3
    assert ratio.low is not None
    assert ratio.high is not None
    assert 1.9 < ratio.low < 2.0 < ratio.high < 2.1


def test_its_interval_is_welchs() -> None:
    """Welch, The Generalization of Student's Problem when Several Different Population Variances are Involved (1947):
    by hand, with s² = 1 and 4 over n = 4 and 5, so that the degrees of freedom are 1.05² / (0.25²/3 + 0.8²/4).
    """
    above = [[float(np.exp(log))] for log in np.array([-1, -1, 1, 1]) * 0.75**0.5]
    below = [[float(np.exp(log))] for log in np.array([-2, -2, 0, 2, 2]) * 1.0]
    ratio = ratio_of_medians(above, below)
    reach = stats.t.ppf(0.975, 1.05**2 / (0.25**2 / 3 + 0.8**2 / 4)) * 1.05**0.5
    assert np.log(ratio.high) == pytest.approx(reach, rel=1e-6)
    assert np.log(ratio.low) == pytest.approx(-reach, rel=1e-6)


def test_its_interval_covers_the_truth() -> None:
    """Of 400 pairs of runs of four and six processes, 95 % should hold the true ratio, give or take."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        above = [[1.05 * value for value in group] for group in drawn(rng, 4, 3, 0.05, 0.01)]
        ratio = ratio_of_medians(above, drawn(rng, 6, 3, 0.1, 0.02))
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.05 <= ratio.high
    assert 360 <= held <= 395


def test_two_processes_on_either_side_promise_no_interval() -> None:
    two, three = [[1.0], [2.0]], [[1.0], [2.0], [3.0]]
    for above, below in ((two, three), (three, two)):
        ratio = ratio_of_medians(above, below)
        assert (ratio.low, ratio.high) == (None, None)
    assert ratio_of_medians(three, three).low is not None
    with pytest.raises(ValueError, match="got 0 and 3"):
        ratio_of_medians([], three)

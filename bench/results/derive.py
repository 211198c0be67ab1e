"""From a run's raw samples to its rows and ratios.

Owns which samples belong together. Knows neither clocks nor tables; the arithmetic is `bench.results.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.results.roofline import Point, Rate, Survey, place
from bench.results.schema import Against, Percentiles, Ratio, Result, Row, Sample, SubjectResult
from bench.results.statistics import (
    PairedRatio,
    paired_ratio,
    percentile_ms,
    percentile_upper_bound_ms,
    settled,
    shown_slower,
    spread,
    throughput,
)
from bench.results.terms import CONTROL_SUFFIX, LETTER_SIGN, TIMINGS, Timing, label_of

CONFIRMED_ROUNDS = 20
# NVIDIA's counter moves on some ten times a second: over so long a time it is right to a few percent.
ENERGY_FROM_S = 2.0


def derived(result: Result) -> Result:
    """The result with its rows, roofline and ratios computed anew from its raw samples."""
    new_rows = rows(result.samples, result.subjects)
    again = {
        "rows": new_rows,
        "roofline": roofline(new_rows, result.subjects, result.survey),
        "ratios": ratios(result.samples, result.subjects),
    }
    return result.model_copy(update=again)


def slower(ratios: Sequence[Ratio], threshold_percent: float) -> list[Ratio]:
    """Those against the base that are shown to be slower."""
    return [r for r in ratios if r.against == "base" and shown_slower(r.throughput_ratio, threshold_percent)]


def rows(samples: Sequence[Sample], subjects: Sequence[SubjectResult]) -> tuple[Row, ...]:
    """One row for each subject and batch size that was measured, by subject in the order given."""
    made = []
    for subject in subjects:
        its_samples = [sample for sample in samples if sample.subject == subject.label]
        made += [
            _row(its_samples, subject, batch_size)
            for batch_size in sorted({sample.batch_size for sample in its_samples})
        ]
    return tuple(made)


def _row(samples: Sequence[Sample], subject: SubjectResult, batch_size: int) -> Row:
    device, whole = (
        spread(list(_throughputs(samples, subject.label, batch_size, timing).values())) for timing in TIMINGS
    )
    timer = subject.timer_overhead_ns
    return Row(
        subject=subject.label,
        batch_size=batch_size,
        device_resident_throughput_images_per_s=device,
        end_to_end_throughput_images_per_s=whole,
        device_resident_latency_ms=_percentiles(samples, subject.label, batch_size, "device_resident"),
        end_to_end_latency_ms=_percentiles(samples, subject.label, batch_size, "end_to_end"),
        gpu_latency_p50_ms=percentile_ms(
            [duration for sample in samples if sample.batch_size == batch_size for duration in sample.gpu_durations_ns],
            50,
        ),
        verdict="stable" if device.stable and whole.stable else "unstable",
        timer_share_percent=None if timer is None else 100 * timer * 1e-9 * device.median / batch_size,
        energy_per_image_j=_energy_per_image(samples, batch_size),
    )


def _energy_per_image(samples: Sequence[Sample], batch_size: int) -> dict[str, float]:
    """Joules by counter, over all device-resident blocks of one subject at once; empty where they are too short."""
    blocks = [sample for sample in samples if (sample.batch_size, sample.timing) == (batch_size, "device_resident")]
    if sum(sum(block.durations_ns) for block in blocks) < ENERGY_FROM_S * 1e9:
        return {}
    images = sum(batch_size * len(block.durations_ns) for block in blocks)
    counters = {counter for block in blocks for counter in block.energy_j}
    return {counter: sum(block.energy_j.get(counter, 0.0) for block in blocks) / images for counter in sorted(counters)}


def enough(samples: Sequence[Sample]) -> bool:
    """Whether every throughput is stable, or its interval has stopped shrinking: more rounds would tell little more."""
    keys = dict.fromkeys((sample.subject, sample.batch_size, sample.timing) for sample in samples)
    return all(settled(list(_throughputs(samples, *key).values())) for key in keys)


def decided(samples: Sequence[Sample], subjects: Sequence[SubjectResult], bound: float) -> bool:
    """Whether each ratio against the base lies, with its whole interval, on one side of `bound`.

    Below it only after `CONFIRMED_ROUNDS`: a disturbance that lasts a few rounds must not look like a slower bundle.
    """

    def on_one_side(ratio: PairedRatio) -> bool:
        if ratio.low is None or ratio.high is None:
            return False
        return ratio.low > bound or (ratio.high < bound and ratio.rounds >= CONFIRMED_ROUNDS)

    return all(on_one_side(ratio.throughput_ratio) for ratio in ratios(samples, subjects) if ratio.against == "base")


def _throughputs(samples: Sequence[Sample], subject: str, batch_size: int, timing: Timing) -> dict[int, float]:
    """Round → images per second."""
    return {
        sample.round: throughput(batch_size, sample.durations_ns)
        for sample in samples
        if (sample.subject, sample.batch_size, sample.timing) == (subject, batch_size, timing)
    }


def _percentiles(samples: Sequence[Sample], subject: str, batch_size: int, timing: Timing) -> Percentiles:
    """Over all calls of all rounds at once: percentiles are never averaged."""
    durations = [
        duration
        for sample in samples
        if (sample.subject, sample.batch_size, sample.timing) == (subject, batch_size, timing)
        for duration in sample.durations_ns
    ]
    values = {
        f"p{percent}{suffix}": function(durations, percent)
        for percent in (50, 90, 99)
        for suffix, function in (("", percentile_ms), ("_upper", percentile_upper_bound_ms))
    }
    return Percentiles(**values)


def roofline(rows: Sequence[Row], subjects: Sequence[SubjectResult], surveyed: Survey | None) -> tuple[Point, ...]:
    """The place under the roofline of its device, where that was measured, of every row but those that are wrong: who
    knows whether they did the work.
    """
    if surveyed is None:
        return ()
    rates = [
        Rate(
            subject.label,
            row.batch_size,
            subject.device,
            subject.file.precision,
            row.device_resident_throughput_images_per_s.median,
            row.end_to_end_throughput_images_per_s.median,
        )
        for subject in subjects
        for row in sorted((row for row in rows if row.subject == subject.label), key=lambda row: row.batch_size)
        if subject.device != "none" and subject.file is not None and (subject.parity is None or subject.parity.passed)
    ]
    return place(rates, surveyed)


def ratios(samples: Sequence[Sample], subjects: Sequence[SubjectResult]) -> tuple[Ratio, ...]:
    """Every subject against torch on its device, with the same bundle; every folded file against its unfolded control;
    and, in a run of several bundles, each against the first on the same backend.
    """
    labels = {subject.label: subject for subject in subjects}
    base = next((subject.letter for subject in subjects if subject.letter is not None), None)
    pairs: list[tuple[Against, str, str]] = []
    for subject in subjects:
        reference = label_of(f"torch-{subject.device}", letter=subject.letter)
        if reference in labels and subject.label != reference:
            pairs.append(("torch", subject.label, reference))
        if subject.label + CONTROL_SUFFIX in labels:
            pairs.append(("control", subject.label, subject.label + CONTROL_SUFFIX))
        first = subject.label.replace(LETTER_SIGN + (subject.letter or ""), LETTER_SIGN + (base or ""))
        if subject.letter not in (None, base) and first in labels:
            pairs.append(("base", subject.label, first))
    made = []
    for against, numerator, denominator in pairs:
        for batch_size in sorted({sample.batch_size for sample in samples}):
            for timing in TIMINGS:
                above = _throughputs(samples, numerator, batch_size, timing)
                below = _throughputs(samples, denominator, batch_size, timing)
                shared = sorted(above.keys() & below.keys())
                if shared:
                    ratio = paired_ratio([above[r] for r in shared], [below[r] for r in shared])
                    made.append(
                        Ratio(
                            against=against,
                            numerator=numerator,
                            denominator=denominator,
                            batch_size=batch_size,
                            timing=timing,
                            throughput_ratio=ratio,
                        )
                    )
    return tuple(made)

"""From a run's raw samples to its rows and ratios.

Owns which samples belong together. Knows neither clocks nor tables; the arithmetic is `bench.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.measure import Timing
from bench.results import Against, Percentiles, Ratio, Row, Sample, SubjectResult
from bench.statistics import paired_ratio, percentile_ms, spread, throughput

TIMINGS: tuple[Timing, ...] = ("device_resident", "end_to_end")
CONTROL_SUFFIX, LETTER_SIGN = ":unfolded", "@"


def slower(ratios: Sequence[Ratio], threshold_percent: float) -> list[Ratio]:
    """Those against the base whose whole interval lies below 1 - threshold: slower beyond what noise explains."""
    bound = 1 - threshold_percent / 100
    return [
        ratio
        for ratio in ratios
        if ratio.against == "base" and ratio.throughput_ratio.high is not None and ratio.throughput_ratio.high < bound
    ]


def rows(samples: Sequence[Sample]) -> tuple[Row, ...]:
    """One row for each subject and batch size, by subject in order of appearance."""
    keys = dict.fromkeys((sample.subject, sample.batch_size) for sample in samples)
    order = {subject: place for place, subject in enumerate(dict.fromkeys(sample.subject for sample in samples))}
    return tuple(_row(samples, *key) for key in sorted(keys, key=lambda key: (order[key[0]], key[1])))


def _row(samples: Sequence[Sample], subject: str, batch_size: int) -> Row:
    device, whole = (_throughputs(samples, subject, batch_size, timing) for timing in TIMINGS)
    return Row(
        subject=subject,
        batch_size=batch_size,
        device_resident_throughput_images_per_s=spread(list(device.values())),
        end_to_end_throughput_images_per_s=spread(list(whole.values())),
        device_resident_latency_ms=_percentiles(samples, subject, batch_size, "device_resident"),
        end_to_end_latency_ms=_percentiles(samples, subject, batch_size, "end_to_end"),
    )


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
    p50, p90, p99 = (percentile_ms(durations, percent) for percent in (50, 90, 99))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def ratios(samples: Sequence[Sample], subjects: Sequence[SubjectResult]) -> tuple[Ratio, ...]:
    """Every subject against torch on its device, with the same bundle; every folded file against its unfolded control;
    and, in a run of several bundles, each against the first on the same backend.
    """
    labels = {subject.label: subject for subject in subjects}
    base = next((subject.letter for subject in subjects if subject.letter is not None), None)
    pairs: list[tuple[Against, str, str]] = []
    for subject in subjects:
        marked = "" if subject.letter is None else LETTER_SIGN + subject.letter
        reference = f"torch-{subject.device}{marked}"
        if reference in labels and subject.label != reference:
            pairs.append(("torch", subject.label, reference))
        if subject.label + CONTROL_SUFFIX in labels:
            pairs.append(("control", subject.label, subject.label + CONTROL_SUFFIX))
        if subject.letter not in (None, base) and (first := f"{subject.backend}{LETTER_SIGN}{base}") in labels:
            pairs.append(("base", subject.label, first))
    found = []
    for against, numerator, denominator in pairs:
        for batch_size in sorted({sample.batch_size for sample in samples}):
            for timing in TIMINGS:
                above = _throughputs(samples, numerator, batch_size, timing)
                below = _throughputs(samples, denominator, batch_size, timing)
                shared = sorted(above.keys() & below.keys())
                if shared:
                    ratio = paired_ratio([above[r] for r in shared], [below[r] for r in shared])
                    found.append(
                        Ratio(
                            against=against,
                            numerator=numerator,
                            denominator=denominator,
                            batch_size=batch_size,
                            timing=timing,
                            throughput_ratio=ratio,
                        )
                    )
    return tuple(found)

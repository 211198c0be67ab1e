"""From a run's raw samples to its rows and ratios.

Owns which samples belong together. Knows neither clocks nor tables; the arithmetic is `bench.results.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.machine.environment import mostly_busy
from bench.results.roofline import Point, Rate, Survey, place
from bench.results.schema import Against, Percentiles, Ratio, Result, Row, Sample, SubjectResult
from bench.results.statistics import (
    CONFIDENCE,
    MIN_PROCESSES_FOR_INTERVAL,
    Decision,
    decide,
    paired_ratio,
    percentile_bound_ms,
    percentile_ms,
    settled,
    spread,
    throughput,
)
from bench.results.terms import CONTROL_SUFFIX, LETTER_SIGN, TIMINGS, Timing, label_of

LOOK_CONFIDENCE = 0.999
# NVIDIA's counter moves on some ten times a second: over a block of so long a time it is right to a few percent.
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


def verdicts(result: Result, threshold_percent: float) -> list[tuple[Ratio, Decision]]:
    """What is decided of every ratio against the base.

    An alarm needs a machine that was not busy with something else: there "slower" becomes "inconclusive".
    """
    judged = [(r, decide(r.throughput_ratio, threshold_percent)) for r in result.ratios if r.against == "base"]
    if not was_busy(result):
        return judged
    return [(ratio, "inconclusive" if decision == "slower" else decision) for ratio, decision in judged]


def was_busy(result: Result) -> bool:
    """Whether other processes used the CPUs most of the times that this was looked at."""
    return mostly_busy((result.environment.cpu_busy_percent, *result.cpu_busy_percents))


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
    device, whole = (spread(by_process(throughputs(samples, subject.label, batch_size, timing))) for timing in TIMINGS)
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
        system_share_percent=_system_share(samples, batch_size),
        timer_share_percent=None if timer is None else 100 * timer * 1e-9 * device.median / batch_size,
        energy_per_image_j=_energy_per_image(samples, batch_size),
    )


def _system_share(samples: Sequence[Sample], batch_size: int) -> float | None:
    """The operating system's part of the CPU time of one subject's end-to-end blocks; None where it wasn't counted."""
    blocks = [sample for sample in samples if (sample.batch_size, sample.timing) == (batch_size, "end_to_end")]
    total = sum(block.cpu_s or 0.0 for block in blocks)
    return 100 * sum(block.system_s or 0.0 for block in blocks) / total if total else None


def _energy_per_image(samples: Sequence[Sample], batch_size: int) -> dict[str, float]:
    """Joules by counter, over the device-resident blocks of one subject that are long enough; empty where none is."""
    timed = [sample for sample in samples if (sample.batch_size, sample.timing) == (batch_size, "device_resident")]
    blocks = [block for block in timed if sum(block.durations_ns) >= ENERGY_FROM_S * 1e9]
    if not blocks:
        return {}
    images = sum(batch_size * len(block.durations_ns) for block in blocks)
    counters = {counter for block in blocks for counter in block.energy_j}
    return {counter: sum(block.energy_j.get(counter, 0.0) for block in blocks) / images for counter in sorted(counters)}


def enough(samples: Sequence[Sample]) -> bool:
    """Of one process: whether more rounds would tell little more of it. See `statistics.settled`."""
    keys = dict.fromkeys((sample.subject, sample.batch_size, sample.timing) for sample in samples)
    return all(settled(list(throughputs(samples, *key).values())) for key in keys)


def stable(samples: Sequence[Sample]) -> bool:
    """Whether every throughput is known to within `statistics.STABLE_WITHIN_PERCENT`, for processes to come."""
    keys = dict.fromkeys((sample.subject, sample.batch_size, sample.timing) for sample in samples)
    spreads = [spread(by_process(throughputs(samples, *key))) for key in keys]
    return all(known.stable and known.processes >= MIN_PROCESSES_FOR_INTERVAL for known in spreads)


def decided(samples: Sequence[Sample], subjects: Sequence[SubjectResult], bound: float) -> bool:
    """Whether each ratio against the base lies, with its whole interval, on one side of `bound`.

    With an interval that holds 99.9 %, since this is asked after every process: so many looks at 95 % would find by
    chance what isn't there. The verdict after the last of them is that of the 95 % interval.
    """
    against_base = [ratio for ratio in ratios(samples, subjects, LOOK_CONFIDENCE) if ratio.against == "base"]
    percent = 100 * (1 - bound)
    return all(decide(ratio.throughput_ratio, percent) != "inconclusive" for ratio in against_base)


def throughputs(
    samples: Sequence[Sample], subject: str, batch_size: int, timing: Timing
) -> dict[tuple[int, int], float]:
    """Process and round → images per second, in the order of both."""
    return {
        (sample.process, sample.round): throughput(batch_size, sample.durations_ns)
        for sample in samples
        if (sample.subject, sample.batch_size, sample.timing) == (subject, batch_size, timing)
    }


def by_process(values: Mapping[tuple[int, int], float]) -> list[list[float]]:
    """The values of each process, in the order of its rounds."""
    grouped: dict[int, list[float]] = {}
    for (process, _), value in values.items():
        grouped.setdefault(process, []).append(value)
    return list(grouped.values())


def durations(samples: Sequence[Sample], subject: str, batch_size: int, timing: Timing) -> dict[int, list[int]]:
    """Process → how long its calls took, in ns, all rounds together."""
    calls: dict[int, list[int]] = {}
    for sample in samples:
        if (sample.subject, sample.batch_size, sample.timing) == (subject, batch_size, timing):
            calls.setdefault(sample.process, []).extend(sample.durations_ns)
    return calls


def _percentiles(samples: Sequence[Sample], subject: str, batch_size: int, timing: Timing) -> Percentiles:
    """Over all calls of all rounds and processes at once: percentiles are never averaged."""
    calls = list(durations(samples, subject, batch_size, timing).values())
    every = [duration for process in calls for duration in process]
    values: dict[str, float | None] = {}
    for percent in (50, 90, 99):
        values[f"p{percent}"] = percentile_ms(every, percent)
        values[f"p{percent}_upper"] = percentile_bound_ms(calls, percent)
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


def ratios(
    samples: Sequence[Sample], subjects: Sequence[SubjectResult], confidence: float = CONFIDENCE
) -> tuple[Ratio, ...]:
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
                above = throughputs(samples, numerator, batch_size, timing)
                below = throughputs(samples, denominator, batch_size, timing)
                shared = sorted(above.keys() & below.keys())
                if shared:
                    both = [by_process({key: side[key] for key in shared}) for side in (above, below)]
                    ratio = paired_ratio(both[0], both[1], confidence)
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

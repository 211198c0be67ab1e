"""Two results of separate runs against each other: the gate for a change that was measured before and after.

Owns which of their figures belong together, whether the machines allow it, and which backend became slower. Knows
neither how the samples were taken nor how the verdict is shown. Two runs are weaker evidence than one: whatever
differed between their moments (other processes, temperature, clocks) is in the ratio and not in its interval, and
rounds can't be paired. `bench ab` measures both sides in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.machine.environment import fingerprint
from bench.results.schema import Result
from bench.results.statistics import MIN_ROUNDS_FOR_INTERVAL, MedianRatio, ratio_of_medians, shown_slower, throughput
from bench.results.terms import Timing

Key = tuple[str, int, Timing]
"""Subject, batch size, timing."""


@dataclass(frozen=True)
class Compared:
    """A subject at a batch size in both results: the head's throughput, in images per second, over the base's.

    `judged` is False for the backend that computes nothing.
    """

    subject: str
    batch_size: int
    timing: Timing
    judged: bool
    throughput_ratio: MedianRatio


@dataclass(frozen=True)
class Comparison:
    """What both results measured, and by name (``onnx-cpu at batch 64``) what only one of them did.

    `broken` are the subjects that finished in the base and failed in the head.
    """

    found: tuple[Compared, ...]
    only_in_base: tuple[str, ...]
    only_in_head: tuple[str, ...]
    broken: tuple[str, ...]


def machine_differences(base: Result, head: Result) -> tuple[str, ...]:
    """What keeps the two from being compared, one sentence part for each difference; empty for one machine."""
    before, after = (
        fingerprint(result.environment, result.settings.threads, result.settings.profile) for result in (base, head)
    )
    return tuple(f"{name}: {before[name]} against {after[name]}" for name in before if before[name] != after[name])


def compare(base: Result, head: Result) -> Comparison:
    """The ratio of every subject, batch size and timing that both results measured to the end.

    Raises:
        BenchError: (bad input) nothing can be judged: no subject and batch size is in both with enough rounds.
    """
    before, after = _throughputs(base), _throughputs(head)
    failed = {subject.label for subject in head.subjects if subject.failure is not None}
    broken = tuple(dict.fromkeys(subject for subject, _, _ in before if subject in failed))
    computing = {subject.label for subject in head.subjects if subject.computes}
    shared = []
    for key in (key for key in before if key in after):
        ratio = ratio_of_medians(after[key], before[key])
        shared.append(Compared(*key, key[0] in computing, ratio))
    if not broken and not any(compared.judged and compared.throughput_ratio.high is not None for compared in shared):
        raise BenchError(
            f"nothing can be judged: no backend and batch size is in both results with at least "
            f"{MIN_ROUNDS_FOR_INTERVAL} rounds. The base has {_listed(before)}; the head has "
            f"{_listed(after)}. Measure both with the same --backend and --batch-size, and with "
            f"--rounds {MIN_ROUNDS_FOR_INTERVAL} or more.",
            EXIT_BAD_INPUT,
        )
    return Comparison(
        found=tuple(shared),
        only_in_base=_names(key for key in before if key not in after and key[0] not in broken),
        only_in_head=_names(key for key in after if key not in before),
        broken=broken,
    )


def regressions(comparison: Comparison, threshold_percent: float) -> list[Compared]:
    """Those judged that are shown to be slower."""
    return [c for c in comparison.found if c.judged and shown_slower(c.throughput_ratio, threshold_percent)]


def _throughputs(result: Result) -> dict[Key, list[float]]:
    """Images per second, one for each round, of the subjects that finished."""
    failed = {subject.label for subject in result.subjects if subject.failure is not None}
    by_key: dict[Key, list[float]] = {}
    for sample in result.samples:
        if sample.subject not in failed:
            key = sample.subject, sample.batch_size, sample.timing
            by_key.setdefault(key, []).append(throughput(sample.batch_size, sample.durations_ns))
    order = {subject.label: place for place, subject in enumerate(result.subjects)}
    return dict(sorted(by_key.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def _names(keys: Iterable[Key]) -> tuple[str, ...]:
    """Subject and batch size of each key, once."""
    return tuple(dict.fromkeys(f"{subject} at batch {batch_size}" for subject, batch_size, _ in keys))


def _listed(series: dict[Key, list[float]]) -> str:
    """For an error: what a result has, with the number of its rounds."""
    names = (
        f"{subject} at batch {batch_size} ({len(values)} rounds)" for (subject, batch_size, _), values in series.items()
    )
    return ", ".join(dict.fromkeys(names)) or "nothing"

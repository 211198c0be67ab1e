"""Two results of separate runs against each other: the gate for a change that was measured before and after.

Owns which of their figures belong together, whether the machines allow it, and what became worse: throughput, p99,
memory, the file's size, parity, or that something is not there any more. Knows neither how the samples were taken nor
how the verdict is shown. Two runs are weaker evidence than one: whatever differed between their moments (other
processes, temperature, clocks) is in the ratio and not in its interval, and rounds can't be paired. `bench ab` measures
both sides in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.machine.environment import fingerprint
from bench.results.derive import by_process, durations, throughputs, was_busy
from bench.results.schema import Result, Row, SubjectResult
from bench.results.statistics import Decision, MedianRatio, decide, percentile_ms, ratio_of_medians
from bench.results.terms import TIMINGS, Timing

Key = tuple[str, int, Timing]
"""Subject, batch size, timing."""
Gate = Literal["presence", "parity", "p99", "memory", "GPU memory", "file size"]


@dataclass(frozen=True)
class Limits:
    """By how many percent the head may be worse than the base."""

    slower: float = 5.0
    p99: float = 20.0
    memory: float = 15.0
    size: float = 5.0


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
    decision: Decision


@dataclass(frozen=True)
class Worse:
    """What became worse, other than throughput. `what` says where, `seen` what was seen, in words."""

    gate: Gate
    what: str
    seen: str


@dataclass(frozen=True)
class Comparison:
    """What both results measured, what became worse, and by name (``onnx-cpu at batch 64``) what the head alone has."""

    found: tuple[Compared, ...]
    worse: tuple[Worse, ...]
    only_in_head: tuple[str, ...]

    @property
    def slower(self) -> list[Compared]:
        """Those judged that are shown to be slower."""
        return [compared for compared in self.found if compared.judged and compared.decision == "slower"]

    @property
    def inconclusive(self) -> list[Compared]:
        """Those judged of which it could not be told."""
        return [compared for compared in self.found if compared.judged and compared.decision == "inconclusive"]


def machine_differences(base: Result, head: Result) -> tuple[str, ...]:
    """What keeps the two from being compared, one sentence part for each difference; empty for one machine."""
    before, after = (
        fingerprint(result.environment, result.settings.threads, result.settings.profile) for result in (base, head)
    )
    return tuple(f"{name}: {before[name]} against {after[name]}" for name in before if before[name] != after[name])


def compare(base: Result, head: Result, limits: Limits) -> Comparison:
    """The ratio of every subject, batch size and timing that both results measured to the end, and what became worse.

    An alarm of throughput or p99 needs machines that were not busy with something else: there it is inconclusive.

    Raises:
        BenchError: (bad input) nothing can be judged: no subject and batch size is in both.
    """
    before, after = _measured(base), _measured(head)
    computing = {subject.label for subject in (*base.subjects, *head.subjects) if subject.computes}
    busy = was_busy(base) or was_busy(head)
    found = []
    for key in (key for key in before if key in after):
        ratio = ratio_of_medians(after[key], before[key])
        decision = decide(ratio, limits.slower)
        if busy and decision == "slower":
            decision = "inconclusive"
        found.append(Compared(*key, key[0] in computing, ratio, decision))
    worse = tuple(_worse(base, head, limits, busy))
    if not worse and not any(compared.judged for compared in found):
        raise BenchError(
            f"nothing can be judged: no backend and batch size is in both results. The base has {_listed(before)}; "
            f"the head has {_listed(after)}. Measure both with the same --backend and --batch-size.",
            EXIT_BAD_INPUT,
        )
    return Comparison(tuple(found), worse, _names(key for key in after if key not in before))


def _worse(base: Result, head: Result, limits: Limits, busy: bool) -> Iterator[Worse]:
    """What the gates find, but that of throughput; each only where both results let it be judged."""
    after = {subject.label: subject for subject in head.subjects}
    rows = {(row.subject, row.batch_size): row for row in head.rows}
    for subject in base.subjects:
        if not subject.computes or subject.failure is not None:
            continue
        now = after.get(subject.label)
        if now is None:
            yield Worse("presence", subject.label, "the base has it, the head doesn't")
            continue
        if now.failure is not None:
            yield Worse("presence", subject.label, f"did not finish in the head: {now.failure.message}")
            continue
        if now.parity is not None and not now.parity.passed:
            yield Worse("parity", subject.label, "; ".join(now.parity.failures))
        yield from _larger(subject, now, limits)
        for row in (row for row in base.rows if row.subject == subject.label):
            where = f"{row.subject} at batch {row.batch_size}"
            if (row.subject, row.batch_size) not in rows:
                yield Worse("presence", where, "the base has it, the head doesn't")
            elif not busy:
                yield from _later(base, head, row, rows[row.subject, row.batch_size], limits.p99)


def _larger(before: SubjectResult, now: SubjectResult, limits: Limits) -> Iterator[Worse]:
    files = [None if subject.file is None else subject.file.bytes for subject in (before, now)]
    pairs: tuple[tuple[Gate, int | None, int | None, float], ...] = (
        ("memory", before.peak_memory_bytes, now.peak_memory_bytes, limits.memory),
        ("GPU memory", before.peak_gpu_memory_bytes, now.peak_gpu_memory_bytes, limits.memory),
        ("file size", files[0], files[1], limits.size),
    )
    for gate, former, latter, percent in pairs:
        if former and latter and latter > former * (1 + percent / 100):
            yield Worse(
                gate, now.label, f"{latter / 1e6:,.2f} MB, {latter / former:.2f} × the base's, limit {percent:g} %"
            )


def _later(base: Result, head: Result, before: Row, now: Row, percent: float) -> Iterator[Worse]:
    """Whether a p99 is later than it may be: by the interval of the processes' own, where there are enough of them;
    else where it exceeds what the base's p99 does not exceed with 95 % confidence.
    """
    for timing in TIMINGS:
        p99, bound = now.latency(timing).p99, before.latency(timing).p99_upper
        latter, former = (_p99s(result, before, timing) for result in (head, base))
        ratio = ratio_of_medians(latter, former) if latter and former else None
        if ratio is not None and ratio.low is not None:
            later, seen = ratio.low > 1 + percent / 100, f"{ratio.median:.2f} × the base's (at least {ratio.low:.2f})"
        elif p99 is not None and bound is not None:
            later, seen = p99 > bound * (1 + percent / 100), f"{p99:.3g} ms, the base's at most {bound:.3g} ms"
        else:
            continue
        if later:
            where = f"{now.subject} at batch {now.batch_size}, {timing.replace('_', ' ')}"
            yield Worse("p99", where, f"{seen}, limit {percent:g} %")


def _p99s(result: Result, row: Row, timing: Timing) -> list[list[float]]:
    """Each process's own p99, of those that have one."""
    series = durations(result.samples, row.subject, row.batch_size, timing)
    return [[p99] for calls in series.values() if (p99 := percentile_ms(calls, 99)) is not None]


def _measured(result: Result) -> dict[Key, list[list[float]]]:
    """Images per second, by process and round, of the subjects that finished."""
    finished = [subject.label for subject in result.subjects if subject.failure is None]
    sizes = sorted({sample.batch_size for sample in result.samples})
    keys = ((label, size, timing) for label in finished for size in sizes for timing in TIMINGS)
    series = {key: by_process(throughputs(result.samples, *key)) for key in keys}
    return {key: groups for key, groups in series.items() if groups}


def _names(keys: Iterable[Key]) -> tuple[str, ...]:
    """Subject and batch size of each key, once."""
    return tuple(dict.fromkeys(f"{subject} at batch {batch_size}" for subject, batch_size, _ in keys))


def _listed(keys: Iterable[Key]) -> str:
    """For an error: what a result has."""
    return ", ".join(_names(keys)) or "nothing"

"""Which rows of a result count: those that finished, those that have a tail, those that are right, the best of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from bench.backends.contract import Emulation
from bench.results.schema import Result, Row, SubjectResult
from bench.results.terms import TIMINGS, Timing
from export.bundle import Bundle, CpuVerdict
from export.bundle.int8 import CPU_KINDS, CpuKind

EMULATION_WORDS: dict[Emulation, str] = {
    "no instructions": "the CPU has no instructions for it that the runtime uses",
    "no kernels": "the runtime has no kernels for it on this kind of CPU",
    "float32 asked for": "profile strict asks the runtime for float32",
}


@dataclass(frozen=True)
class Champion:
    """The row with the highest throughput end to end, and the best of the other subjects of its result, if any."""

    result: Result
    row: Row
    next: Row | None

    @property
    def shown(self) -> bool:
        """Whether its interval lies above that of the next."""
        if self.next is None:
            return True
        low = self.row.end_to_end_throughput_images_per_s.low
        high = self.next.end_to_end_throughput_images_per_s.high
        return low is not None and high is not None and low > high


def on_cpus(result: Result, bundle: Bundle, kinds: Collection[CpuKind]) -> list[tuple[str, CpuVerdict]]:
    """What the bundle says of the int8 files that a result is of: the file's name and the verdict on each of `kinds`.

    A kind of CPU that the file's runtime isn't for is left out; of a bundle that says nothing, nothing is proved.
    """
    ran = {subject.file.path for subject in result.subjects if subject.file is not None}
    found = []
    for entry in bundle.manifest.files:
        if entry.precision != "int8" or entry.path not in ran:
            continue
        stated = {verdict.cpu: verdict for verdict in entry.cpus}
        for kind in CPU_KINDS:
            if kind in kinds and (kind in stated or not stated):
                found.append((entry.path, stated.get(kind, CpuVerdict(cpu=kind, proof="not proved"))))
    return found


def finished_rows(result: Result) -> list[Row]:
    """The rows of the subjects that finished."""
    failed = {subject.label for subject in result.subjects if subject.failure is not None}
    return [row for row in result.rows if row.subject not in failed]


def tailed_rows(result: Result) -> list[Row]:
    """The rows with a p99 end to end, less those of the backend that computes nothing: it would beat all others."""
    computing = {subject.label for subject in result.subjects if subject.computes}
    rows = [row for row in finished_rows(result) if row.subject in computing]
    return [row for row in rows if row.end_to_end_latency_ms.p99 is not None]


def right_rows(result: Result) -> list[Row]:
    """The rows that may be called the best: of subjects that finished, compute something, and are right, and whose
    precision is not emulated.
    """
    out = {s.label for s in result.subjects if not s.computes or s.emulated or not is_right(s)}
    return [row for row in finished_rows(result) if row.subject not in out]


def is_right(subject: SubjectResult) -> bool:
    """Whether no parity of it failed."""
    return subject.parity is None or subject.parity.passed


def emulation_words(subject: SubjectResult) -> str | None:
    """That its precision is emulated, and why; None where it is not."""
    if subject.emulated is None or subject.file is None:
        return None
    return f"{subject.file.precision} is emulated, that is, computed in float32: {EMULATION_WORDS[subject.emulated]}"


def champion(results: Iterable[Result]) -> Champion | None:
    """The fastest of them all; None where nothing that is right was measured."""
    right = [(row, result) for result in results for row in right_rows(result)]
    if not right:
        return None
    row, result = max(right, key=lambda pair: _images_per_s(pair[0]))
    others = (other for other in right_rows(result) if other.subject != row.subject)
    return Champion(result, row, max(others, key=_images_per_s, default=None))


def _images_per_s(row: Row) -> float:
    return row.end_to_end_throughput_images_per_s.median


def noisy(result: Result, percent: float) -> list[tuple[Row, Timing]]:
    """The throughputs of what finished and computes whose interval reaches further than that, or that have none."""
    computing = {subject.label for subject in result.subjects if subject.computes}
    rows = [row for row in finished_rows(result) if row.subject in computing]
    half_widths = [(row, timing, row.throughput(timing).half_width_percent) for row in rows for timing in TIMINGS]
    return [(row, timing) for row, timing, width in half_widths if width is None or width > percent]


def subject_of(result: Result, label: str) -> SubjectResult:
    """The subject of that name."""
    return next(subject for subject in result.subjects if subject.label == label)

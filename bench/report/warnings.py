"""What a reader of figures is warned of: a closed set, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.machine.environment import BUSY_PERCENT, Environment
from bench.results.queries import emulation_words, subject_of
from bench.results.schema import Result, SubjectResult

# The clock's own share of a call, in percent, from which on a row says so; and the operating system's of the CPU time.
TIMER_PERCENT, SYSTEM_PERCENT = 0.1, 10.0


class Disturbance(StrEnum):
    """What spoils figures. The value is the advice."""

    BUSY = "expect these figures to be low and to scatter; run again on a quiet machine"
    SLOWED_GPU = "its figures are of a slower GPU than it is; bench doctor says more"
    CLOCK_FELT = "calls of larger batches tell more of the backend"
    MEMORY_MAPPED = (
        "the allocator gives memory back and has it mapped anew at every call, in a user's process too: "
        "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of 1000000000 keep it (docs/measuring.md)"
    )
    EMULATED = (
        "expect no gain over float32; it is never called the fastest or recommended: take the float32 or an int8 file "
        "there, or another CPU or runtime"
    )
    OTHER_MACHINE = "what differs is in the ratios too; measure both on one machine with the same settings"


@dataclass(frozen=True)
class Warned:
    """A disturbance that was seen."""

    kind: Disturbance
    seen: str

    def __str__(self) -> str:
        return f"{self.seen}; {self.kind.value}"


def of_run(result: Result) -> Iterator[Warned]:
    """Whether something else kept the machine busy during a run."""
    yield from of_load(result.environment, max(result.cpu_busy_percents, default=0.0))


def of_load(machine: Environment, busy_percent_after: float) -> Iterator[Warned]:
    """Whether something else kept the machine busy, before or after."""
    busy = max(machine.cpu_busy_percent, busy_percent_after)
    if busy > BUSY_PERCENT:
        yield Warned(Disturbance.BUSY, f"other processes used {busy:.0f} % of the CPUs while no backend ran")


def of_gpus(result: Result) -> Iterator[Warned]:
    """What throttled a GPU, each reason once."""
    throttled = [(gpu.name, gpu.throttled_by) for reading in result.readings for gpu in reading.gpus]
    for name, reasons in dict.fromkeys(throttled):
        if reasons:
            yield Warned(Disturbance.SLOWED_GPU, f"{name} was slowed down by {', '.join(reasons)}")


def of_emulation(subjects: Iterable[SubjectResult]) -> Iterator[Warned]:
    """Subjects whose files have a precision that is not computed in, each once."""
    for subject in subjects:
        if (words := emulation_words(subject)) is not None:
            yield Warned(Disturbance.EMULATED, f"{subject.label}: {words}")


def of_page(result: Result) -> Iterator[Warned]:
    """What a page says. The rows in which the clock is felt are the terminal's alone."""
    yield from of_run(result)
    yield from of_gpus(result)
    yield from of_emulation(result.subjects)


def of_rows(result: Result) -> Iterator[Warned]:
    """Rows in which the clock itself is felt, and subjects whose time goes into the mapping of memory."""
    mapped: dict[str, list[str]] = {}
    for row in result.rows:
        if (row.system_share_percent or 0) > SYSTEM_PERCENT:
            mapped.setdefault(row.subject, []).append(f"{row.system_share_percent:.0f} % at batch {row.batch_size}")
        share = row.timer_share_percent or 0
        if share > TIMER_PERCENT and subject_of(result, row.subject).computes:
            seen = f"{row.subject} at batch {row.batch_size}: the clock itself is {share:.2g} % of a call"
            yield Warned(Disturbance.CLOCK_FELT, seen)
    for subject, shares in mapped.items():
        seen = f"{subject}: of its CPU time the operating system takes {', '.join(shares)}"
        yield Warned(Disturbance.MEMORY_MAPPED, seen)


def of_machines(differences: Sequence[str]) -> Iterator[Warned]:
    """That two results are of two machines, or of two settings."""
    for difference in differences:
        yield Warned(Disturbance.OTHER_MACHINE, f"not the same machine: {difference}")

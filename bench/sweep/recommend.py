"""What to take of a sweep.

Owns which rows may be recommended, which of them nothing beats in every respect, and which is the best in one. Knows
neither how they were measured nor how a recommendation is shown.

All figures are end to end, from raw input to logits. Whoever failed its parity or did not finish is no candidate, and
neither is a file whose precision is emulated: what it gains elsewhere it doesn't gain here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from bench.backends.contract import Runnable, Setting
from bench.errors import EXIT_NEGATIVE, EXIT_USAGE, BenchError
from bench.results.parity import ParityVerdict
from bench.results.queries import emulation_words, is_right, right_rows, subject_of
from bench.results.schema import FileFacts, Result, Row, SubjectResult, find_ratio
from bench.results.studies import RECOMMENDATION_VERSION, Candidate, LeftOut, Pick, Recommendation, Sweep
from bench.sweep.contenders import exact, memory_bytes
from bench.sweep.program import snippet
from export.bundle import FLOAT32, TensorSpec, takes_raw

# Two starts of the same process differ by some MB: what is not more apart is no reason to recommend anything.
MEMORY_STEP_BYTES = 10 * 2**20


def recommend(sweep: Sweep, max_p99_ms: float | None, batch_size: int | None) -> Recommendation:
    """The front and the picks, of one batch size where that is given.

    Raises BenchError: usage for a batch size that was not measured, negative where nothing is right, or nothing holds
    `max_p99_ms`.
    """
    measured = candidates(sweep, batch_size)
    picks: list[Pick] = []
    lacking: list[str] = []
    for respect, best in respects(max_p99_ms).items():
        chosen = best(measured)
        if chosen is None:
            lacking.append(respect)
        else:
            picks.append(
                Pick(respect=respect, candidate=chosen, command=command(sweep, chosen), program=program(sweep, chosen))
            )
    return Recommendation(
        schema_version=RECOMMENDATION_VERSION,
        kind="recommendation",
        bundle=sweep.bundle,
        max_p99_ms=max_p99_ms,
        batch_size=batch_size,
        candidates=len(measured),
        front=tuple(front(measured)),
        picks=tuple(picks),
        lacking=tuple(lacking),
        left_out=tuple(left_out(sweep)),
    )


def left_out(sweep: Sweep) -> list[LeftOut]:
    """Who is right and no candidate all the same, looks included, once: the precision of its file is emulated."""
    subjects = {s.label: s for result in (*sweep.runs, *sweep.looks) for s in result.subjects}
    reasons = {s.label: emulation_words(s) for s in subjects.values() if s.failure is None and is_right(s)}
    return [LeftOut(what=name, reason=reason, failed=False) for name, reason in reasons.items() if reason is not None]


def candidates(sweep: Sweep, batch_size: int | None = None) -> list[Candidate]:
    """Every row of the full runs that is right, once: the reference's of the first run it is in. Raises BenchError."""
    by_row: dict[tuple[str, int], Candidate] = {}
    for result in sweep.runs:
        for row in right_rows(result):
            subject = subject_of(result, row.subject)
            if subject.file is not None and subject.parity is not None:
                by_row.setdefault(
                    (row.subject, row.batch_size), _candidate(result, row, subject, subject.file, subject.parity)
                )
    if not by_row:
        emulated = "".join(f" {entry.what}: {entry.reason}." for entry in left_out(sweep))
        raise BenchError(
            f"nothing can be recommended: no file in this sweep is right and was measured.{emulated}", EXIT_NEGATIVE
        )
    sizes = sorted({size for _, size in by_row})
    if batch_size is not None and batch_size not in sizes:
        raise BenchError(
            f"--batch-size {batch_size} is not in this sweep; it has {', '.join(map(str, sizes))}. Name one of those, "
            "or sweep again with that size.",
            EXIT_USAGE,
        )
    return [candidate for (_, size), candidate in by_row.items() if batch_size in (None, size)]


def _candidate(result: Result, row: Row, subject: SubjectResult, file: FileFacts, parity: ParityVerdict) -> Candidate:
    return Candidate(
        label=subject.label,
        backend=subject.backend,
        variant=subject.variant,
        threads=subject.threads or result.settings.threads,
        batch_size=row.batch_size,
        device=subject.device,
        file=file.path,
        file_bytes=file.bytes or 0,
        throughput_images_per_s=row.end_to_end_throughput_images_per_s,
        latency_ms=row.end_to_end_latency_ms,
        times_torch=find_ratio(result.ratios, "torch", row.subject, row.batch_size, "end_to_end"),
        top1_percent=parity.top1_percent,
        flips=None if parity.flips is None else len(parity.flips),
        exact=exact(subject),
        memory_bytes=memory_bytes(subject),
    )


def front(measured: Sequence[Candidate]) -> list[Candidate]:
    """Those that none other beats: as good in every respect, and better in one. The largest throughput first."""
    goods = [(candidate, _goods(candidate)) for candidate in measured]
    left = [candidate for candidate, its_goods in goods if not any(_beats(other, its_goods) for _, other in goods)]
    return sorted(left, key=_throughput, reverse=True)


def _goods(candidate: Candidate) -> tuple[float, ...]:
    """In each respect a number of which more is better. A p99 that too few calls were made for wins nothing."""
    p99 = candidate.latency_ms.p99
    return (
        _throughput(candidate),
        -float("inf") if p99 is None else -p99,
        candidate.top1_percent or 0.0,
        -candidate.file_bytes,
        -(candidate.memory_bytes // MEMORY_STEP_BYTES),
    )


def _beats(goods: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return goods != other and all(mine >= theirs for mine, theirs in zip(goods, other, strict=True))


Best = Callable[[Sequence[Candidate]], Candidate | None]


def respects(max_p99_ms: float | None) -> dict[str, Best]:
    """By the name of each respect, what finds the best in it."""
    latency = "lowest p99" if max_p99_ms is None else f"largest throughput with a p99 of at most {max_p99_ms:g} ms"
    return {
        "largest throughput": fastest,
        latency: quickest if max_p99_ms is None else lambda measured: fastest_under(measured, max_p99_ms),
        "smallest file": smallest,
        "as exact as float32 (no flips)": lambda measured: fastest(
            [candidate for candidate in measured if candidate.exact]
        ),
    }


def fastest(measured: Sequence[Candidate]) -> Candidate | None:
    """The largest throughput."""
    return max(measured, key=_throughput, default=None)


def quickest(measured: Sequence[Candidate]) -> Candidate | None:
    """The lowest p99 of those that have one."""
    return min((candidate for candidate in measured if candidate.latency_ms.p99 is not None), key=_p99, default=None)


def smallest(measured: Sequence[Candidate]) -> Candidate | None:
    """The smallest file, and of those that run it the largest throughput."""
    return min(measured, key=lambda candidate: (candidate.file_bytes, -_throughput(candidate)), default=None)


def fastest_under(measured: Sequence[Candidate], max_p99_ms: float) -> Candidate:
    """The largest throughput whose p99 is at most that with 95 % confidence: its upper bound is, and who made too few
    calls to have one does not hold it. Raises BenchError (negative) where there is none.
    """
    bounded = [candidate for candidate in measured if candidate.latency_ms.p99_upper is not None]
    best = fastest([candidate for candidate in bounded if _p99_upper(candidate) <= max_p99_ms])
    if best is None:
        nearest = min(bounded, key=_p99_upper, default=None)
        instead = (
            "no upper bound of a p99 is known: too few calls were made"
            if nearest is None
            else f"the lowest bound is {_p99_upper(nearest):,.4g} ms, of {nearest.label} at batch {nearest.batch_size}"
        )
        raise BenchError(
            f"nothing in this sweep has, with 95 % confidence, a p99 of at most {max_p99_ms:g} ms; {instead}.",
            EXIT_NEGATIVE,
        )
    return best


def command(sweep: Sweep, candidate: Candidate) -> str:
    """What measures that number again; with the reference, where `bench run` gives it the threads it had."""
    reference = f"torch-{candidate.device}"
    most_threads = max(result.settings.threads for result in sweep.runs)
    words = ["bench", "run", "--bundle", sweep.bundle.path, "--backend", candidate.backend]
    if candidate.threads == most_threads and candidate.backend != reference and candidate.times_torch is not None:
        words += ["--backend", reference]
    if candidate.variant != FLOAT32:
        words += ["--variant", candidate.variant]
    return shlex.join([*words, "--threads", str(candidate.threads), "--batch-size", str(candidate.batch_size)])


def program(sweep: Sweep, candidate: Candidate) -> str:
    """What runs the file as it was measured, without ninefold: known for one input and one output."""
    if sweep.more_inputs or sweep.more_outputs:
        counts = f"{1 + len(sweep.more_inputs)} inputs and {1 + len(sweep.more_outputs)} outputs"
        return f"# Programs are written for files of one input and one output; this one has {counts}.\n"
    return snippet(
        candidate.backend,
        Runnable(
            device=candidate.device,
            path=f"{sweep.bundle.path}/{candidate.file}",
            threads=candidate.threads,
            input=input_of(sweep, candidate),
            output=sweep.output,
            preprocessing=sweep.preprocessing,
            settings=settings_of(sweep, candidate),
        ),
    )


def settings_of(sweep: Sweep, candidate: Candidate) -> dict[str, Setting]:
    """What the measured session said of itself."""
    subjects = (subject for result in sweep.runs for subject in result.subjects)
    return next((subject.settings for subject in subjects if subject.label == candidate.label), {})


def input_of(sweep: Sweep, candidate: Candidate) -> TensorSpec:
    """What the file takes."""
    return sweep.preprocessing.raw if takes_raw(candidate.variant) else sweep.input


def _throughput(candidate: Candidate) -> float:
    return candidate.throughput_images_per_s.median


def _p99(candidate: Candidate) -> float:
    return float("inf") if candidate.latency_ms.p99 is None else candidate.latency_ms.p99


def _p99_upper(candidate: Candidate) -> float:
    return float("inf") if candidate.latency_ms.p99_upper is None else candidate.latency_ms.p99_upper

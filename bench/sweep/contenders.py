"""Who can still win, after a short look at everybody.

Owns the rule by which a sweep measures only some of its choices in full. Knows neither how a look is taken nor what
becomes of the winners: a choice is what the rows of a result say of it.

A choice stays where, at any batch size, it comes within `MARGIN` of the best of its kind: of all, of those without a
flip, of those with the most right answers, of those with the smallest file, or of those that need the least memory.
Choices that were not looked at in one run are compared by what they have in common, the reference: speed is throughput
over the reference's in the same rounds, and a latency counts in the reference's calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.results.queries import right_rows, subject_of
from bench.results.schema import Result, Row, SubjectResult, find_ratio
from bench.results.terms import label_of

# How far behind the best a look may see somebody who is as good. In 108 looks cut out of one-process/bench-cpu.json
# (each choice and batch size, any three rounds in a row, the first 20 ms of each block), a ratio to the reference was
# 0.84 to 1.08 of what all twenty rounds said: at worst, of two that are equal one looks 23 % behind.
MARGIN = 0.25
# File sizes that differ by less are alike: another format's headers. A process's memory differs from start to start.
SAME_BYTES, SAME_MEMORY = 1.02, 1.1


@dataclass(frozen=True)
class Contender:
    """What a look says of a choice: by batch size its throughput end to end in the reference's, and its p99 in the
    reference's median calls, where there were calls enough.
    """

    label: str
    speed: dict[int, float]
    p99: dict[int, float]
    exact: bool
    top1_percent: float | None
    file_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Chance:
    """The most that a choice reached of the best of a kind, which was `label`, at `batch_size`."""

    share: float
    label: str
    batch_size: int
    kind: str

    @property
    def words(self) -> str:
        """What it reached, and where."""
        return f"{self.share:.0%} of {self.label} at batch {self.batch_size} ({self.kind})"

    def no_chance_words(self, margin: float) -> str:
        """Why it is not measured any further."""
        return (
            f"a short look left it no chance: at no batch size and in no respect did it come within {margin:.0%} of "
            f"the best; nearest with {self.words}"
        )


def exact(subject: SubjectResult) -> bool:
    """Whether it says of every image what the oracle says; where there are no classes, whether it is right in float32.

    Of a choice whose parity failed nothing is exact.
    """
    parity = subject.parity
    if parity is None or not parity.passed:
        return False
    return parity.precision == "float32" if parity.flips is None else not parity.flips


def memory_bytes(subject: SubjectResult) -> int:
    """The most that its process held, on the host and on its GPU together."""
    return (subject.peak_memory_bytes or 0) + (subject.peak_gpu_memory_bytes or 0)


def contenders(looks: Iterable[Result]) -> list[Contender]:
    """Everybody that the looks found right and finished, once: the reference is in all of them."""
    by_label: dict[str, Contender] = {}
    for look in looks:
        rows = right_rows(look)
        for label in dict.fromkeys(row.subject for row in rows):
            its_rows = [row for row in rows if row.subject == label]
            by_label.setdefault(label, _contender(subject_of(look, label), its_rows, look))
    return list(by_label.values())


def _contender(subject: SubjectResult, rows: Sequence[Row], look: Result) -> Contender:
    reference = label_of(f"torch-{subject.device}")
    calls = {row.batch_size: row.end_to_end_latency_ms.p50 for row in look.rows if row.subject == reference}
    speed, p99 = {}, {}
    for row in rows:
        batch_size = row.batch_size
        ratio = find_ratio(look.ratios, "torch", subject.label, batch_size, "end_to_end")
        if subject.label == reference or ratio is not None:
            speed[batch_size] = 1.0 if ratio is None else ratio.median
        call, its_p99 = calls.get(batch_size), row.end_to_end_latency_ms.p99
        if call is not None and its_p99 is not None:
            p99[batch_size] = its_p99 / call
    return Contender(
        label=subject.label,
        speed=speed,
        p99=p99,
        exact=exact(subject),
        top1_percent=None if subject.parity is None else subject.parity.top1_percent,
        file_bytes=0 if subject.file is None else subject.file.bytes or 0,
        memory_bytes=memory_bytes(subject),
    )


def chances(everybody: Sequence[Contender]) -> dict[str, Chance]:
    """The best chance of each, by label. Whoever could not be compared has none."""
    by_label: dict[str, list[Chance]] = {contender.label: [] for contender in everybody}
    for kind, members in _kinds(everybody).items():
        for batch_size in sorted({size for contender in members for size in contender.speed}):
            timed = [contender for contender in members if batch_size in contender.speed]
            fastest = max(timed, key=lambda contender: contender.speed[batch_size])
            for contender in timed:
                share = contender.speed[batch_size] / fastest.speed[batch_size]
                by_label[contender.label].append(Chance(share, fastest.label, batch_size, f"throughput, {kind}"))
            steady = [contender for contender in members if batch_size in contender.p99]
            for contender in steady:
                best = min(steady, key=lambda other: other.p99[batch_size])
                share = best.p99[batch_size] / contender.p99[batch_size]
                by_label[contender.label].append(Chance(share, best.label, batch_size, f"p99, {kind}"))
    return {
        name: max(its_chances, key=lambda chance: chance.share) for name, its_chances in by_label.items() if its_chances
    }


def _kinds(everybody: Sequence[Contender]) -> dict[str, list[Contender]]:
    """What somebody can be the best of, in words, with its members."""
    smallest = min((contender.file_bytes for contender in everybody), default=0)
    least = min((contender.memory_bytes for contender in everybody), default=0)
    most_right = max(
        (contender.top1_percent for contender in everybody if contender.top1_percent is not None), default=None
    )
    return {
        "of all": list(everybody),
        "of those without a flip": [contender for contender in everybody if contender.exact],
        "of those with the most right answers": [
            contender for contender in everybody if most_right is not None and contender.top1_percent == most_right
        ],
        "of those with the smallest file": [
            contender for contender in everybody if contender.file_bytes <= SAME_BYTES * smallest
        ],
        "of those with the least memory": [
            contender for contender in everybody if contender.memory_bytes <= SAME_MEMORY * least
        ],
    }

"""Verdicts on a terminal, and what they rest on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape

from bench.report import columns
from bench.report.terminal.around import print_absent
from bench.report.terminal.table import print_table
from bench.results.schema import Result, SubjectResult
from export.bundle.int8 import CPU_WORDS

FLIPS_SHOWN = 20


def print_parity(result: Result, out: Console) -> None:
    """Every flip, then the verdict of every backend and, where it was looked for, the first node that diverges."""
    for subject in result.subjects:
        print_flips(subject, None, out)
    print_table(columns.PARITY, columns.judged(result), out)
    out.print(
        "b: right by the oracle and wrong here, c: the other way round; p: two-sided exact binomial test of b against\n"
        "c. Errors are those of the logits against the float64 oracle's.\n"
    )
    for subject in result.subjects:
        print_verdict(subject, out)
    print_absent(result.subjects, result.skipped, out)


def print_cpus(verdicts: Sequence[columns.OnCpu], out: Console) -> None:
    """What is proved of int8 files on kinds of CPU, and what is wrong with those that failed."""
    print_table(columns.CPUS, verdicts, out)
    for each in verdicts:
        if each.verdict.failures:
            reasons = escape("; ".join(each.verdict.failures))
            out.print(f"[red]parity FAILED[/] {escape(each.file)} on {CPU_WORDS[each.verdict.cpu]}: {reasons}.")


def print_failed(subjects: Iterable[SubjectResult], out: Console) -> None:
    """What is wrong with those whose parity failed, and the first of their flips; and who was held to laxer limits."""
    for subject in subjects:
        parity = subject.parity
        if parity is not None and (parity.laxer or not parity.passed):
            print_verdict(subject, out)
        if parity is not None and not parity.passed:
            print_flips(subject, FLIPS_SHOWN, out)


def print_verdict(subject: SubjectResult, out: Console) -> None:
    """What is wrong with a subject whose parity failed, which of its bundle's limits are laxer than the project's, and
    the first node that diverges where it was looked for.
    """
    if (parity := subject.parity) is not None and not parity.passed:
        reasons = "; ".join(parity.failures)
        out.print(f"[red]parity FAILED[/] {escape(subject.label)} ({parity.profile}): {escape(reasons)}.")
    if subject.parity is not None and subject.parity.laxer:
        out.print(f"[yellow]laxer limits[/] {escape(subject.label)}: {escape('; '.join(subject.parity.laxer))}.")
    if subject.bisection is not None:
        out.print(f"  {escape(subject.label)}: {escape(subject.bisection.in_words())}")


def print_flips(subject: SubjectResult, limit: int | None, out: Console) -> None:
    """The first `limit` flips, all of them where it is None."""
    flips = () if subject.parity is None else subject.parity.flips or ()
    for flip in flips[:limit]:
        label = "no label" if flip.label is None else f"label {flip.label}"
        out.print(
            f"  {escape(subject.label)}: image {flip.image_index}, {label}: "
            f"the oracle says {flip.oracle_prediction} by a margin of {flip.margin:.3g}, here {flip.prediction}"
        )
    if limit is not None and len(flips) > limit:
        out.print(f"  {escape(subject.label)}: {len(flips) - limit} more flips, see bench parity")

"""One bundle against another, and one run against another, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from bench.machine.environment import BUSY_PERCENT
from bench.report import columns, warnings
from bench.report.terminal.around import print_warnings
from bench.report.terminal.table import print_table
from bench.report.wording import ratio_words, rounds_words
from bench.results.compare import Compared, Comparison, Limits
from bench.results.derive import verdicts, was_busy
from bench.results.schema import Ratio, Result
from bench.results.statistics import MIN_PROCESSES_FOR_INTERVAL, Decision


def print_comparison(result: Result, threshold_percent: float, out: Console) -> None:
    """The verdict on every bundle against the first: what is slower, and what could not be decided."""
    judged = verdicts(result, threshold_percent)
    open_ = [ratio for ratio, decision in judged if decision == "inconclusive"]
    for ratio, decision in judged:
        if decision != "not slower":
            _print_decision(decision, ratio.numerator, ratio, escape(ratio.denominator), out)
    if open_:
        out.print(
            f"[yellow]inconclusive[/] for {len(open_)} of {len(judged)}: " + _what_is_missing(open_, was_busy(result))
        )
    elif not any(decision == "slower" for _, decision in judged):
        out.print(f"none is slower than the first by more than {threshold_percent:g} %, each shown by its interval")


def print_two_runs(
    base: Result,
    head: Result,
    comparison: Comparison,
    differences: Sequence[str],
    limits: Limits,
    out: Console,
) -> None:
    """The head's run against the base's: the table, what can't be compared, and what every gate says."""
    for name, result in (("base", base), ("head", head)):
        measured = ", ".join(f"{escape(bundle.name)} (bundle {bundle.digest[:12]})" for bundle in result.bundles)
        busy = max((result.environment.cpu_busy_percent, *result.cpu_busy_percents))
        advice = " [yellow](expect the figures to scatter)[/]" if busy > BUSY_PERCENT else ""
        out.print(
            f"{name}: {measured}, {result.started_at:%Y-%m-%d %H:%M} UTC, {rounds_words(result)}; other "
            f"processes used {busy:.0f} % of the CPUs{advice}"
        )
    print_warnings(warnings.of_machines(differences), out)
    print_table(columns.TWO_RUNS, comparison.found, out)
    out.print(
        "images/s: median of the processes' medians. ratio: head over base, with its 95 % interval; –: fewer than "
        f"{MIN_PROCESSES_FOR_INTERVAL} processes in one of them. null is shown for the harness's sake and not judged. "
        "Two runs are weaker evidence than one: what differed between their moments is not in the interval. bench ab "
        "measures both bundles in the same rounds.\n"
    )
    if comparison.only_in_head:
        out.print(f"only in the head, not compared: {escape(', '.join(comparison.only_in_head))}")
    for worse in comparison.worse:
        out.print(f"[red]{worse.gate}[/] {escape(worse.what)}: {escape(worse.seen)}")
    for compared in (*comparison.slower, *comparison.inconclusive):
        _print_decision(compared.decision, compared.subject, compared, "the base", out)
    if comparison.inconclusive:
        why = _what_is_missing(comparison.inconclusive, was_busy(base) or was_busy(head))
        judged = sum(compared.judged for compared in comparison.found)
        out.print(f"[yellow]inconclusive[/] for {len(comparison.inconclusive)} of {judged}: {why}")
    if not comparison.slower and not comparison.worse:
        shown = "" if comparison.inconclusive else ", each shown by its interval; parity, p99, memory and sizes hold"
        out.print(f"none is shown to be slower than the base by more than {limits.slower:g} %{shown}")


def _print_decision(decision: Decision, subject: str, ratio: Ratio | Compared, base: str, out: Console) -> None:
    """One that is slower than it may be, or of which that could not be told."""
    colour, timing = ("red" if decision == "slower" else "yellow"), ratio.timing.replace("_", " ")
    out.print(
        f"[{colour}]{decision}[/] {escape(subject)} at batch {ratio.batch_size}, {timing}: "
        f"{ratio_words(ratio.throughput_ratio, '.3f')} of {base}"
    )


def _what_is_missing(ratios: Sequence[Ratio | Compared], busy: bool) -> str:
    """Why they could not be decided, or what would decide it."""
    fewest = min(ratio.throughput_ratio.processes for ratio in ratios)
    if fewest < MIN_PROCESSES_FOR_INTERVAL:
        return f"it takes {MIN_PROCESSES_FOR_INTERVAL} processes or more (--processes), there were {fewest}"
    if busy:
        return "other processes kept the machine busy"
    return "more processes narrow the interval (--time-limit, --processes); so does a quiet machine"

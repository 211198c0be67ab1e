"""One bundle against another, and one run against another, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from bench.machine.environment import BUSY_PERCENT
from bench.report import columns, warnings
from bench.report.terminal.around import print_warnings
from bench.report.terminal.table import table
from bench.report.wording import ratio_words, rounds_words
from bench.results.compare import Compared, Comparison, regressions
from bench.results.derive import slower
from bench.results.schema import Ratio, Result


def print_comparison(result: Result, threshold_percent: float, out: Console) -> None:
    """The verdict on every bundle against the first."""
    slower_ratios = slower(result.ratios, threshold_percent)
    for ratio in slower_ratios:
        print_slower(ratio.numerator, ratio, escape(ratio.denominator), out)
    if not slower_ratios:
        out.print(f"none is slower than the first by more than {threshold_percent:g} %")


def print_two_runs(
    base: Result,
    head: Result,
    comparison: Comparison,
    differences: Sequence[str],
    threshold_percent: float,
    out: Console,
) -> None:
    """The head's run against the base's: the table, what can't be compared, and the verdict."""
    for name, result in (("base", base), ("head", head)):
        measured = ", ".join(f"{escape(bundle.name)} (bundle {bundle.digest[:12]})" for bundle in result.bundles)
        busy = max(result.environment.cpu_busy_percent, result.cpu_busy_percent_at_end)
        advice = " [yellow](expect the figures to scatter)[/]" if busy > BUSY_PERCENT else ""
        out.print(
            f"{name}: {measured}, {result.started_at:%Y-%m-%d %H:%M} UTC, {rounds_words(result)} rounds; other "
            f"processes used {busy:.0f} % of the CPUs{advice}"
        )
    print_warnings(warnings.of_machines(differences), out)
    out.print(table(columns.TWO_RUNS, comparison.found))
    out.print(
        "images/s: median of the rounds. ratio: head over base, with its 95 % bootstrap interval; –: fewer than six\n"
        "rounds. null is shown for the harness's sake and not judged. Two runs are weaker evidence than one: what\n"
        "differed between their moments is not in the interval. bench ab measures both bundles in the same rounds.\n"
    )
    for name, keys in (("base", comparison.only_in_base), ("head", comparison.only_in_head)):
        if keys:
            out.print(f"only in the {name}, not compared: {escape(', '.join(keys))}")
    for label in comparison.broken:
        out.print(f"[red]did not finish[/] {escape(label)} in the head; it did in the base")
    regressed = regressions(comparison, threshold_percent)
    for compared in regressed:
        print_slower(compared.subject, compared, "the base", out)
    if not regressed:
        out.print(f"none is shown to be slower than the base by more than {threshold_percent:g} %")


def print_slower(subject: str, ratio: Ratio | Compared, base: str, out: Console) -> None:
    """One that is slower than it may be."""
    timing = ratio.timing.replace("_", " ")
    out.print(
        f"[red]slower[/] {escape(subject)} at batch {ratio.batch_size}, {timing}: "
        f"{ratio_words(ratio.throughput_ratio, '.3f')} of {base}"
    )

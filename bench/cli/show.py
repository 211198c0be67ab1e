"""`bench report`, `compare`, `doctor` and `backends`: what measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import (
    DEFAULT_MEMORY_PERCENT,
    DEFAULT_P99_PERCENT,
    DEFAULT_SIZE_PERCENT,
    DEFAULT_THRESHOLD_PERCENT,
    DEFAULT_TIMEOUT_S,
    AllowInconclusiveOption,
    ThreadsOption,
    TimeoutOption,
    WideOption,
)
from bench.errors import EXIT_BAD_INPUT, EXIT_INCONCLUSIVE, EXIT_NEGATIVE, BenchError
from bench.report.formats import ReportFormat, chosen_format


def report_command(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT.JSON…", help="What bench run, bench ab or bench suite wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Where it goes. Its ending says the format: .html, .md, .csv."
        ),
    ] = None,
    format_: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="html is one page that opens offline, and needs -o. Default: text."),
    ] = None,
    wide: WideOption = False,
) -> None:
    """Show results again, every figure derived anew from its raw samples: as tables, or as one page with charts."""
    chosen = chosen_format(format_, out, results)
    from bench.report.render import print_sources, rendered
    from bench.results.files import check_writable, write_whole
    from bench.results.load import results_in

    if out is not None:
        check_writable(out, "-o")
    sources = [results_in(path) for path in results]
    if out is not None:
        write_whole(rendered(sources, chosen), out, "-o")
        print(f"report: {out}")
    elif chosen is ReportFormat.TEXT:
        print_sources(sources, wide=wide)
    else:
        print(rendered(sources, chosen), end="")


def compare_command(
    base: Annotated[Path, typer.Argument(metavar="BASE.JSON", help="The result from before.")],
    head: Annotated[Path, typer.Argument(metavar="HEAD.JSON", help="The result from after.")],
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=100, help="Percent that a backend may be slower than before.")
    ] = DEFAULT_THRESHOLD_PERCENT,
    p99_threshold: Annotated[
        float, typer.Option("--p99-threshold", min=0, help="Percent that a p99 may be later than before.")
    ] = DEFAULT_P99_PERCENT,
    memory_threshold: Annotated[
        float, typer.Option("--memory-threshold", min=0, help="Percent that a process may hold more than before.")
    ] = DEFAULT_MEMORY_PERCENT,
    size_threshold: Annotated[
        float, typer.Option("--size-threshold", min=0, help="Percent that a file may be larger than before.")
    ] = DEFAULT_SIZE_PERCENT,
    allow_inconclusive: AllowInconclusiveOption = False,
    allow_different_machine: Annotated[
        bool,
        typer.Option("--allow-different-machine", help="Compare although machine, threads or profile differ."),
    ] = False,
) -> None:
    """Compare two results of separate runs: weaker evidence than bench ab, for where both can't be had in one run.

    Exit code 1 when a backend is slower, its whole interval below 1 - threshold; when one that was there is not, did
    not finish, or is wrong; when a p99, the memory or a file grew by more than its threshold. 5 when nothing of that,
    but some throughput could not be decided: it takes three processes in both results, and machines that weren't busy.
    """
    from bench.report.terminal.comparison import print_two_runs
    from bench.report.terminal.console import console
    from bench.results.compare import Limits, compare, machine_differences
    from bench.results.load import read_result

    before, after = read_result(base), read_result(head)
    differences = machine_differences(before, after)
    if differences and not allow_different_machine:
        raise BenchError(
            f"{base} and {head} were not measured alike: {'; '.join(differences)}. Measure both on one machine with "
            "the same settings, or say --allow-different-machine.",
            EXIT_BAD_INPUT,
        )
    limits = Limits(threshold, p99_threshold, memory_threshold, size_threshold)
    comparison = compare(before, after, limits)
    print_two_runs(before, after, comparison, differences, limits, console())
    if comparison.worse or comparison.slower:
        raise typer.Exit(EXIT_NEGATIVE)
    raise typer.Exit(EXIT_INCONCLUSIVE if comparison.inconclusive and not allow_inconclusive else 0)


def doctor_command(threads: ThreadsOption = None) -> None:
    """What on this machine spoils measurements or keeps a backend from running, each with its fix.

    Exit code 1 when there is an error.
    """
    from bench.machine.doctor import examine
    from bench.machine.environment import usable_cpus
    from bench.machine.findings import Severity
    from bench.report.terminal.console import console
    from bench.report.terminal.machine import print_findings

    findings = examine(threads or usable_cpus())
    print_findings(findings, console())
    raise typer.Exit(EXIT_NEGATIVE if any(finding.severity is Severity.ERROR for finding in findings) else 0)


def backends_command(timeout: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Which backends can run here, and for the others why not and what would fix it."""
    from bench.report.terminal.console import console
    from bench.report.terminal.machine import print_backends
    from bench.run.availability import availability

    print_backends(availability(threads=1, timeout_s=timeout), console())

"""A sweep and a recommendation on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape

from bench.report import columns
from bench.report.terminal.run import print_run
from bench.report.terminal.table import print_table
from bench.report.wording import milliseconds, number, ratio_words, spread_words
from bench.results.studies import Candidate, LeftOut, Pick, Recommendation, Sweep


def print_sweep(sweep: Sweep, out: Console) -> None:
    """The tables of the full runs, and what is not in them."""
    for result in sweep.runs:
        print_run(result, out)
    _print_left_out("not measured in full", sweep.skipped, out)


def _print_left_out(what: str, entries: Iterable[LeftOut], out: Console) -> None:
    """Each reason once."""
    by_reason: dict[tuple[str, bool], list[str]] = {}
    for entry in entries:
        by_reason.setdefault((entry.reason, entry.failed), []).append(entry.what)
    for (reason, failed), names in by_reason.items():
        colour = "red" if failed else "dim"
        out.print(f"[{colour}]{what}: {escape(', '.join(names))}: {escape(reason)}[/]", soft_wrap=True)


def print_recommendation(recommendation: Recommendation, sweep: Sweep, out: Console) -> None:
    """The front, then each pick with its figures, its command line and its program."""
    machine = sweep.runs[0].environment
    size = "all batch sizes" if recommendation.batch_size is None else f"batch {recommendation.batch_size}"
    out.print(
        f"[bold]{escape(recommendation.bundle.name)}[/] (bundle {recommendation.bundle.digest[:12]}) on "
        f"{escape(machine.cpu)}"
    )
    out.print(f"the Pareto front of {recommendation.candidates} measured candidates, {size}:")
    print_table(columns.CANDIDATES, recommendation.front, out)
    out.print(
        "images/s, p99 and × torch are end to end, from raw input to logits; × torch: throughput over eager torch's\n"
        "with all threads, paired by round, with its 95 % bootstrap interval. –: too few samples, or nothing to\n"
        "compare. p99 at most: what it does not exceed with 95 % confidence. Memory is the most that its process\n"
        "held, host and GPU together, with every batch size that ran in it. On the front is whom no other beats in\n"
        "images/s, p99, top-1, file size and memory at once.\n"
    )
    for pick, respects in _by_candidate(recommendation.picks):
        out.print(f"[bold]{escape(', '.join(respects))}[/]: {escape(_figures(pick.candidate))}", soft_wrap=True)
        out.print(escape(pick.command), soft_wrap=True)
        out.print("\n".join(f"    {line}".rstrip() for line in pick.program.splitlines()), markup=False, soft_wrap=True)
        out.print()
    for respect in recommendation.lacking:
        out.print(f"[yellow]{escape(respect)}[/]: nothing in this sweep")
    _print_left_out("not recommended", recommendation.left_out, out)


def _by_candidate(picks: Iterable[Pick]) -> Iterator[tuple[Pick, list[str]]]:
    """Each candidate that was picked once, with all the respects in which it is the best."""
    grouped: dict[str, tuple[Pick, list[str]]] = {}
    for pick in picks:
        grouped.setdefault(pick.command, (pick, []))[1].append(pick.respect)
    yield from grouped.values()


def _figures(candidate: Candidate) -> str:
    """A candidate's figures in a line."""
    facts = [
        f"{candidate.file} on {candidate.backend}, threads {candidate.threads}, batch {candidate.batch_size}",
        f"{spread_words(candidate.throughput_images_per_s)} images/s",
        f"p99 {milliseconds(candidate.latency_ms.p99)} ms, at most {milliseconds(candidate.latency_ms.p99_upper)}",
        f"× torch {ratio_words(candidate.times_torch, '.3g')}",
        f"top-1 {number(candidate.top1_percent, '.2f')} %, {number(candidate.flips, '')} flips",
        f"{candidate.file_bytes / 1e6:.2f} MB",
        f"memory of its process {candidate.memory_bytes / 2**20:.0f} MiB",
    ]
    return "; ".join(facts)

"""What LoadGen found, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.report.wording import number, per_s
from bench.results.scenario import OFFICIAL_MIN_DURATION_S
from bench.results.terms import Scenario

if TYPE_CHECKING:
    from bench.results.scenario import ScenarioResult, ScenarioRow
from bench.report.terminal.around import print_absent, print_machine
from bench.report.terminal.parity import print_failed, verdict_words


def print_scenario(result: ScenarioResult, out: Console) -> None:
    """What LoadGen found for every backend, and why that is no official MLPerf result."""
    settings = result.settings
    for bundle in result.bundles:
        out.print(f"[bold]{escape(bundle.name)}[/] (bundle {bundle.digest[:12]}) at {escape(bundle.path)}")
    out.print(
        f"MLPerf LoadGen {escape(result.loadgen_version or '–')}, scenario [bold]{settings.scenario}[/], runs of at "
        f"least {settings.min_duration_s:g} s, batches of {settings.batch_size}, profile {settings.profile}, "
        f"{settings.threads} threads"
    )
    out.print(
        f"[yellow]not an official MLPerf result[/]: the rules ask for runs of {OFFICIAL_MIN_DURATION_S:g} s, a model "
        "and data of the benchmark, and a review"
    )
    print_machine(result.environment, result.cpu_busy_percent_at_end, out)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("backend", overflow="fold")
    for name in ("result", "verdict", "p50\nms", "p90\nms", "p99\nms", "queries", "images", "parity", "top-1\n%"):
        table.add_column(name, justify="right", overflow="fold")
    for row in result.rows:
        if row.reported is not None:
            run, parity = row.runs[row.reported], row.subject.parity
            latency = [run.latency_ms.p50, run.latency_ms.p90, run.latency_ms.p99]
            table.add_row(
                escape(row.subject.label),
                _scenario_result(row, settings.scenario),
                "[green]VALID[/]" if run.verdict == "VALID" else "[red]INVALID[/]",
                # Offline is one query: its latency is that of the whole run.
                *("–" if settings.scenario is Scenario.OFFLINE else number(value, ".3g") for value in latency),
                f"{run.queries:,}",
                f"{run.images:,}",
                "–" if parity is None else verdict_words(parity),
                "–" if parity is None else number(parity.top1_percent, ".2f"),
            )
    out.print(table)
    out.print("latency: from when a query was due to its answer, raw input to logits in host memory, by LoadGen.\n")
    for row in result.rows:
        if row.missed_queries_per_s is not None:
            bound = f"a p99 of {settings.latency_bound_ms:g} ms"
            rates = [run.queries_per_s or 0.0 for run in row.runs if run.verdict == "VALID"]
            held = f"{per_s(max(rates))} queries/s held {bound}" if rates else f"no rate tried held {bound}"
            missed = per_s(row.missed_queries_per_s)
            out.print(f"{escape(row.subject.label)}: {held}, {missed} queries/s did not")
        if row.reported is not None and (unmet := row.runs[row.reported].unmet):
            out.print(f"[red]INVALID[/] {escape(row.subject.label)}: LoadGen calls not satisfied: {', '.join(unmet)}")
    print_failed([row.subject for row in result.rows], out)
    print_absent([row.subject for row in result.rows], result.skipped, out)


def _scenario_result(row: ScenarioRow, scenario: Scenario) -> str:
    """The figure that MLPerf reports for a scenario."""
    if row.reported is None:
        return "–"
    run = row.runs[row.reported]
    if scenario is Scenario.SERVER:
        return "–" if run.verdict == "INVALID" else f"{per_s(run.queries_per_s or 0.0)} queries/s"
    if scenario is Scenario.OFFLINE:
        return f"{number(run.images_per_s, ',.0f')} images/s"
    if scenario is Scenario.SINGLE_STREAM:
        return f"p90 {run.latency_ms.p90:.3g} ms"
    return f"p99 {run.latency_ms.p99:.3g} ms"

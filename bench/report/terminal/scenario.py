"""What LoadGen found, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from bench.report import columns, warnings
from bench.report.terminal.table import print_table
from bench.report.wording import per_s
from bench.results.scenario import OFFICIAL_MIN_DURATION_S

if TYPE_CHECKING:
    from bench.results.scenario import ScenarioResult
from bench.report.terminal.around import print_absent, print_machine, print_warnings
from bench.report.terminal.parity import print_failed


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
    reported = [row for row in result.rows if row.reported is not None]
    print_table(columns.scenario(settings.scenario), reported, out)
    out.print("latency: from when a query was due to its answer, raw input to logits in host memory, by LoadGen.\n")
    print_warnings(warnings.of_emulation(row.subject for row in result.rows), out)
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

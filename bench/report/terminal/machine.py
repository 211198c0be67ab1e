"""What `bench doctor` and `bench backends` found, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.report import columns
from bench.report.terminal.table import print_table

if TYPE_CHECKING:
    from bench.machine.findings import Finding


def print_findings(findings: Sequence[Finding], out: Console) -> None:
    """What `bench doctor` saw: each finding with its fix below it, and how many there are of each severity."""
    grid = Table.grid(padding=(0, 2))
    for finding in findings:
        colour = {"ok": "green", "warning": "yellow", "error": "red"}[finding.severity]
        words = escape(finding.seen) + ("" if finding.fix is None else f"\n[bold]fix:[/] {escape(finding.fix)}")
        grid.add_row(f"[{colour}]{finding.severity}[/]", escape(finding.check), words)
    out.print(grid)
    errors, warnings, ok = (sum(f.severity == severity for f in findings) for severity in ("error", "warning", "ok"))
    out.print(f"\nerrors: {errors}, warnings: {warnings}, ok: {ok}")


def print_backends(reasons: dict[str, str | None], out: Console) -> None:
    """Every backend: available, or why not and what would fix it, each reason once."""
    first: dict[str, str] = {}
    lines: list[tuple[str, str | None]] = []
    for name, reason in reasons.items():
        same_as = name if reason is None else first.setdefault(reason, name)
        lines.append((name, reason if same_as == name else f"as {same_as}"))
    print_table(columns.BACKENDS, lines, out)

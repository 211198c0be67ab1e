"""What stands around every table: the machine, and what is not in it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from bench.machine.environment import Environment
from bench.report import warnings
from bench.report.warnings import Warned
from bench.results.schema import Skipped, SubjectResult


def print_machine(machine: Environment, busy_percent_after: float, out: Console) -> None:
    """The machine, and whether something else kept it busy."""
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    out.print(f"{machine.cpu}, {machine.usable_cpus} of {machine.logical_cpus} CPUs{gpus}, {machine.platform}\n")
    print_warnings(warnings.of_load(machine, busy_percent_after), out)


def print_warnings(seen: Iterable[Warned], out: Console) -> None:
    """Each in a line, and a line's space after them."""
    lines = list(seen)
    for warned in lines:
        out.print(f"[yellow]warning[/] {escape(str(warned))}")
    if lines:
        out.print()


def print_absent(subjects: Iterable[SubjectResult], skipped: Iterable[Skipped], out: Console) -> None:
    """What did not finish, and what was skipped, each reason once."""
    for subject in subjects:
        if subject.failure is not None:
            out.print(f"[red]{subject.failure.kind}[/] {escape(subject.label)}: {escape(subject.failure.message)}")
            if subject.failure.trace:
                out.print(escape(subject.failure.trace), style="dim")
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.backend)
    for reason, backends in by_reason.items():
        out.print(f"[dim]skipped {escape(', '.join(backends))}: {escape(reason)}[/]")

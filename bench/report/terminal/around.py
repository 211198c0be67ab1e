"""What stands around every table: the machine, and what is not in it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from bench.machine.environment import BUSY_PERCENT, Environment
from bench.results.schema import Skipped, SubjectResult


def print_machine(machine: Environment, busy_percent_at_end: float, out: Console) -> None:
    """The machine, and whether something else kept it busy."""
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    out.print(f"{machine.cpu}, {machine.usable_cpus} of {machine.logical_cpus} CPUs{gpus}, {machine.platform}\n")
    busy = max(machine.cpu_busy_percent, busy_percent_at_end)
    if busy > BUSY_PERCENT:
        out.print(
            f"[yellow]warning[/] other processes used {busy:.0f} % of the CPUs while no backend ran: expect these "
            "figures to be low and to scatter. Run again on a quiet machine.\n"
        )


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

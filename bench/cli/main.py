"""The `bench` command: its subcommands, and how the process ends.

Every module of this room imports what a subcommand needs inside that subcommand, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from bench.cli.measure import ab_command, parity_command, run_command
from bench.cli.show import backends_command, compare_command, doctor_command, report_command
from bench.cli.suite import suite_command
from bench.cli.sweep import recommend_command, sweep_command
from bench.errors import EXIT_INTERRUPTED
from export.bundle.errors import run_app

# Typer's rich help costs as much start-up time as everything else together.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a bundle's files on the runtimes of this machine, and prove that they are right."""


app.command("run")(run_command)
app.command("suite")(suite_command)
app.command("ab")(ab_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("doctor")(doctor_command)
app.command("backends")(backends_command)
app.command("parity")(parity_command)
app.command("sweep")(sweep_command)
app.command("recommend")(recommend_command)


def main() -> None:
    """The console script and `python -m bench`: errors become one paragraph on stderr and the exit code."""
    try:
        run_app(app, "bench")
    except SystemExit as ending:
        if ending.code == EXIT_INTERRUPTED:  # Typer has turned Ctrl-C into this, without a word
            print("interrupted", file=sys.stderr)
        raise

"""`bench suite`: all that can be said of a bundle on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import (
    DEFAULT_BUNDLE,
    DEFAULT_TIMEOUT_S,
    BackendOption,
    BundleOption,
    ThreadsOption,
    TimeoutOption,
    check_judged,
    command_line,
    default_place,
    shown_progress,
)
from bench.errors import Terminated

if TYPE_CHECKING:
    from bench.results.studies import Suite


# Of a suite, which has seven times the rows of a run: many short blocks show as much as few long ones, and every call
# that fits into one is a number in the file.
SUITE_BLOCK_S, SUITE_TIME_LIMIT_S = 0.02, 240.0


def suite_command(
    backend: BackendOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Images per call; repeat for more. Default: 1, 8, 64, 256 and 1024; on a GPU 4096 and 16384 too.",
        ),
    ] = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the files go. Default: artifacts/results/<bundle>-suite"),
    ] = None,
    threads: ThreadsOption = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0, help="Seconds after which no round begins, for all runs together.")
    ] = SUITE_TIME_LIMIT_S,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """All that can be said of a bundle on this machine: suite.json, figures, and summary.md.

    The doctor's findings; then, for each profile that changes anything here, parity and throughput of every backend and
    of the unfolded controls. Each run is written when it is done.

    Exit code 1 when a parity failed, a backend did not finish, or a run that was due could not be made.
    """
    check_judged(backend)
    from bench.cli.exit_codes import suite_exit_code
    from bench.machine.environment import usable_cpus
    from bench.report.suite import PAGE_NAME, check_folder, write_suite
    from bench.run.suite import SuiteRequest, run_suite

    target = out or default_place(bundle, "-suite")
    check_folder(target)
    request = SuiteRequest(
        command=command_line(),
        bundle=bundle,
        backends=tuple(backend or ()),
        batch_sizes=tuple(sorted(set(batch_size or ()))),
        threads=threads or usable_cpus(),
        time_limit_s=time_limit,
        block_s=SUITE_BLOCK_S,
        timeout_s=timeout,
    )
    kept = 0

    def keep(so_far: Suite) -> None:
        nonlocal kept
        write_suite(so_far, target)
        kept = len(so_far.runs)

    try:
        with shown_progress() as progress:
            suite = run_suite(request, keep, progress)
    except (KeyboardInterrupt, Terminated):
        print(f"finished runs kept in {target}: {kept}", file=sys.stderr)
        raise
    print(f"summary: {target / PAGE_NAME}")
    raise typer.Exit(suite_exit_code(suite))

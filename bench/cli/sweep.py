"""`bench sweep` and `bench recommend`: everything at once, and what to take of it.

Owns their options and how they end. Imports what a command needs inside that command, as `bench.cli.main` does, which
registers them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import (
    DEFAULT_BUNDLE,
    DEFAULT_TIMEOUT_S,
    BundleOption,
    TimeoutOption,
    check_judged,
    command_line,
    default_place,
    shown_progress,
)
from bench.errors import EXIT_BAD_INPUT, BenchError, Terminated

# With what is over after it, a sweep of all variants of the article's network takes less than ten minutes on two cores.
SWEEP_TIME_LIMIT_S = 480.0
SWEEP_ENDING = "-sweep"


def sweep_command(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", metavar="NAME", help="A backend; repeat for more. Default: all, those on request too."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME", help="A variant; repeat for more. Default: all of the bundle."),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Images per call; repeat for more. Default: 1, 8, 64 and 256; on a GPU 1024 too.",
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            "--threads",
            min=1,
            help="Threads of each runtime's pool; repeat for more. Default: 1 and the CPUs this process may use.",
        ),
    ] = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the files go. Default: artifacts/results/<bundle>-sweep"),
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0, help="Seconds after which no round begins.")
    ] = SWEEP_TIME_LIMIT_S,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what the folder already has of this bundle.")
    ] = False,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Every variant on every backend, with few and many threads, in small and large batches: sweep.json.

    Parity and a short look at all; full rounds for those that can win something. Each run is written when it is done:
    after an interruption the same command goes on from there.

    Exit code 1 when a float32 file is wrong, or something that was due could not be measured.
    """
    check_judged(backend)
    from bench.cli.exit_codes import sweep_exit_code
    from bench.machine.environment import usable_cpus
    from bench.report.terminal.console import console
    from bench.report.terminal.sweep import print_sweep
    from bench.results.files import write_result
    from bench.run.plan import opened
    from bench.sweep.choices import SweepRequest
    from bench.sweep.folder import OPTION, SweepFolder
    from bench.sweep.sweep import run_sweep

    target = out or default_place(bundle, SWEEP_ENDING)
    request = SweepRequest(
        command=command_line(),
        path=bundle.absolute(),
        bundle=opened(bundle, verified=False),  # the runs check its files
        backends=tuple(dict.fromkeys(backend or ())),
        variants=tuple(dict.fromkeys(variant or ())),
        batch_sizes=tuple(sorted(set(batch_size or ()))),
        threads=tuple(sorted(set(threads or (1, usable_cpus())))),
        time_limit_s=time_limit,
        timeout_s=timeout,
        fresh=fresh,
    )
    folder = SweepFolder(target, request.bundle.digest)
    try:
        with shown_progress() as progress:
            sweep = run_sweep(request, folder, progress)
    except (KeyboardInterrupt, Terminated):
        kept = f"finished runs kept in {target}: {folder.finished()}; the same command goes on from there"
        print(kept, file=sys.stderr)
        raise
    write_result(sweep, folder.json, OPTION)
    print_sweep(sweep, console())
    print(f"sweep: {folder.json}")
    raise typer.Exit(sweep_exit_code(sweep))


def recommend_command(
    sweep: Annotated[
        Path | None,
        typer.Argument(
            metavar="SWEEP.JSON|FOLDER",
            help="What bench sweep wrote. Default: where it writes by default, artifacts/results/<bundle>-sweep",
            show_default=False,
        ),
    ] = None,
    max_p99_ms: Annotated[
        float | None,
        typer.Option(
            "--max-p99-ms",
            min=0,
            help="The largest throughput whose p99, end to end, is not above this with 95 % confidence.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Of this batch size only. Default: of all.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where the recommendation goes. Default: nowhere.")
    ] = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    triton: Annotated[
        Path | None,
        typer.Option(
            "--triton",
            metavar="DIR",
            help="Also write a model repository for Triton Inference Server there. Needs the extra [triton].",
        ),
    ] = None,
) -> None:
    """What to take: the Pareto front of a sweep, and the best of it in four respects, each ready to run.

    Exit code 1 when nothing holds --max-p99-ms.
    """
    from bench.report.terminal.console import console
    from bench.report.terminal.sweep import print_recommendation
    from bench.results.files import check_writable, write_result
    from bench.results.load import read_sweep
    from bench.results.studies import SWEEP_FILE
    from bench.sweep.recommend import recommend

    if json is not None:
        check_writable(json)
    place = sweep or default_place(bundle, SWEEP_ENDING)
    if sweep is None and not (place / SWEEP_FILE).exists():
        raise BenchError(
            f"there is no sweep of {bundle} at {place}. Make it (bench sweep --bundle {bundle}), or name the file or "
            "the folder of another.",
            EXIT_BAD_INPUT,
        )
    swept = read_sweep(place)
    recommendation = recommend(swept, max_p99_ms, batch_size)
    print_recommendation(recommendation, swept, console())
    if json is not None:
        write_result(recommendation, json)
        print(f"recommendation: {json}")
    if triton is not None:
        from bench.sweep.triton import write_repository

        print(f"Triton model repository: {write_repository(swept, recommendation, triton)}")

"""The `bench` command.

Owns its options, the exit code, and how the process ends. Imports what a subcommand needs inside that subcommand, so
that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backend import Profile, find_backend
from bench.errors import EXIT_INTERRUPTED, EXIT_NEGATIVE, EXIT_TERMINATED, EXIT_USAGE, BenchError, Terminated

if TYPE_CHECKING:
    from bench.run import Plan, Progress

DEFAULT_BUNDLE = Path("artifacts/bundles/article")
RESULTS = Path("artifacts/results")
# One image as it arrives, a batch that still fits the caches, and one that doesn't.
DEFAULT_BATCH_SIZES = (1, 64, 256)
# Ten rounds give the bootstrap something to draw from; with three backends and two blocks for each of three batch
# sizes, 150 ms make a run of about 45 s.
DEFAULT_ROUNDS, DEFAULT_BLOCK_MS = 10, 150.0
# A run that nobody asked to be long ends within two minutes even where every call is slow: no round begins after this.
DEFAULT_TIME_LIMIT_S = 90.0
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_AB_ROUNDS, DEFAULT_THRESHOLD_PERCENT = 20, 5.0

# Typer's rich help costs as much start-up time as everything else together.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)

BackendOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", metavar="NAME", help="A backend to run; repeat for more. Default: all that are available."
    ),
]
BundleOption = Annotated[Path, typer.Option("--bundle", help="The bundle's folder, as python -m export makes it.")]
BatchSizeOption = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, help="Images per call; repeat for more. Default: 1, 64 and 256."),
]
BlockOption = Annotated[float, typer.Option("--block-ms", min=1, help="How long one timed block of calls lasts.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of each runtime's pool. Default: the CPUs this process may use."),
]
ProfileOption = Annotated[
    Profile, typer.Option("--profile", help="strict: float32 everywhere. fast: TF32 where there is any.")
]
ControlOption = Annotated[
    bool,
    typer.Option("--control", help="Also run the unfolded file of each backend that runs a folded one."),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds a backend may take for one answer before it counts as hung.")
]


@app.callback()
def bench() -> None:
    """Measure a bundle's files on the runtimes of this machine, and prove that they are right."""


@app.command("run")
def run_command(
    backend: BackendOption = None,
    batch_size: BatchSizeOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Where the result goes. Default: artifacts/results/<bundle>.json"),
    ] = None,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    control: ControlOption = False,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            help="How often each backend gets its turn; an interval needs six. Default: 10, fewer on a slow machine.",
        ),
    ] = None,
    block_ms: BlockOption = DEFAULT_BLOCK_MS,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Accuracy parity and throughput: a table, and a JSON result with the raw samples.

    Exit code 1 when a parity failed or a backend did not finish.
    """
    _check_names(backend)
    from bench.report import console, print_run
    from bench.results import check_writable, write_result

    target = json or RESULTS / f"{bundle.name or bundle.resolve().name}.json"
    plan = _plan(
        [bundle],
        backend,
        control=control,
        batch_sizes=tuple(sorted(set(batch_size or DEFAULT_BATCH_SIZES))),
        rounds=rounds or DEFAULT_ROUNDS,
        time_limit_s=DEFAULT_TIME_LIMIT_S if rounds is None else None,
        block_s=block_ms / 1000,
        threads=threads,
        profile=profile,
        timeout_s=timeout,
    )
    from bench.run import exit_code, run

    check_writable(target)
    with _shown_progress() as progress:
        result = run(plan, progress)
    print_run(result, console())
    write_result(result, target)
    print(f"result: {target}")
    raise typer.Exit(exit_code(result))


@app.command("ab")
def ab_command(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE_A BUNDLE_B…", help="The base first, then what to compare with it.")
    ],
    backend: BackendOption = None,
    batch_size: BatchSizeOption = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where the result goes. Default: nowhere.")
    ] = None,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    rounds: Annotated[int, typer.Option("--rounds", min=6, help="How often each gets its turn.")] = DEFAULT_AB_ROUNDS,
    block_ms: BlockOption = DEFAULT_BLOCK_MS,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=100, help="Percent that a bundle may be slower than the first.")
    ] = DEFAULT_THRESHOLD_PERCENT,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Compare bundles with the first one in the same rounds of one run.

    Exit code 1 when one is slower, its whole interval below 1 - threshold, when a parity failed, or when a backend did
    not finish.
    """
    _check_names(backend)
    if len(bundles) < 2:
        raise BenchError("bench ab compares bundles: name at least two folders, the base first.", EXIT_USAGE)
    from bench.report import console, print_comparison, print_run
    from bench.results import check_writable, write_result
    from bench.run import exit_code, run
    from bench.summary import slower

    if json is not None:
        check_writable(json)
    plan = _plan(
        bundles,
        backend,
        control=False,
        batch_sizes=tuple(sorted(set(batch_size or DEFAULT_BATCH_SIZES))),
        rounds=rounds,
        time_limit_s=None,
        block_s=block_ms / 1000,
        threads=threads,
        profile=profile,
        timeout_s=timeout,
    )
    with _shown_progress() as progress:
        result = run(plan, progress)
    print_run(result, console())
    print_comparison(result, threshold, console())
    if json is not None:
        write_result(result, json)
        print(f"result: {json}")
    raise typer.Exit(max(exit_code(result), EXIT_NEGATIVE if slower(result.ratios, threshold) else 0))


@app.command("backends")
def backends_command(timeout: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Which backends can run here, and for the others why not and what would fix it."""
    from bench.report import console, print_backends
    from bench.run import availability

    print_backends(availability(threads=1, timeout_s=timeout), console())


@app.command("parity")
def parity_command(
    backend: BackendOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    control: ControlOption = False,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """The verdict alone: each backend's logits against the bundle's float64 oracle.

    Exit code 1 when one failed; every changed prediction is listed.
    """
    _check_names(backend)
    if backend and "null" in backend:
        raise BenchError("null computes nothing, so there is nothing to judge. Leave --backend null out.", EXIT_USAGE)
    from bench.report import console, print_parity
    from bench.run import exit_code, run

    plan = _plan(
        [bundle],
        backend,
        control=control,
        batch_sizes=(),
        rounds=0,
        time_limit_s=None,
        block_s=0.0,
        threads=threads,
        profile=profile,
        timeout_s=timeout,
    )
    with _shown_progress() as progress:
        result = run(plan, progress)
    print_parity(result, console())
    raise typer.Exit(exit_code(result))


def main() -> None:
    """The console script and `python -m bench`: errors become one paragraph on stderr and the exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app(prog_name="bench")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated:
        print("terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except SystemExit as ending:
        if ending.code == EXIT_INTERRUPTED:  # Typer has turned Ctrl-C into this, without a word
            print("interrupted: no result was written", file=sys.stderr)
        raise


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _check_names(names: list[str] | None) -> None:
    """Raises BenchError (usage) for a name that is no backend, before anything slow is imported."""
    for name in names or ():
        find_backend(name)


def _plan(
    bundles: list[Path],
    backends: list[str] | None,
    *,
    control: bool,
    batch_sizes: tuple[int, ...],
    rounds: int,
    time_limit_s: float | None,
    block_s: float,
    threads: int | None,
    profile: Profile,
    timeout_s: float,
) -> Plan:
    from bench.environment import usable_cpus
    from bench.run import Plan

    return Plan(
        bundles=tuple(bundles),
        backends=tuple(backends) if backends else None,
        control=control,
        batch_sizes=batch_sizes,
        rounds=rounds,
        time_limit_s=time_limit_s,
        block_s=block_s,
        threads=threads or usable_cpus(),
        profile=profile,
        timeout_s=timeout_s,
    )


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere. It is redrawn between the turns only: a thread that draws would
    cost CPU time while a backend is timed."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from bench.report import console

    out = console(stderr=True)
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=out, auto_refresh=False, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def show(what: str, done: float) -> None:
            bar.update(task, description=what, completed=done, refresh=True)

        yield show

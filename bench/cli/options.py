"""What the commands of `bench` have in common: options, defaults, and the progress bar.

Knows neither the commands nor what they do. Imports nothing heavy: every `--help` reads it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends.contract import Profile
from bench.backends.registry import find_backend
from bench.errors import EXIT_USAGE, BenchError

if TYPE_CHECKING:
    from bench.run.plan import Progress


DEFAULT_BUNDLE = Path("artifacts/bundles/article")
RESULTS = Path("artifacts/results")
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_THRESHOLD_PERCENT = 5.0

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
VariantOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant", metavar="NAME", help="A variant of the files, such as int8-raw; repeat for more. Default: float32."
    ),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds a backend may take for one answer before it counts as hung.")
]


def check_names(names: list[str] | None) -> None:
    """Raises BenchError (usage) for a name that is no backend, before anything slow is imported."""
    for name in names or ():
        find_backend(name)


def check_judged(names: list[str] | None) -> None:
    """As `check_names`, for a command that judges and compares: a backend that computes nothing is none of them."""
    check_names(names)
    for name in names or ():
        if not find_backend(name).formats:
            raise BenchError(
                f"{name} computes nothing, so there is nothing to judge or to compare. Leave --backend {name} out.",
                EXIT_USAGE,
            )


def default_place(bundle: Path, ending: str) -> Path:
    """Where the results of a bundle go if nobody says it."""
    return RESULTS / f"{bundle.name or bundle.resolve().name}{ending}"


def command_line() -> str:
    """The command line, for the result: what would make it again."""
    return shlex.join(["bench", *sys.argv[1:]])


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere. It is redrawn between the turns only: a thread that draws would
    cost CPU time while a backend is timed."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from bench.report.terminal.console import console

    out = console(stderr=True)
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=out, auto_refresh=False, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def show(what: str, done: float) -> None:
            bar.update(task, description=what, completed=done, refresh=True)

        yield show

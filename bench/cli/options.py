"""What the commands of `bench` have in common: options, defaults, and the progress bar.

Knows neither the commands nor what they do. Imports nothing heavy: every `--help` reads it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends.profile import Profile
from bench.errors import EXIT_USAGE, BenchError

if TYPE_CHECKING:
    from bench.results.schema import Row
    from bench.run.plan import Listener, Note, Progress


DEFAULT_BUNDLE = Path("artifacts/bundles/article")
RESULTS = Path("artifacts/results")
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_THRESHOLD_PERCENT = 5.0
# A p99 scatters more than a median; the memory of a process differs by some percent between starts of the same one.
DEFAULT_P99_PERCENT, DEFAULT_MEMORY_PERCENT, DEFAULT_SIZE_PERCENT = 20.0, 15.0, 5.0
# Redrawing takes a millisecond and a half of one CPU, while a backend may be timed.
DRAWN_PER_S = 1

BackendOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", metavar="NAME", help="A backend to run; repeat for more. Default: all that are available."
    ),
]
BundleOption = Annotated[Path, typer.Option("--bundle", help="The bundle's folder, as python -m export makes it.")]
PlaceArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[BUNDLE_OR_FILE]",
        help="A bundle, in the place of --bundle; or an ONNX file, of which a bundle is made for as long as it takes.",
    ),
]
InputOption = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="With an ONNX file that leaves it open: one input, as 3x224x224."),
]
BatchSizeOption = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, help="Images per call; repeat for more. Default: 1, 64 and 256."),
]
BlockOption = Annotated[
    float | None, typer.Option("--block-ms", min=1, help="How long one timed block of calls lasts. Default: 150.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="How often every backend is started anew. An interval that holds for the next process needs three.",
    ),
]
TimeLimitOption = Annotated[
    float | None, typer.Option("--time-limit", min=1, help="Seconds after which no process and no round begins.")
]
AllowInconclusiveOption = Annotated[
    bool, typer.Option("--allow-inconclusive", help="Exit with 0 instead of 5 where nothing could be decided.")
]
WideOption = Annotated[bool, typer.Option("--wide", help="All columns, also where the window has no room for them.")]
ParityInputsOption = Annotated[
    int | None,
    typer.Option(
        "--parity-inputs",
        min=2,
        help="Hold each backend to so many of the bundle's inputs. Default: all, or those that there is time for.",
    ),
]
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
    from bench.backends.registry import find_backend

    for name in names or ():
        find_backend(name)


def check_judged(names: list[str] | None) -> None:
    """As `check_names`, for a command that judges and compares: a backend that computes nothing is none of them."""
    from bench.backends.registry import find_backend

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
    """On a terminal a progress bar, elsewhere a line for each phase, both on stderr."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from bench.report.terminal.console import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield _printed_phases()
        return
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=out, refresh_per_second=DRAWN_PER_S, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


@contextmanager
def shown_rows() -> Iterator[tuple[Progress, Listener, Note]]:
    """As `shown_progress`, with the rows that are known so far above the bar, elsewhere a line for each as soon as it
    is known; and a line, kept in either case, for what is to be known of the run.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    from bench.report.columns import SO_FAR
    from bench.report.terminal.console import console
    from bench.report.terminal.table import table

    out = console(stderr=True)
    if not out.is_terminal:
        yield _printed_phases(), _printed_rows(), lambda line: print(line, file=sys.stderr, flush=True)
        return
    bar = Bar(BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    task = bar.add_task("", total=1.0)
    with Live(bar, console=out, refresh_per_second=DRAWN_PER_S, transient=True) as live:

        def listen(rows: Sequence[Row]) -> None:
            live.update(Group(Text("so far:", style="dim"), table(SO_FAR, rows), bar))

        yield lambda what, done: bar.update(task, description=what, completed=done), listen, live.console.print


def _printed_rows() -> Listener:
    """Prints each row once, with its throughput end to end so far."""
    printed: set[tuple[str, int]] = set()

    def listen(rows: Sequence[Row]) -> None:
        for row in rows:
            if (row.subject, row.batch_size) not in printed:
                printed.add((row.subject, row.batch_size))
                images_per_s = row.throughput("end_to_end").median
                print(
                    f"so far: {row.subject}, batch {row.batch_size}: {images_per_s:,.1f} images/s",
                    file=sys.stderr,
                    flush=True,
                )

    return listen


def _printed_phases() -> Progress:
    """Prints what is being done, as far as its first comma or colon, where that changes."""
    last = ""

    def show(what: str, done: float) -> None:
        nonlocal last
        phase = re.split("[,:]", what, maxsplit=1)[0]
        if phase != last:
            print(phase, file=sys.stderr, flush=True)
            last = phase

    return show

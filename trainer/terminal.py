"""What a training shows while it runs: lines, and a bar where stderr is a terminal.

Owns how that looks. Knows nothing of how the run works: it is told.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.recipes import Recipe

if TYPE_CHECKING:
    from trainer.history import Evaluation

REDRAW_S = 0.1
"""A bar takes some 50 µs to be told, and a step on a GPU not much more."""

Note = Callable[[str], None]
Stepped = Callable[[int, "Evaluation | None"], None]


@contextlib.contextmanager
def progress(recipe: Recipe, iterations: int, evaluated: str) -> Iterator[tuple[Note, Stepped]]:
    """Who tells the user of a run: of every `print_every` iterations a line, and a bar if there is a terminal."""

    def line(iteration: int, evaluation: Evaluation | None) -> None:
        every = recipe.print_every
        if evaluation and (iteration == iterations or (every is not None and iteration % every == 0)):
            print(
                f"iteration {iteration:>6}   loss {evaluation.loss:.4f}   {evaluated} top-1 {evaluation.top1:.2f} %",
                flush=True,
            )

    if not sys.stderr.isatty():
        yield lambda sentence: print(sentence, flush=True), line
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  top-1 {task.fields[top1]}  {task.fields[speed]} images/s  left"),
        TimeRemainingColumn(),
    )
    # rich would send what is printed to the bar's console, stderr: only where both are the one terminal is that right.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("training", total=iterations, loss="-", top1="-", speed="-")
        redraw_at = 0.0

        def stepped(iteration: int, evaluation: Evaluation | None) -> None:
            nonlocal redraw_at
            now = time.perf_counter()
            if evaluation:
                speed = f"{iteration * recipe.batch_size / evaluation.seconds:,.0f}"
                bar.update(task, loss=f"{evaluation.loss:.4f}", top1=f"{evaluation.top1:.2f} %", speed=speed)
            if evaluation or now >= redraw_at:
                bar.update(task, completed=iteration)
                redraw_at = now + REDRAW_S
            line(iteration, evaluation)

        yield lambda sentence: print(sentence, flush=True), stepped

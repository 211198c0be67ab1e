"""`python -m trainer`: train, or look at the data.

Owns the command line, what is printed and where files go. Knows nothing of how a step works. torch is imported only
once there is something to train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, UserError, run_app
from trainer.provenance import git_commit
from trainer.recipes import DEFAULT_RECIPE, RECIPES, Recipe

if TYPE_CHECKING:
    from trainer.train import Evaluation, Interrupted, Trained

TRAINING_DIR = Path("artifacts/training")
DATA_FIGURE = Path("artifacts/data/digits.png")
DATA_DIR = Path("data")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """What the network computes in; weights and optimizer are float32 in both."""

    FLOAT32 = "float32"
    BF16 = "bf16"


def main() -> None:
    """The command, as a process of its own."""
    run_app(app, "python -m trainer")


def _known_recipe(name: str) -> str:
    if name not in RECIPES:
        raise typer.BadParameter(f"there is no recipe {name!r}; known: {', '.join(RECIPES)}.")
    return name


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Option(help=f"One of: {', '.join(RECIPES)}.", callback=_known_recipe)
    ] = DEFAULT_RECIPE,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same machine: same bits (CPU).")] = 0,
    device: Annotated[Device, typer.Option(help="auto takes CUDA where it is usable.")] = Device.AUTO,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the recipe's")] = None,
    precision: Annotated[Precision, typer.Option(help="What the network computes in.")] = Precision.FLOAT32,
    out: Annotated[Path | None, typer.Option(help="Training folder.", show_default=f"{TRAINING_DIR}/<recipe>")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where MNIST is, or is put.")] = DATA_DIR,
) -> None:
    """Train the article's network on MNIST and save checkpoint, history and figures.

    Without a command this trains; `data` looks at the data instead.
    """
    if context.invoked_subcommand is not None:
        context.obj = data_dir
        return
    _train(RECIPES[recipe], seed, device, iterations, precision, out or TRAINING_DIR / recipe, data_dir)


@app.command()
def data(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Where the figure of the first 40 training digits goes.")] = DATA_FIGURE,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where MNIST is, or is put.", show_default=str(DATA_DIR))
    ] = None,
) -> None:
    """Look at MNIST: shapes, one batch, images per class, and a figure of the first 40 training digits."""
    import numpy as np

    from trainer import figures, mnist

    folder = data_dir or context.obj
    mnist_data = mnist.load(folder)
    batch_size = RECIPES[DEFAULT_RECIPE].batch_size
    batch = mnist.normalise(mnist_data.train_images[:batch_size])[:, None]
    print(f"MNIST in {folder}")
    print(f"training images {mnist_data.train_images.shape} {mnist_data.train_images.dtype}, ", end="")
    print(f"labels {mnist_data.train_labels.shape}")
    print(f"test images     {mnist_data.test_images.shape} {mnist_data.test_images.dtype}, ", end="")
    print(f"labels {mnist_data.test_labels.shape}")
    print(f"one batch       {batch.shape} {batch.dtype} in [{batch.min():g}, {batch.max():g}]")
    print("class           " + " ".join(f"{name:>5}" for name in mnist.CLASS_NAMES))
    for part, labels in (("training", mnist_data.train_labels), ("test", mnist_data.test_labels)):
        print(f"{part + ' images':<16}" + " ".join(f"{count:>5}" for count in np.bincount(labels)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figures.digits(mnist_data.train_images, mnist_data.train_labels, out)
    except OSError as error:
        raise UserError(f"can't write {out} ({error.strerror or error}). Name another file with --out.") from error
    print(f"the first {figures.DIGITS} training digits, from index 0 (the article's listing starts at 1): {out}")


def _train(
    recipe: Recipe, seed: int, device: str, iterations: int | None, precision: str, out: Path, data_dir: Path
) -> None:
    from trainer import checkpoint, mnist
    from trainer.publish import building

    # First of all: a place that can't be written is told before the training, not after it.
    with building(out, checkpoint.FILE_NAME) as folder:
        try:
            mnist_data = mnist.load(data_dir)

            # Here, and not before: torch takes seconds to import.
            from trainer import train as loop

            chosen = loop.choose_device(device)
            print(f"recipe {recipe.name} ({recipe.summary}), seed {seed}, {precision}, on {chosen}", flush=True)
            try:
                with _progress(recipe, iterations or recipe.iterations) as (note, stepped):
                    trained = loop.train(
                        recipe,
                        mnist_data,
                        seed=seed,
                        device=chosen,
                        iterations=iterations,
                        precision=precision,
                        watcher=loop.Watcher(note, stepped),
                    )
            except loop.Interrupted as interrupted:
                raise _after_interrupt(interrupted, recipe, seed, precision, out) from None
        except (KeyboardInterrupt, Terminated) as interrupt:
            raise _nothing_saved(isinstance(interrupt, Terminated), out) from None
        _write(folder, trained, recipe, seed, precision)
        from trainer import figures

        reached = f"{trained.history[-1].test_top1:.2f} % after {trained.steps} iterations"
        figures.curves(trained.history, folder / "curves.png", f"{recipe.name}, seed {seed}, {precision}: {reached}")
        figures.digits(mnist_data.train_images, mnist_data.train_labels, folder / "digits.png")
    _print_result(trained, out)


def _print_result(trained: Trained, out: Path) -> None:
    last = trained.history[-1]
    best = max(trained.history, key=lambda evaluation: evaluation.test_top1)
    compiling = f" and {trained.compile_seconds:.1f} s of compiling" if trained.compile_seconds else ""
    print(
        f"test top-1 {last.test_top1:.2f} % after {trained.steps} iterations; "
        f"best {best.test_top1:.2f} % at iteration {best.iteration}; {trained.seconds:.1f} s of training{compiling}"
    )
    print(f"saved in {out}")


def _nothing_saved(terminated: bool, out: Path) -> UserError:
    what, code = _ENDED[terminated]
    return UserError(f"{what} before the first iteration: nothing was saved, and {out} is as it was.", code)


def _after_interrupt(interrupted: Interrupted, recipe: Recipe, seed: int, precision: str, out: Path) -> UserError:
    """Save what an interrupted run has come to beside `out`, and make the paragraph that says so."""
    from trainer.checkpoint import FILE_NAME
    from trainer.publish import building

    # An impatient second Ctrl-C, or the SIGTERM that nox sends after the first, must not spoil the saving: it is short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    partial = interrupted.partial
    if partial.steps == 0:
        return _nothing_saved(interrupted.terminated, out)
    kept = out.with_name(f"{out.name}.interrupted")
    with building(kept, FILE_NAME) as folder:
        _write(folder, partial, recipe, seed, precision)
    what, code = _ENDED[interrupted.terminated]
    return UserError(
        f"{what} after {partial.steps} iterations: the weights and the history so far are in {kept}, and {out} is as "
        "it was.",
        code,
    )


_ENDED = {False: ("interrupted", EXIT_INTERRUPTED), True: ("terminated", EXIT_TERMINATED)}


def _write(folder: Path, trained: Trained, recipe: Recipe, seed: int, precision: str) -> None:
    """Checkpoint and history; raises OSError."""
    from trainer import checkpoint, mnist

    evaluated = trained.history[-1] if trained.history else None
    facts = checkpoint.CheckpointMetadata(
        model="trainer.model:Net",
        recipe=recipe.name,
        seed=seed,
        steps=trained.steps,
        test_top1=evaluated.test_top1 if evaluated and evaluated.iteration == trained.steps else None,
        precision=precision,
        preprocessing=checkpoint.PixelScaling(scale=float(mnist.SCALE), mean=float(mnist.MEAN), std=float(mnist.STD)),
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("ninefold", "numpy", "torch")},
        git_commit=git_commit(Path(__file__)),
    )
    checkpoint.save(folder / checkpoint.FILE_NAME, trained.weights, facts)
    lines = (json.dumps(dataclasses.asdict(evaluation)) for evaluation in trained.history)
    (folder / checkpoint.HISTORY_NAME).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextlib.contextmanager
def _progress(
    recipe: Recipe, iterations: int
) -> Iterator[tuple[Callable[[str], None], Callable[[int, Evaluation | None], None]]]:
    """Who tells the user of a run: a bar where stderr is a terminal, and every `print_every` iterations a line."""

    def line(iteration: int, evaluation: Evaluation | None) -> None:
        if evaluation and (iteration % recipe.print_every == 0 or iteration == iterations):
            print(
                f"iteration {iteration:>6}   loss {evaluation.loss:.4f}   test top-1 {evaluation.test_top1:.2f} %",
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

        def stepped(iteration: int, evaluation: Evaluation | None) -> None:
            bar.update(task, completed=iteration)
            if evaluation:
                speed = f"{iteration * recipe.batch_size / evaluation.seconds:,.0f}"
                bar.update(task, loss=f"{evaluation.loss:.4f}", top1=f"{evaluation.test_top1:.2f} %", speed=speed)
            line(iteration, evaluation)

        yield lambda sentence: print(sentence, flush=True), stepped

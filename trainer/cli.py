"""`python -m trainer`: train, measure a recipe, or look at the data.

Owns the command line and where files go by default. Knows nothing of how a step works. torch is imported only once
there is something to train.
"""

from __future__ import annotations

import dataclasses
import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import ENDED, EXIT_NEGATIVE, Interrupted, UserError, run_app
from trainer.folder import Request, fill
from trainer.provenance import seconds_since_process_start
from trainer.publish import replace_file
from trainer.recipes import DEFAULT_RECIPE, RECIPES, Settings

if TYPE_CHECKING:
    from trainer.measure import Seed

TRAINING_DIR = Path("artifacts/training")
DATA_FIGURE = Path("artifacts/data/digits.png")
DATA_DIR = Path("data")
MOST_HELD_OUT = 50_000

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


RecipeOption = Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.", callback=_known_recipe)]
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA where it is usable.")]
PrecisionOption = Annotated[Precision, typer.Option(help="What the network computes in.")]
IterationsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the recipe's")]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Times through the data.", show_default="the recipe's")]
SEED_LIMIT = 2**63 - 1


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    recipe: RecipeOption = DEFAULT_RECIPE,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT, help="Same seed, same machine: same bits (CPU).")] = 0,
    device: DeviceOption = Device.AUTO,
    epochs: EpochsOption = None,
    iterations: IterationsOption = None,
    precision: PrecisionOption = Precision.FLOAT32,
    validation: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_HELD_OUT,
            help="Hold out so many training images, always the same; evaluate on them, and on the test images once.",
        ),
    ] = 0,
    early_stop: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many evaluations without a new best, and keep the best weights."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save, to the same bits.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds from one save to the next.")] = 30.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events at the end.")] = False,
    out: Annotated[Path | None, typer.Option(help="Training folder.", show_default=f"{TRAINING_DIR}/<recipe>")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where MNIST is, or is put.")] = DATA_DIR,
) -> None:
    """Train the article's network on MNIST and save checkpoint, history and figures.

    Without a command this trains. While it does, it is saved to FOLDER.unfinished.safetensors now and then, and when it
    is interrupted; the same command with --resume goes on from there.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before_a_command(context)
        context.obj = data_dir
        return
    settings = _settings(recipe, seed, precision, epochs, iterations, validation, early_stop)
    folder = out or TRAINING_DIR / recipe
    fill(Request(settings, device, folder, data_dir, save_every, resume, tensorboard))


@app.command()
def measure(
    context: typer.Context,
    recipe: RecipeOption = DEFAULT_RECIPE,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT, help="The seed of the first.")] = 0,
    target: Annotated[
        float | None, typer.Option(min=0, max=100, help="Test this mean top-1, in percent: exit code 1 if missed.")
    ] = None,
    device: DeviceOption = Device.AUTO,
    epochs: EpochsOption = None,
    iterations: IterationsOption = None,
    precision: PrecisionOption = Precision.FLOAT32,
    out: Annotated[
        Path | None, typer.Option(help="The JSON file.", show_default=f"{TRAINING_DIR}/measure-<recipe>.json")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where MNIST is, or is put.", show_default=str(DATA_DIR))
    ] = None,
) -> None:
    """Train a recipe with several seeds: mean and deviation of the test accuracy, and where the time goes."""
    settings = _settings(recipe, first_seed, precision, epochs, iterations, 0, None)
    _measure(settings, seeds, target, device, out or TRAINING_DIR / f"measure-{recipe}.json", data_dir or context.obj)


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


def _refuse_options_before_a_command(context: typer.Context) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if name != "data_dir" and source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option} belongs to training; options of a command stand behind it.")


def _settings(
    recipe: str,
    seed: int,
    precision: Precision,
    epochs: int | None,
    iterations: int | None,
    validation: int,
    early_stop: int | None,
) -> Settings:
    chosen = RECIPES[recipe]
    if epochs is not None and iterations is not None:
        raise typer.BadParameter("--epochs and --iterations both set the length: give one of them.")
    if early_stop is not None and not validation:
        raise typer.BadParameter(
            "--early-stop needs images to go by that are neither trained on nor the test: add --validation 10000."
        )
    if early_stop is not None and chosen.evaluate_every is None:
        raise typer.BadParameter(f"recipe {recipe} is evaluated once, at the end: --early-stop has nothing to go by.")
    if epochs is not None:
        chosen = dataclasses.replace(chosen, epochs=epochs)
    return Settings(chosen, seed, precision.value, iterations, validation, early_stop)


def _measure(settings: Settings, seeds: int, target: float | None, device: str, out: Path, data_dir: Path) -> None:
    """Measure, print, and store after each seed; exit code 1 where the target is missed."""
    began = time.perf_counter() - seconds_since_process_start()
    from trainer import mnist

    data = mnist.load(data_dir)
    from trainer import train as loop
    from trainer.measure import summary, trainings

    chosen = loop.choose_device(device)
    recipe = settings.recipe
    print(f"recipe {recipe.name} ({recipe.summary}), {seeds} seeds, {settings.precision}, on {chosen}", flush=True)
    measured: list[Seed] = []
    try:
        for seed, execution in trainings(settings, seeds, data, chosen, began, loop.Watcher(note=print)):
            measured.append(seed)
            _print_seed(seed)
            found = summary(settings, measured, target, chosen, execution)
            out.parent.mkdir(parents=True, exist_ok=True)
            replace_file(out, (json.dumps(found, indent=1) + "\n").encode())
    except Interrupted as interrupted:
        what, code = ENDED[interrupted.terminated]
        kept = f"the {len(measured)} before it are in {out}" if measured else "nothing was stored"
        raise UserError(f"{what} in seed {settings.seed + len(measured)}: {kept}.", code) from None
    except OSError as error:
        raise UserError(f"can't write {out} ({error.strerror or error}). Name another file with --out.") from error

    deviation = found["deviation_test_top1_percent"]
    print(
        f"test top-1 {found['mean_test_top1_percent']:.3f} % on average"
        + ("" if deviation is None else f" (deviation {deviation:.3f})")
        + f"; {found['median_total_seconds']:.2f} s in all, {found['median_training_seconds']:.2f} s of them training "
        f"(medians); stored in {out}"
    )
    if target is not None:
        reached = found["mean_test_top1_percent"] >= target
        p = "" if found["p_value"] is None else f" (p = {found['p_value']:.2g} that the true mean is no higher)"
        print(f"target {target:g} % {'reached' if reached else 'missed'}{p}")
        if not reached:
            raise typer.Exit(EXIT_NEGATIVE)


def _print_seed(seed: Seed) -> None:
    print(
        f"seed {seed.seed:>3}   test top-1 {seed.test_top1_percent:.2f} %   {seed.total_seconds:.2f} s: "
        f"{seed.setup_seconds:.2f} setting up, {seed.compile_seconds:.2f} compiling or capturing, "
        f"{seed.training_seconds:.2f} training, {seed.evaluation_seconds:.2f} evaluating",
        flush=True,
    )

"""The training folder: a training from the request to the files that come out.

Owns which files lie in it, what is told on the way, and what becomes of an interruption. Knows nothing of the command
line or of how a step works. torch is imported only once there is something to train.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import checkpoint, events, mnist
from trainer.errors import ENDED, EXIT_USAGE, Interrupted, Terminated, UserError
from trainer.provenance import git_commit, versions
from trainer.publish import building
from trainer.recipes import Settings
from trainer.terminal import progress

if TYPE_CHECKING:
    from trainer.history import Evaluation, Trained


@dataclass(frozen=True)
class Request:
    """What one training was asked for."""

    settings: Settings
    device: str
    out: Path
    data_dir: Path
    save_every_s: float
    resume: bool
    tensorboard: bool

    @property
    def unfinished(self) -> Path:
        """The save of the run while it isn't finished."""
        return self.out.with_name(f"{self.out.name}.unfinished.safetensors")

    @property
    def evaluated(self) -> str:
        """Which images the history speaks of."""
        return "validation" if self.settings.validation else "test"


def fill(request: Request) -> None:
    """Train, and publish the folder; where torchrun started several processes, the first alone prints and writes."""
    if _together() and request.resume:
        raise UserError("--resume: several processes that train together save nothing to go on from.", EXIT_USAGE)
    if _together() and os.environ["RANK"] != "0":
        _train_along(request)
        return
    if request.tensorboard:
        events.require()
    settings = request.settings
    # First of all: a place that can't be written is told before the training, not after it.
    with building(request.out, checkpoint.FILE_NAME) as folder:
        try:
            data = mnist.load(request.data_dir)
            steps = settings.steps(len(data.train_labels) - settings.validation)
            with progress(settings.recipe, steps, request.evaluated) as (note, stepped):
                trained = _train(request, data, note, stepped)
        except (KeyboardInterrupt, Terminated) as interrupt:
            raise _before_the_first_step(isinstance(interrupt, Terminated), request) from None
        except Interrupted as interrupted:
            raise _on_the_way(interrupted, request) from None
        _write(folder, trained, request)
        from trainer import figures

        reached = f"test top-1 {trained.test_top1:.2f} % after {trained.steps} iterations"
        title = f"{settings.recipe.name}, seed {settings.seed}, {settings.precision}: {reached}"
        figures.curves(trained.history, folder / "curves.png", title, request.evaluated)
        figures.digits(data.train_images, data.train_labels, folder / "digits.png")
    request.unfinished.unlink(missing_ok=True)
    _print_result(trained, request)


def _train(
    request: Request,
    data: mnist.Mnist,
    note: Callable[[str], None],
    stepped: Callable[[int, Evaluation | None], None],
) -> Trained:
    # Here, and not before: torch takes seconds to import.
    from trainer import train as loop
    from trainer.distributed import joined
    from trainer.resume import Saving

    settings, recipe = request.settings, request.settings.recipe
    device = loop.choose_device(request.device)
    note(f"recipe {recipe.name} ({recipe.summary}), seed {settings.seed}, {settings.precision}, on {device}")
    saving = None if _together() else Saving(request.unfinished, request.save_every_s, request.resume)
    if saving and not saving.resume and saving.path.exists():
        note(f"the first save will take the place of the unfinished run {saving.path}; --resume would go on with that")
    with joined(device) as group:
        watcher = loop.Watcher(note, stepped)
        return loop.train(settings, data, device=device, saving=saving, watcher=watcher, group=group)


def _train_along(request: Request) -> None:
    """The part of a process that neither prints nor writes."""
    try:
        _train(request, mnist.load(request.data_dir, progress=False), _silently, _silently)
    except Interrupted as interrupted:
        raise SystemExit(ENDED[interrupted.terminated][1]) from None


def _together() -> bool:
    """Whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _silently(*_: object) -> None:
    """The watcher of a process that has nothing to say."""


def _before_the_first_step(terminated: bool, request: Request) -> UserError:
    what, code = ENDED[terminated]
    kept = f", and so is the save {request.unfinished}" if request.unfinished.exists() else ""
    return UserError(
        f"{what} before the first iteration: nothing was saved, and {request.out} is as it was{kept}.", code
    )


def _on_the_way(interrupted: Interrupted, request: Request) -> UserError:
    what, code = ENDED[interrupted.terminated]
    if interrupted.saved is None:
        kept = "nothing was saved"
    else:
        kept = (
            f"the same command with --resume goes on from iteration {interrupted.saved}, saved in {request.unfinished}"
        )
    return UserError(f"{what} after {interrupted.steps} iterations: {kept}, and {request.out} is as it was.", code)


def _print_result(trained: Trained, request: Request) -> None:
    best = max(trained.history, key=lambda evaluation: evaluation.top1)
    named = "best" if request.evaluated == "test" else "best validation top-1"
    doing = {"compiled": "compiling", "captured": "capturing"}.get(trained.execution, "trying to compile or capture")
    beforehand = f" and {trained.compile_seconds:.1f} s of {doing}" if trained.compile_seconds else ""
    print(
        f"test top-1 {trained.test_top1:.2f} % after {trained.steps} iterations; "
        f"{named} {best.top1:.2f} % at iteration {best.iteration}; {trained.seconds:.1f} s of training{beforehand}"
    )
    print(f"saved in {request.out}")


def _write(folder: Path, trained: Trained, request: Request) -> None:
    """Checkpoint, history and events; raises OSError."""
    settings = request.settings
    facts = checkpoint.CheckpointMetadata(
        model="trainer.model:Net",
        recipe=settings.recipe.name,
        seed=settings.seed,
        steps=trained.steps,
        test_top1=trained.test_top1,
        precision=settings.precision,
        preprocessing=checkpoint.PixelScaling(scale=float(mnist.SCALE), mean=float(mnist.MEAN), std=float(mnist.STD)),
        versions=versions("ninefold", "numpy", "torch"),
        git_commit=git_commit(Path(__file__)),
    )
    checkpoint.save(folder / checkpoint.FILE_NAME, trained.weights, facts)
    lines = []
    for evaluation in trained.history:
        line = dataclasses.asdict(evaluation)
        line[f"{request.evaluated}_top1"] = line.pop("top1")
        lines.append(json.dumps(line) + "\n")
    (folder / checkpoint.HISTORY_NAME).write_text("".join(lines), encoding="utf-8")
    if request.tensorboard:
        events.write(trained.history, request.evaluated, folder)

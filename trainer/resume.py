"""The save of an unfinished run: one file from which it goes on to the very bits that it would have come to.

Owns that file: what is in it, when it is written, and whether it belongs to the run that wants to go on from it. Knows
nothing of how a step works. The order of the images is not in it: it follows from the seed and the iteration.

A save takes the place of the one before in one atomic step, so a kill at any moment leaves one or the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from trainer import mnist
from trainer.errors import UserError
from trainer.history import Evaluation, Progress
from trainer.publish import replace_file
from trainer.recipes import Settings
from trainer.step import Step

METADATA_KEY = "ninefold-unfinished"
BEST, RANDOM = "best/", "random/"
IRRELEVANT = {"summary", "print_every"}
"""What of a recipe changes nothing of what comes out."""

Facts = dict[str, object]


@dataclass(frozen=True)
class Saving:
    """Where a run is saved, how often, and whether it goes on from what is there."""

    path: Path
    every_s: float = 30.0
    resume: bool = False


def identity(settings: Settings, iterations: int, data: mnist.Mnist, device: torch.device) -> Facts:
    """What two runs must have in common for one to go on where the other stopped, by name."""
    own = dataclasses.asdict(settings)
    recipe = own.pop("recipe")
    digest = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(array.tobytes())
    facts = {f"recipe.{name}": number for name, number in recipe.items() if name not in IRRELEVANT}
    facts |= own | {"iterations": iterations, "data": digest.hexdigest(), "device": device.type}
    plain: Facts = json.loads(json.dumps(facts))
    return plain


def circumstances(execution: str) -> Facts:
    """What may change the last bits although the run is the same one."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "execution": execution}


@dataclass(frozen=True)
class Save:
    """A save as it was read."""

    tensors: dict[str, torch.Tensor]
    progress: Progress
    circumstances: Facts

    def restore(self, step: Step) -> None:
        """Set the step, and torch's random streams, to where they were."""
        step.restore(self.tensors)
        torch.set_rng_state(self.tensors[f"{RANDOM}cpu"])
        if step.device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors[f"{RANDOM}cuda"], step.device)


def load(path: Path, run: Facts) -> Save:
    """The save in `path`; UserError (exit 4) where it can't be read or is another run's, naming the difference."""
    remedy = "Name another training folder with --out, or begin anew without --resume."
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        facts = json.loads(entries[METADATA_KEY])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no save of an unfinished run ({type(error).__name__}: {error}). {remedy}"
        ) from error
    if differences := _differences(facts["run"], run):
        raise UserError(f"{path} is the save of another run: {'; '.join(differences)}. {remedy}")
    progress = facts["progress"]
    progress["history"] = [Evaluation(**evaluation) for evaluation in progress["history"]]
    best = {name.removeprefix(BEST): tensor for name, tensor in tensors.items() if name.startswith(BEST)}
    return Save(tensors, Progress(**progress, best=best), facts["circumstances"])


class Saver:
    """Saves a run now and then. `last` is the iteration of the last good save, None where there is none."""

    def __init__(
        self, saving: Saving, run: Callable[[], Facts], execution: str, note: Callable[[str], None], last: int | None
    ) -> None:
        self.path, self.last = saving.path, last
        self._every_s, self._run, self._execution, self._note = saving.every_s, run, execution, note
        self._next = time.perf_counter() + self._every_s

    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.perf_counter() >= self._next

    def save(self, step: Step, progress: Progress) -> None:
        """Save the run; where that fails, say so: the run goes on, and the save before stays."""
        tensors = step.tensors() | {f"{BEST}{name}": tensor for name, tensor in progress.best.items()}
        tensors[f"{RANDOM}cpu"] = torch.get_rng_state()
        if step.device.type == "cuda":
            tensors[f"{RANDOM}cuda"] = torch.cuda.get_rng_state(step.device)
        fields = {field.name: getattr(progress, field.name) for field in dataclasses.fields(progress)}
        fields["history"] = [dataclasses.asdict(evaluation) for evaluation in fields.pop("history")]
        del fields["best"]
        facts = {"run": self._run(), "circumstances": circumstances(self._execution), "progress": fields}
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            replace_file(self.path, safetensors.torch.save(on_host, {METADATA_KEY: json.dumps(facts)}))
            self.last = progress.iteration
        except OSError as error:
            before = "there is no earlier one" if self.last is None else f"that of iteration {self.last} stays"
            self._note(f"can't save the run in {self.path} ({error.strerror or error}): training goes on, {before}")
        self._next = time.perf_counter() + self._every_s


def _differences(saved: Facts, wanted: Facts) -> list[str]:
    """Each fact in which two runs differ, in words; of another recipe only its name."""
    names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if "recipe.name" in names:
        names = [name for name in names if name == "recipe.name" or not name.startswith("recipe.")]
    return [f"{name} was {_brief(saved.get(name))} and is {_brief(wanted.get(name))} now" for name in names]


def _brief(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else json.dumps(value)

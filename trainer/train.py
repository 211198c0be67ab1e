"""The training loop.

Owns one training run, from a seed to weights and a history: in which order the images are seen, when they are
evaluated, when the run is saved and how it ends. Knows nothing of terminals or figures: what it learns on the way goes
to a callback, what comes out is a value.

What makes it faster than a loop over a DataLoader: the whole data set lies on the device as it came, so that a batch is
one gather; step and evaluation are compiled (CPU) or one recorded graph each (CUDA); nothing is read back between two
evaluations.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import torch

from trainer import mnist, resume
from trainer.compiling import compile_step
from trainer.distributed import ALONE, Group
from trainer.errors import EXIT_NEGATIVE, EXIT_UNAVAILABLE, Interrupted, UserError
from trainer.history import Evaluation, Progress, Trained
from trainer.recipes import Settings
from trainer.step import Images, Step

COMPILE_FROM_ITERATIONS = 2_000
"""A shorter run on the CPU trains eagerly. Compiling takes 8 s where it was done before and 15 to 60 s where not; it
saves 8 ms a step and 0.2 s an evaluation, 12 ms an iteration in all (two cores of a Xeon at 2.5 GHz, torch 2.14.1). A
fixed number, not a guess at run time: the same command must give the same bits."""

SPLIT_SEED = 1234
"""The permutation of the training images whose end is held out for validation: the same for every run."""


@dataclass(frozen=True)
class Watcher:
    """Who is told of a run: `note` gets a sentence, `stepped` the iterations done and the evaluation, if any."""

    note: Callable[[str], None] = field(default=lambda sentence: None)
    stepped: Callable[[int, Evaluation | None], None] = field(default=lambda iteration, evaluation: None)


SILENT = Watcher()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before its first step.

    `advance` makes one step and returns the loss, `count` tells how many of the `evaluation` images are classified
    right, both as tensors that may not be there yet. `training` is what is left of the training images.
    """

    settings: Settings
    iterations: int
    training: Images
    evaluation: Images
    test: Images
    step: Step
    advance: Callable[[], torch.Tensor]
    count: Callable[[], torch.Tensor]
    execution: str
    compile_seconds: float


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device; UserError (exit 3) where CUDA was asked for and can't be used."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old: that is the reason
        warnings.simplefilter("always")
        usable = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        built = torch.version.cuda
        reason = "this torch was built without CUDA" if built is None else f"torch (CUDA {built}) finds no usable GPU"
        if caught:
            reason += f": {' '.join(str(caught[-1].message).split())[:300]}"
        remedy = "install a CUDA build of torch" if built is None else "check the driver with nvidia-smi"
        raise UserError(
            f"--device cuda: {reason}. Either {remedy}, or train with --device cpu or --device auto.", EXIT_UNAVAILABLE
        )
    return torch.device("cuda" if usable else "cpu")


def train(
    settings: Settings,
    data: mnist.Mnist,
    *,
    device: torch.device = CPU,
    compiled: bool | None = None,
    saving: resume.Saving | None = None,
    watcher: Watcher = SILENT,
    group: Group = ALONE,
) -> Trained:
    """Train a fresh network, or, `saving.resume`, go on where the save was made.

    The same arguments on the same machine give the same bits on the CPU, however often the run was interrupted.
    `compiled` None means: compile where that pays (COMPILE_FROM_ITERATIONS), and train eagerly where it fails; True and
    False insist. On CUDA a graph is captured instead, which always pays; several processes train eagerly there.

    Raises Interrupted on Ctrl-C and SIGTERM once the first step may have begun, and UserError where the save is another
    run's (exit 4), the loss is no number (exit 1) or a graph can't be captured (exit 3).
    """
    iterations = settings.steps(len(data.train_labels) - settings.validation)
    run_facts = partial(resume.identity, settings, iterations, data, device)
    saved = None
    if saving and saving.resume:
        if saving.path.exists():
            saved = resume.load(saving.path, run_facts())
            watcher.note(f"going on from iteration {saved.progress.iteration}")
        else:
            watcher.note(f"there is no unfinished run in {saving.path}: this one starts from the beginning")
    if compiled is None and device.type == "cpu" and iterations < COMPILE_FROM_ITERATIONS:
        watcher.note(f"training eagerly: {iterations} iterations are too few to earn the compilation back")
        compiled = False
    with _fastest_convolutions():
        prepared = prepare(settings, data, device=device, compiled=compiled, note=watcher.note, group=group)
        progress = Progress()
        if saved:
            saved.restore(prepared.step)
            progress = saved.progress
            for name, now in resume.circumstances(prepared.execution).items():
                if saved.circumstances[name] != now:
                    watcher.note(f"the last bits may differ: {name} was {saved.circumstances[name]} and is {now} now")
        saver = None
        if saving:
            last = progress.iteration if saved else None
            saver = resume.Saver(saving, run_facts, prepared.execution, watcher.note, last)
        return run(prepared, watcher, saver, progress)


def prepare(
    settings: Settings,
    data: mnist.Mnist,
    *,
    device: torch.device = CPU,
    compiled: bool | None = None,
    note: Callable[[str], None] = SILENT.note,
    group: Group = ALONE,
) -> Prepared:
    """Network, optimizer, data on the device, and step and evaluation compiled or captured (see `train`)."""
    training, held_out = _split(Images.on(device, data.train_images, data.train_labels), settings.validation)
    test = Images.on(device, data.test_images, data.test_labels)
    evaluation = held_out if settings.validation else test
    iterations = settings.steps(len(training))
    step = Step(settings, training, iterations, group)
    advance: Callable[[], torch.Tensor] = step
    count: Callable[[], torch.Tensor] = partial(step.correct, evaluation)
    execution = "eager"

    began = time.perf_counter()
    if compiled is not False and device.type == "cuda":
        if group.size == 1:
            advance, count = _captured(step, count)
            execution = "captured"
    elif compiled is not False:
        note("compiling the training step and the evaluation: up to a minute, seconds when done before")
        try:
            compile_step(step, evaluation)
            execution = "compiled"
        # Whatever a missing or unfit C++ compiler makes torch raise; if more is wrong, eager training tells.
        except Exception as error:
            if compiled:
                raise
            note(f"training eagerly, which is slower: it could not be compiled ({_first_line(error)})")
    return Prepared(
        settings=settings,
        iterations=iterations,
        training=training,
        evaluation=evaluation,
        test=test,
        step=step,
        advance=advance,
        count=count,
        execution=execution,
        compile_seconds=time.perf_counter() - began if compiled is not False else 0.0,
    )


def _captured(
    step: Step, count: Callable[[], torch.Tensor]
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Step and evaluation as recorded graphs. There is no eager training after a recording that failed: torch's random
    generator stays in the middle of it (seen with torch 2.11). Raises UserError (exit 3).
    """
    from trainer.capture import capture

    try:
        return capture(step, step), capture(count, step)
    except RuntimeError as error:
        raise UserError(
            f"the training step could not be recorded as a CUDA graph: {_first_line(error)}. Look whether another "
            "process holds the GPU's memory and whether the driver fits this torch, or train with --device cpu.",
            EXIT_UNAVAILABLE,
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def run(
    prepared: Prepared,
    watcher: Watcher = SILENT,
    saver: resume.Saver | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Go on from where the step is (`progress`; from the beginning by default) to the end; see `train`."""
    step, patience = prepared.step, prepared.settings.early_stop
    progress = progress or Progress()
    began = time.perf_counter() - progress.seconds

    def save() -> None:
        if saver:
            progress.seconds = time.perf_counter() - began
            _refuse_what_is_no_number(step, progress, saver)
            saver.save(step, progress)

    step.model.train()
    with _deferred_signals() as arrived:
        batches = _batches(prepared, progress.iteration)
        for iteration in range(progress.iteration + 1, prepared.iterations + 1):
            step.batch.copy_(next(batches))
            step.knobs.copy_(step.table[iteration - 1])
            loss = prepared.advance()
            progress.iteration = iteration

            evaluation = None
            if _is_due(prepared, iteration):
                evaluation = _evaluate(prepared, progress, loss, began, saver)
            watcher.stepped(iteration, evaluation)
            if evaluation and patience and progress.without_a_new_best() >= patience:
                watcher.note(f"stopped early: {patience} evaluations in succession without a new best")
                break
            if saver and saver.due():
                save()
            if step.group.agree(bool(arrived), iteration):
                save()
                raise Interrupted(iteration, saver.last if saver else None, signal.SIGINT not in arrived)
    return _outcome(prepared, progress, time.perf_counter() - began)


def _split(images: Images, held_out: int) -> tuple[Images, Images]:
    """What is trained on, and what is held out."""
    if not held_out:
        return images, images[:0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order.to(images.labels.device)
    return images[order[:-held_out]], images[order[-held_out:]]


def _batches(prepared: Prepared, done: int) -> Iterator[torch.Tensor]:
    """The indices of each batch after the first `done`, without end: every epoch a fresh permutation, full batches."""
    size, images = prepared.settings.recipe.batch_size, len(prepared.training)
    per_epoch = images // size
    order = torch.Generator().manual_seed(prepared.settings.seed)  # on the CPU: the same on every device
    for epoch in itertools.count():
        shuffled = torch.randperm(images, generator=order)
        seen = done - epoch * per_epoch
        if seen < per_epoch:
            batches = torch.split(shuffled.to(prepared.step.device), size)
            for batch in batches[max(seen, 0) : per_epoch]:
                yield prepared.step.group.part(batch)


def _is_due(prepared: Prepared, iteration: int) -> bool:
    every = prepared.settings.recipe.evaluate_every
    return iteration == prepared.iterations or (every is not None and iteration % every == 0)


def _evaluate(
    prepared: Prepared, progress: Progress, loss: torch.Tensor, began: float, saver: resume.Saver | None
) -> Evaluation:
    """Evaluate, and add it to the history. Reading the loss waits for all steps so far."""
    last_loss = float(loss)
    if not math.isfinite(last_loss):
        raise _diverged(progress, saver)
    before = time.perf_counter()
    top1 = _top1(prepared)
    now = time.perf_counter()
    progress.evaluation_seconds += now - before
    evaluation = Evaluation(progress.iteration, last_loss, top1, now - began)
    progress.history.append(evaluation)
    if prepared.settings.early_stop and progress.best_evaluation() is evaluation:
        progress.best = prepared.step.weights()
    return evaluation


def _top1(prepared: Prepared) -> float:
    group = prepared.step.group
    return group.of_first(lambda: 100 * int(prepared.count()) / len(prepared.evaluation))


def _outcome(prepared: Prepared, progress: Progress, seconds: float) -> Trained:
    step = prepared.step
    weights = progress.best or step.weights()
    test_top1 = progress.history[-1].top1
    if prepared.settings.validation:
        (step.averaged or step.model).load_state_dict(weights)
        test_top1 = step.group.of_first(lambda: 100 * int(step.correct(prepared.test)) / len(prepared.test))
    return Trained(
        weights=weights,
        history=tuple(progress.history),
        steps=progress.best_evaluation().iteration if progress.best else progress.iteration,
        test_top1=test_top1,
        execution=prepared.execution,
        compile_seconds=prepared.compile_seconds,
        seconds=seconds,
        evaluation_seconds=progress.evaluation_seconds,
    )


def _refuse_what_is_no_number(step: Step, progress: Progress, saver: resume.Saver) -> None:
    """A run that is lost must not take the place of the last good save."""
    finite = [tensor.isfinite().all() for tensor in step.tensors().values()]
    if not torch.stack(finite).all():
        raise _diverged(progress, saver)


def _diverged(progress: Progress, saver: resume.Saver | None) -> UserError:
    good = progress.history[-1].iteration if progress.history else 0
    kept = "nothing was saved before"
    if saver and saver.last is not None:
        kept = f"the last good save, of iteration {saver.last}, is in {saver.path}"
    return UserError(
        f"the training came to numbers that are none (NaN or infinite), after iteration {good} and not later than "
        f"iteration {progress.iteration}: it was stopped, and {kept}. The same command would come to the same; "
        "another seed, --precision float32 or a recipe with a lower learning rate may not.",
        EXIT_NEGATIVE,
    )


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM within the block are only noted, in the list: what reads it is between two whole steps."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived  # signals act in the main thread only
        return

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Let cuDNN try its kernels on the shapes of this run; a library's user may not want that elsewhere."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before

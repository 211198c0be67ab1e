"""The training loop.

Owns one training run, from a seed to weights and a history: where the data lies, in which order it is seen, one step,
one evaluation, and whether they are compiled. Knows nothing of files, terminals or figures: what it learns on the way
goes to a callback, what comes out is a value.

What makes it faster than a loop over a DataLoader, each measured in one run, interleaved, on two cores: the whole data
set lies on the device as normalised tensors, so that a batch is one gather; step and evaluation are compiled; memory is
channels_last, which the CPU's convolutions take as it is; an evaluation takes EVALUATION_BATCH images at once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from trainer import mnist
from trainer.errors import Terminated, UserError
from trainer.model import Net
from trainer.recipes import Recipe

PRECISIONS = ("float32", "bf16")

EVALUATION_BATCH = 500

COMPILE_FROM_ITERATIONS = 1_000
"""A shorter run trains eagerly: compiling takes 30-60 s on two cores where nothing is cached, and an iteration with its
share of the evaluations saves about 40 ms. A fixed number, not a guess at run time: the same command must give the same
bits."""

EXIT_UNAVAILABLE = 3


@dataclass(frozen=True)
class Evaluation:
    """One line of the history: after `iteration` steps, the last batch's loss and the accuracy on all test images.

    `loss` is the mean cross-entropy of that batch, in training mode; `test_top1` is in percent; `seconds` since the
    first iteration, compilation not included.
    """

    iteration: int
    loss: float
    test_top1: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """What a run came to: the weights after `steps` steps, by `state_dict` key, and every evaluation on the way."""

    weights: dict[str, torch.Tensor]
    history: tuple[Evaluation, ...]
    steps: int
    compile_seconds: float
    seconds: float


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run; `partial` is what it had come to, `terminated` tells which of the two it was."""

    def __init__(self, partial: Trained, terminated: bool) -> None:
        super().__init__(f"interrupted after {partial.steps} iterations")
        self.partial = partial
        self.terminated = terminated


@dataclass(frozen=True)
class Watcher:
    """Who is told of a run: `note` gets a sentence, `stepped` the iterations done and the evaluation, if there was one."""

    note: Callable[[str], None] = field(default=lambda sentence: None)
    stepped: Callable[[int, Evaluation | None], None] = field(default=lambda iteration, evaluation: None)


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
    recipe: Recipe,
    data: mnist.Mnist,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    iterations: int | None = None,
    precision: str = "float32",
    compiled: bool | None = None,
    watcher: Watcher | None = None,
) -> Trained:
    """Train a fresh network by `recipe`, `iterations` steps (the recipe's own number by default).

    The same arguments on the same machine give the same bits on the CPU. `precision` is float32 (strictly: no TF32) or
    bf16 (see `_forward`); weights and optimizer are float32 in both. `compiled` None means: compile where that pays
    (COMPILE_FROM_ITERATIONS), and train eagerly where it fails; True and False insist.

    Raises Interrupted on Ctrl-C and SIGTERM.
    """
    device = device or torch.device("cpu")
    iterations = recipe.iterations if iterations is None else iterations
    watcher = watcher or Watcher()
    # TF32 is a choice of the library, not of the recipe. By the newer of torch's two settings: mixing them raises.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"

    torch.manual_seed(seed)  # the initial weights, then dropout
    order = torch.Generator().manual_seed(seed)  # of the images; on the CPU, so that it is the same on every device
    model = Net().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    train_images, train_labels = _on_device(data.train_images, data.train_labels, device)
    test_images, test_labels = _on_device(data.test_images, data.test_labels, device)
    loss_of, correct_of = _functions(model, device, precision)

    compile_seconds = 0.0
    if compiled is None and iterations < COMPILE_FROM_ITERATIONS:
        watcher.note(f"training eagerly: {iterations} iterations are too few to earn the compilation back")
    elif compiled is not False:
        watcher.note("compiling the training step and the evaluation (a minute at most; a few seconds when cached)")
        began = time.perf_counter()
        try:
            loss_of, correct_of = _compile(
                model, loss_of, correct_of, recipe.batch_size, train_images, train_labels, test_images, test_labels
            )
        # Whatever a missing or unfit C++ compiler makes the compiler stack raise; eager training says what else is wrong.
        except Exception as error:
            if compiled:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            watcher.note(f"training eagerly, about three times slower: compiling failed ({type(error).__name__}: {reason})")
        compile_seconds = time.perf_counter() - began

    history: list[Evaluation] = []
    iteration = 0
    began = time.perf_counter()
    try:
        model.train()
        while iteration < iterations:
            shuffled = torch.randperm(len(train_labels), generator=order).to(device)
            for chosen in shuffled.split(recipe.batch_size)[: iterations - iteration]:
                loss = loss_of(train_images[chosen], train_labels[chosen])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                iteration += 1

                evaluation = None
                if iteration % recipe.evaluate_every == 0 or iteration == iterations:
                    top1 = evaluate(model, correct_of, test_images, test_labels)
                    evaluation = Evaluation(iteration, loss.item(), top1, time.perf_counter() - began)
                    history.append(evaluation)
                watcher.stepped(iteration, evaluation)
    except (KeyboardInterrupt, Terminated) as interrupt:
        partial = Trained(model.state_dict(), tuple(history), iteration, compile_seconds, time.perf_counter() - began)
        raise Interrupted(partial, isinstance(interrupt, Terminated)) from interrupt
    return Trained(model.state_dict(), tuple(history), iteration, compile_seconds, time.perf_counter() - began)


LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images and labels of a batch to its mean cross-entropy, a float32 scalar with a gradient."""
CorrectOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images and labels to how many are classified right, an integer scalar."""


def evaluate(model: Net, correct_of: CorrectOf, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent, in evaluation mode and without gradients; the model is back in training mode afterwards."""
    model.eval()
    with torch.no_grad():
        batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        correct = sum(correct_of(some_images, some_labels) for some_images, some_labels in batches)
    model.train()
    return 100 * int(correct) / len(labels)


def _on_device(images: Any, labels: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw images and labels as a normalised float32 [n, 1, 28, 28] and an int64 [n] tensor on the device."""
    return torch.from_numpy(mnist.normalise(images)).unsqueeze(1).to(device), torch.from_numpy(labels).to(device)


def _functions(model: Net, device: torch.device, precision: str) -> tuple[LossOf, CorrectOf]:
    bf16 = precision == "bf16"

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits: torch.Tensor = model(images)
        return logits.float()

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(images), labels)

    def correct_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits_of(images).argmax(1) == labels).sum()

    return loss_of, correct_of


def _compile(
    model: Net,
    loss_of: LossOf,
    correct_of: CorrectOf,
    batch_size: int,
    train_images: torch.Tensor,
    train_labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
) -> tuple[LossOf, CorrectOf]:
    """Both functions compiled, now rather than at their first call, and the model as it was before.

    Compiling happens when a function first runs (its backward at the first backward), so they run once, on real shapes;
    what that leaves behind is taken back: BatchNorm's statistics, gradients and the random streams.
    """
    fast_loss_of: LossOf = torch.compile(loss_of, dynamic=False)
    fast_correct_of: CorrectOf = torch.compile(correct_of, dynamic=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.random.fork_rng():
            model.train()
            fast_loss_of(train_images[:batch_size].clone(), train_labels[:batch_size].clone()).backward()
            evaluate(model, fast_correct_of, test_images[:EVALUATION_BATCH], test_labels[:EVALUATION_BATCH])
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)
        model.train()
    return fast_loss_of, fast_correct_of

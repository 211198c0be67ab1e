"""The training loop.

Owns one training run, from a seed to weights and a history: where the data lies, in which order it is seen, one step,
one evaluation, and whether they are compiled. Knows nothing of files, terminals or figures: what it learns on the way
goes to a callback, what comes out is a value.

What makes it faster than a loop over a DataLoader: the whole data set lies on the device as normalised tensors, so that
a batch is one gather; step and evaluation are compiled; memory is channels_last; an evaluation takes EVALUATION_BATCH
images at once. The times in this file are of two cores of a Xeon at 2.5 GHz (AVX-512, no bf16 instructions), torch
2.14.1, variants taking turns in one process, the least of the rounds because the machine was shared.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer import mnist
from trainer.errors import Terminated, UserError
from trainer.model import Net
from trainer.recipes import Recipe

PRECISIONS = ("float32", "bf16")

EVALUATION_BATCH = 500
"""All test images take 1.07 s in batches of 50, 0.84 s in 100, 0.75 s in 250, 0.69 s in 500, more again in 2,000."""

COMPILE_FROM_ITERATIONS = 2_000
"""A shorter run trains eagerly. Compiling takes 8 s where it was done before and 15 to 60 s where not; it saved 4 ms a
step and 0.4 s an evaluation, 12 ms an iteration in all. A fixed number, not a guess at run time: the same command must
give the same bits."""

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
    """Who is told of a run: `note` gets a sentence, `stepped` the iterations done and the evaluation, if any."""

    note: Callable[[str], None] = field(default=lambda sentence: None)
    stepped: Callable[[int, Evaluation | None], None] = field(default=lambda iteration, evaluation: None)


SILENT = Watcher()
CPU = torch.device("cpu")


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


LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images and labels of a batch to its mean cross-entropy, a float32 scalar with a gradient."""
CorrectOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images and labels to how many are classified right, an integer scalar."""


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before its first step. Images are float32 [n, 1, 28, 28] in [-1, 1], labels int64 [n]."""

    recipe: Recipe
    model: Net
    optimizer: torch.optim.Adam
    loss_of: LossOf
    correct_of: CorrectOf
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    order: torch.Generator
    compile_seconds: float


def train(
    recipe: Recipe,
    data: mnist.Mnist,
    *,
    seed: int = 0,
    device: torch.device = CPU,
    iterations: int | None = None,
    precision: str = "float32",
    compiled: bool | None = None,
    watcher: Watcher = SILENT,
) -> Trained:
    """Train a fresh network by `recipe`, `iterations` steps (the recipe's own number by default).

    The same arguments on the same machine give the same bits on the CPU. `precision` is float32 (strictly: no TF32) or
    bf16: what convolutions and linear layers multiply in; weights and optimizer are float32 in both. `compiled` None
    means: compile where that pays (COMPILE_FROM_ITERATIONS), and train eagerly where it fails; True and False insist.

    Raises Interrupted on Ctrl-C and SIGTERM once the first step may have begun.
    """
    iterations = recipe.iterations if iterations is None else iterations
    if compiled is None and iterations < COMPILE_FROM_ITERATIONS:
        watcher.note(f"training eagerly: {iterations} iterations are too few to earn the compilation back")
        compiled = False
    prepared = prepare(
        recipe, data, seed=seed, device=device, precision=precision, compiled=compiled, note=watcher.note
    )
    return run(prepared, iterations, watcher.stepped)


def prepare(
    recipe: Recipe,
    data: mnist.Mnist,
    *,
    seed: int = 0,
    device: torch.device = CPU,
    precision: str = "float32",
    compiled: bool | None = None,
    note: Callable[[str], None] = SILENT.note,
) -> Prepared:
    """Network, optimizer, data on the device, and step and evaluation compiled (see `train`; None: if possible)."""
    # TF32 is a choice of the library, not of the recipe. By the older of torch's two settings, as everywhere here:
    # after the newer one (`fp32_precision`) torch.export raises in the same process.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    torch.manual_seed(seed)  # the initial weights, then dropout
    # channels_last is what the CPU's convolutions take as it is: a compiled step takes 34 ms, an evaluation 0.65 s,
    # against 40 ms and 1.11 s where the compiler rearranges contiguous weights, and 43 ms and 0.85 s where it may not.
    model = Net().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    train_images, train_labels = _on_device(data.train_images, data.train_labels, device)
    test_images, test_labels = _on_device(data.test_images, data.test_labels, device)
    loss_of, correct_of = _functions(model, device, precision)

    began = time.perf_counter()
    if compiled is not False:
        note("compiling the training step and the evaluation: up to a minute, seconds when done before")
        try:
            first = torch.arange(recipe.batch_size, device=device)
            batch = train_images[first], train_labels[first]
            loss_of, correct_of = _compile(model, loss_of, correct_of, batch, (test_images, test_labels))
        # Whatever a missing or unfit C++ compiler makes torch raise; if more is wrong, eager training tells.
        except Exception as error:
            if compiled:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            note(f"training eagerly, which is slower: compiling failed ({reason})")
    return Prepared(
        recipe=recipe,
        model=model,
        optimizer=optimizer,
        loss_of=loss_of,
        correct_of=correct_of,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        order=torch.Generator().manual_seed(seed),  # on the CPU, so that it is the same on every device
        compile_seconds=time.perf_counter() - began if compiled is not False else 0.0,
    )


def run(
    prepared: Prepared, iterations: int, stepped: Callable[[int, Evaluation | None], None] = SILENT.stepped
) -> Trained:
    """Go `iterations` steps on from where the network is; `stepped` is told of each. Raises Interrupted."""
    recipe, model, optimizer = prepared.recipe, prepared.model, prepared.optimizer
    history: list[Evaluation] = []
    iteration = 0
    began = time.perf_counter()

    def so_far() -> Trained:
        seconds = time.perf_counter() - began
        return Trained(model.state_dict(), tuple(history), iteration, prepared.compile_seconds, seconds)

    try:
        model.train()
        while iteration < iterations:
            shuffled = torch.randperm(len(prepared.train_labels), generator=prepared.order)
            for chosen in shuffled.to(prepared.train_labels.device).split(recipe.batch_size):  # type: ignore[no-untyped-call]
                with _uninterrupted():  # what an interrupted run hands over has gone through whole steps
                    loss = prepared.loss_of(prepared.train_images[chosen], prepared.train_labels[chosen])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    iteration += 1

                evaluation = None
                if iteration % recipe.evaluate_every == 0 or iteration == iterations:
                    top1 = evaluate(model, prepared.correct_of, prepared.test_images, prepared.test_labels)
                    evaluation = Evaluation(iteration, loss.item(), top1, time.perf_counter() - began)
                    history.append(evaluation)
                stepped(iteration, evaluation)
                if iteration == iterations:
                    break
    except (KeyboardInterrupt, Terminated) as interrupt:
        raise Interrupted(so_far(), isinstance(interrupt, Terminated)) from interrupt
    return so_far()


def evaluate(model: Net, correct_of: CorrectOf, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent, in evaluation mode and without gradients; the model is back in training mode afterwards."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    with torch.no_grad():
        for start in range(0, len(labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            correct += correct_of(images[part], labels[part])
    model.train()
    return 100 * int(correct.item()) / len(labels)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM that arrive inside the block act when it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals act in the main thread only
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: arrived.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for waiting in arrived:
        signal.raise_signal(waiting)


def _on_device(images: Any, labels: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw images and labels as a normalised float32 [n, 1, 28, 28] and an int64 [n] tensor on the device."""
    return torch.from_numpy(mnist.normalise(images)).unsqueeze(1).to(device), torch.from_numpy(labels).to(device)


def _functions(model: Net, device: torch.device, precision: str) -> tuple[LossOf, CorrectOf]:
    """What a step and an evaluation compute, in the precision asked for."""
    autocast = precision == "bf16" and _has_bf16_arithmetic(device)
    rounding = precision == "bf16" and not autocast
    if rounding:
        _round_to_bf16(model)

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits: torch.Tensor = model(_rounded_to_bf16(images) if rounding else images)
        return logits.float()

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(images), labels)

    def correct_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits_of(images).argmax(1) == labels).sum()

    return loss_of, correct_of


def _has_bf16_arithmetic(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def _rounded_to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest bf16, as float32: Veltkamp's splitting, which keeps the upper 8 of 24 significant bits.

    Three operations that the compiler vectorises: working on the bits instead took an evaluation from 0.7 s to 1.4 s,
    and it is free to drop the pair `.bfloat16().float()`. From 2**111 on, and for infinity, the result is not a number.
    """
    scaled = tensor * 65537.0
    return scaled - (scaled - tensor)


class _Round(torch.autograd.Function):
    """A float32 tensor rounded to bf16; gradients pass as they are."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _rounded_to_bf16(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _RoundBothWays(torch.autograd.Function):
    """A float32 tensor rounded to bf16, and its gradient too."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _rounded_to_bf16(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _rounded_to_bf16(gradient)


def _round_to_bf16(model: nn.Module) -> None:
    """Make the model compute as bf16 hardware does: what is multiplied is in bf16, what is summed up is in float32.

    For a CPU without bf16 instructions: there torch emulates them in every kernel, and a compiled step in autocast's
    bf16 takes 73 ms where float32 takes 42, an evaluation 2.2 s against 0.9 s. Here float32 kernels run on rounded
    numbers: the weights of convolutions and linear layers, their results (hence what goes through ReLU, pooling and
    dropout into the next layer) with the gradients that come back to them, and BatchNorm's results. The model's input
    has to be rounded as well. The weights that are trained, and their names, stay what they are.

    Results are rounded before the ReLU, not after it, though that is the same number: what ReLU's gradient needs is
    then the very tensor that the next layer keeps anyway. Otherwise the compiler keeps a mask, in a kernel that it
    can't vectorise: 4.7 ms of a step's 36.
    """

    def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return _round_both_ways(F.linear(x, _round(layer.weight), layer.bias))

    def convolution(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return _round_both_ways(F.conv2d(x, _round(layer.weight), layer.bias, layer.stride, layer.padding))

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = functools.partial(linear, layer)  # type: ignore[method-assign]
        elif isinstance(layer, nn.Conv2d):
            layer.forward = functools.partial(convolution, layer)  # type: ignore[method-assign]
        elif isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, inputs, result: _round(result))


def _round(tensor: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _Round.apply(tensor)
    return rounded


def _round_both_ways(tensor: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _RoundBothWays.apply(tensor)
    return rounded


def _compile(
    model: Net,
    loss_of: LossOf,
    correct_of: CorrectOf,
    batch: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
) -> tuple[LossOf, CorrectOf]:
    """Both functions compiled, now rather than at their first call, and the model as it was before.

    A function is compiled when it first runs (its backward at the first backward), so both run once, on the shapes that
    they will get; what that leaves behind is taken back: BatchNorm's statistics, gradients and the random streams.
    """
    # Without the option cpp_wrapper: it gained nothing (38 ms a step against 35) and took longer to compile.
    fast_loss_of: LossOf = torch.compile(loss_of, dynamic=False)
    fast_correct_of: CorrectOf = torch.compile(correct_of, dynamic=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cuda_devices = [batch[0].device] if batch[0].is_cuda else []
    log = logging.getLogger("torch.utils.cpp_extension")  # it warns of CUDA's absence where nobody asked for CUDA
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(cuda_devices):
            model.train()
            fast_loss_of(*batch).backward()  # type: ignore[no-untyped-call]
            evaluate(model, fast_correct_of, test[0][:EVALUATION_BATCH], test[1][:EVALUATION_BATCH])
    finally:
        log.setLevel(level)
        model.load_state_dict(before)
        model.zero_grad()
        model.train()
    return fast_loss_of, fast_correct_of

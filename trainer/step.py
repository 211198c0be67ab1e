"""One training step and one evaluation, computed from nothing but tensors on the device.

Owns what a run changes (weights, their average, the optimizer's state) and the one function that changes it. Knows
neither the order of the images nor when to evaluate. All that differs from step to step is written into two tensors
beforehand, `batch` and `knobs`: so the same step runs eagerly, around compiled functions, or as a captured CUDA graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer import mnist
from trainer.augment import Augment
from trainer.distributed import ALONE, Group
from trainer.model import Net
from trainer.precision import forbid_tf32, logits_in
from trainer.recipes import Settings

EVALUATION_BATCH = 500
"""On the CPU all test images take 1.07 s in batches of 50, 0.84 s in 100, 0.75 s in 250, 0.69 s in 500, more again in
2,000 (two cores of a Xeon at 2.5 GHz, torch 2.14.1). A GPU takes them all at once."""

LossOf = Callable[[torch.Tensor], torch.Tensor]
"""The indices of a batch's images to its mean cross-entropy, a float32 scalar with a gradient."""
CorrectOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Raw images and labels to how many are classified right, an integer scalar."""


@dataclass(frozen=True)
class Images:
    """Raw images on the device, `pixels` uint8 [n, 1, 28, 28] and `labels` int64 [n]."""

    pixels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Images:
        """Arrays as `trainer.mnist.Mnist` has them, brought to the device."""
        return cls(torch.from_numpy(pixels).unsqueeze(1).to(device), torch.from_numpy(labels).to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: torch.Tensor | slice) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])


class Step:
    """One step of a run, and the tensors that it works on. Calling it returns the batch's loss.

    Before each call `batch` has to hold the indices of the training images (int64), and `knobs` the step's row of
    `table`: the learning rate, and what the new weights count in their average.
    """

    def __init__(self, settings: Settings, training: Images, iterations: int, group: Group = ALONE) -> None:
        forbid_tf32()
        recipe, device = settings.recipe, training.pixels.device
        self.device, self.group = device, group
        group.check(recipe.batch_size)

        torch.manual_seed(settings.seed)  # the initial weights, then dropout and augmentation
        # channels_last is what the CPU's convolutions take as it is: a compiled step takes 34 ms, an evaluation 0.65 s,
        # against 40 ms and 1.11 s where the compiler rearranges contiguous weights, 43 ms and 0.85 s where it may not.
        self.model = Net(recipe.dropout).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = None if recipe.averaging is None else copy.deepcopy(self.model).requires_grad_(False).eval()
        group.adopt(self.model, settings.seed)

        # A tensor, so that a captured step can be told; of the precision that torch's fused Adam reads on the device.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        rows = [recipe.learning_rates(iterations), recipe.averaging_weights(iterations)]
        self.table = torch.tensor(rows, dtype=dtype).T.contiguous().to(device)
        self.knobs = torch.zeros(2, dtype=dtype, device=device)
        self.batch = torch.arange(recipe.batch_size // group.size, device=device)

        adam = torch.optim.AdamW if recipe.decoupled else torch.optim.Adam
        self.optimizer = adam(
            self.model.parameters(),
            lr=self.knobs[0],
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        for parameter in self.model.parameters():  # from the start, so that a save or a capture finds them
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._averages = _floating(self.averaged) if self.averaged else []
        self._values = _floating(self.model)
        self.loss_of, self.correct_of = self._functions(settings, training)

    def __call__(self) -> torch.Tensor:
        loss = self.loss_of(self.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.group.average_gradients(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._averages:
            difference = torch._foreach_sub(self._values, self._averages)
            torch._foreach_mul_(difference, self.knobs[1])
            torch._foreach_add_(self._averages, difference)
        return loss.detach()

    def correct(self, images: Images) -> torch.Tensor:
        """How many of the images the network, or its average, classifies right; the model stays in training mode."""
        (self.averaged or self.model).eval()
        size = EVALUATION_BATCH if self.device.type == "cpu" else len(images)
        with torch.no_grad():
            parts = zip(torch.split(images.pixels, size), torch.split(images.labels, size), strict=True)
            correct = torch.stack([self.correct_of(pixels, labels) for pixels, labels in parts]).sum()
        self.model.train()
        return correct

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that are evaluated and saved, by `state_dict` key."""
        found = self.model.state_dict()
        if self.averaged:  # how many batches BatchNorm has seen is no average
            found |= {name: mean for name, mean in self.averaged.state_dict().items() if mean.is_floating_point()}
        return {name: tensor.clone() for name, tensor in found.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that steps change, by name: not copies, so writing into them sets the step back."""
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.averaged:
            found |= {f"average/{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"adam/{name}/{key}": tensor for key, tensor in self.optimizer.state[parameter].items()}
        return found

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write values of all `tensors()` into them."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever the block does to the tensors and the random streams is taken back."""
        before = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                yield
            finally:
                self.restore(before)
                self.optimizer.zero_grad()
                self.model.train()

    def _functions(self, settings: Settings, training: Images) -> tuple[LossOf, CorrectOf]:
        """What a step and an evaluation compute, from raw pixels and in the precision asked for."""
        recipe = settings.recipe
        augment = Augment(recipe.augmentation, self.device) if recipe.augmentation else None
        logits_of = logits_in(settings.precision, self.model, self.device)
        evaluated = logits_in(settings.precision, self.averaged, self.device) if self.averaged else logits_of

        def loss_of(chosen: torch.Tensor) -> torch.Tensor:
            images = training.pixels[chosen].float() * SCALE
            if augment:
                images = augment(images)
            labels = training.labels[chosen]
            return F.cross_entropy(logits_of(_centred(images)), labels, label_smoothing=recipe.label_smoothing)

        def correct_of(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (evaluated(_centred(pixels.float() * SCALE)).argmax(1) == labels).sum()

        return loss_of, correct_of


# `trainer.mnist.normalise`, in torch: the same operations on the same float32 constants, so the same bits.
SCALE, MEAN, STD = float(mnist.SCALE), float(mnist.MEAN), float(mnist.STD)


def _centred(images: torch.Tensor) -> torch.Tensor:
    return (images - MEAN) / STD


def _floating(model: Net) -> list[torch.Tensor]:
    """Weights and running statistics, the very tensors."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]

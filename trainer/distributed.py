"""Several processes that train one network, as torchrun starts them.

Owns the group of processes and what they tell each other. Knows neither recipes nor files. Each process takes its part
of the same global batch, and the mean of all gradients is what each applies: weights stay the same in all of them, as
with DistributedDataParallel. That is done without here, so that a step stays one function to compile or to capture.

What differs from one process on the same batch: each draws dropout and augmentation from a random stream of its own,
and on the CPU BatchNorm normalises each part by its own mean and variance (torch has SyncBatchNorm for CUDA only, used
there); the running statistics that are evaluated and saved are those of process 0. Nothing is saved on the way, so
there is nothing to go on from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import nn

from trainer.errors import EXIT_USAGE, UserError

AGREE_EVERY = 20
"""Steps from one time that the processes ask each other whether to stop to the next: they must stop at the same one."""


@dataclass(frozen=True)
class Group:
    """The processes that train together, and which of them this one is."""

    rank: int = 0
    size: int = 1

    def check(self, batch_size: int) -> None:
        """UserError (exit 2) where a batch can't be split into equal parts."""
        if batch_size % self.size:
            raise UserError(
                f"a batch of {batch_size} images can't be split evenly over {self.size} processes. Start torchrun with "
                "a number of processes that divides it.",
                EXIT_USAGE,
            )

    def adopt(self, model: nn.Module, seed: int) -> None:
        """Make a model with the same weights everywhere one that is trained together."""
        if self.rank > 0:
            torch.manual_seed(seed + self.rank)
        if self.size > 1 and next(model.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # its layers, in place

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch that all know."""
        return batch if self.size == 1 else batch.chunk(self.size)[self.rank]

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def agree(self, wish: bool, iteration: int) -> bool:
        """Whether any of the processes wishes it; asked every so many steps, and False in between."""
        if self.size == 1:
            return wish
        if iteration % AGREE_EVERY:
            return False
        wishes = torch.tensor(float(wish))
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
        return bool(wishes)

    def of_first(self, number: Callable[[], float]) -> float:
        """The number that process 0 computes, while the others wait."""
        if self.size == 1:
            return number()
        shared = torch.tensor(number() if self.rank == 0 else 0.0, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return float(shared)


ALONE = Group()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's environment variables describe; ALONE where there are none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside nccl: what the processes agree on lies in the host's memory.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(int(os.environ["RANK"]), size)
    finally:
        torch.distributed.destroy_process_group()

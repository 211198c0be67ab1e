"""How much a bundle is held to, fitted to what the model costs.

Owns the budgets of time, memory and disk, and what of a bundle's inputs, batch sizes and files fits into them. Knows
neither files nor runtimes. Importing this imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.bundle import Arrays, Proof

Files = Literal["lean", "full"]
"""lean: what is deployed, and the reference. full: also the controls, the folded pt2 and the weights as trained."""

LARGE_BYTES = 50_000_000
"""Weights from which on a bundle is lean by default: the four further files of resnet50 are 409 MB."""
INPUTS_S, COMPARED_S, CHECKED_S = 60.0, 8.0, 6.0
"""Seconds for the oracle and the reference's float32, for comparing one folded network in float64, and for each file.
resnet50 is held to 100 or 200 inputs (0.3 to 0.6 s each in both precisions, two cores), and exported in under two
minutes. With twice the budget a machine that others slowed down after the clock was read took six."""
MOST_COMPARED, MOST_CHECKED, LEAST_INPUTS = 100, 2_500, 10
"""float32 files are checked on so many of the oracle's inputs. The reference runs all of them, since its error is the
unit, and so do files of other precisions, whose predictions are counted."""
CHECK_BATCHES, FEW_CHECK_BATCHES = (500, 7), (15, 3)
"""Two batch sizes, for what is written for one batch size alone; the odd one is run on a few inputs. The second pair is
where inputs are few."""
CHUNK = 50
"""Inputs at a time in float64: 1,000 took 0.52 s in chunks of 50, 0.70 s of 250, 0.85 s at once (two cores)."""
ACTIVATIONS_BYTES, ALIVE = 160_000_000, 4
"""What the activations of a batch may take, and how many of the largest are in memory at once: resnet50 took 12 MB an
input in float32, where the largest is 3.2 MB, and 28 MB in float64."""
ORACLE_BYTES, ORACLE_SHARE = 256_000_000, 0.9
"""What a bundle's inputs may take: in a lean one, of what its weights take."""


@dataclass(frozen=True)
class Cost:
    """What one input costs: seconds in float32 and in float64, and the bytes of its largest activation in float32;
    and what the weights take.
    """

    seconds32: float
    seconds64: float
    activation_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Asked:
    """What a user says of the effort; None, or False, where it is fitted.

    Attributes:
        all_inputs: the bundle is held to all inputs that are given.
        batches: the two batch sizes at which files are checked.
        files: which of the float32 files are made.
    """

    all_inputs: bool = False
    batches: tuple[int, int] | None = None
    files: Files | None = None


@dataclass(frozen=True)
class Effort:
    """What is done for a bundle.

    Attributes:
        inputs: to so many it is held: the oracle has them, and the reference runs all.
        checked: on so many of them every other float32 file is run.
        compared: on so many the folded network is compared with the unfolded one in float64, real and random ones.
        batches: at which sizes files are run; the second is None where they take one size alone.
        chunk: inputs at a time in float64.
        files: which of the float32 files are made.
    """

    inputs: int
    checked: int
    compared: int
    batches: tuple[int, int | None]
    chunk: int
    files: Files

    def proof(self, given: int) -> Proof:
        """For the manifest, where so many inputs were given."""
        from export.bundle import Proof  # here: every --help reads this module

        return Proof(
            given=given,
            inputs=self.inputs,
            checked=self.checked,
            compared=self.compared,
            batch_sizes=tuple(size for size in self.batches if size is not None),
        )


def usual(inputs: int, batch: int | None = None) -> Effort:
    """What is done where nothing need be spared, for so many inputs; `batch` is the only size that files take."""
    batches: tuple[int, int | None] = CHECK_BATCHES if batch is None else (batch, None)
    checked = max(1, MOST_CHECKED // batches[0]) * batches[0]
    return Effort(inputs, min(checked, inputs), min(MOST_COMPARED, inputs), batches, CHUNK, "full")


def fitted(cost: Cost, given: int, bytes_per_input: int, asked: Asked) -> Effort:
    """What fits into the budgets, for so many inputs of so many bytes each."""
    files = asked.files or ("lean" if cost.weight_bytes >= LARGE_BYTES else "full")
    disk = ORACLE_SHARE * cost.weight_bytes if files == "lean" else ORACLE_BYTES
    affordable = min(INPUTS_S / (cost.seconds32 + cost.seconds64), disk / bytes_per_input)
    inputs = given if asked.all_inputs else _at_most(given, affordable, LEAST_INPUTS)
    checked = _at_most(min(MOST_CHECKED, inputs), CHECKED_S / cost.seconds32, LEAST_INPUTS)
    # Real inputs, random ones and borders, through both networks.
    compared = _at_most(min(MOST_COMPARED, inputs), COMPARED_S / (6 * cost.seconds64), 2)
    in_memory = ACTIVATIONS_BYTES / (ALIVE * cost.activation_bytes)
    whole, odd = CHECK_BATCHES if checked == min(MOST_CHECKED, inputs) else FEW_CHECK_BATCHES
    whole = _at_most(whole, in_memory, 2)
    odd = odd if whole > odd else FEW_CHECK_BATCHES[1]
    return Effort(inputs, checked, compared, asked.batches or (whole, odd), _at_most(CHUNK, in_memory / 2, 1), files)


def _at_most(wanted: int, affordable: float, least: int) -> int:
    """As many as wanted, if that is affordable; else a round number, so that the clock's noise changes little."""
    if wanted <= affordable:
        return wanted
    steps = [int(step * 10**zeros) for zeros in range(10) for step in (1, 1.5, 2, 3, 5, 7)]
    return min(wanted, max(least, *(step for step in steps if step <= max(1.0, affordable))))


def measured(module: nn.Module, examples: Arrays) -> Cost:
    """What an input of `module`, float32 in eval mode, costs here: of two calls with `examples` [n, …] the faster one.

    Neither the module nor the random numbers of whoever calls are changed.
    """
    import copy

    import torch

    from export.oracle import in_float64

    given = tuple(map(torch.from_numpy, examples))
    tensors = [*module.parameters(), *module.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        largest = _largest_result(lambda: module(*given), tensors)
        seconds32 = _seconds(lambda: module(*given))
        model64 = copy.deepcopy(module).double()
        seconds64 = _seconds(lambda: model64(*map(in_float64, given)))
    count = len(examples[0])
    return Cost(seconds32 / count, seconds64 / count, max(1, largest // count), weight_bytes(module))


def weight_bytes(module: nn.Module) -> int:
    """What the parameters and buffers of a module take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _seconds(call: Callable[[], object]) -> float:
    """The faster of two calls."""

    def once() -> float:
        began = time.perf_counter()
        call()
        return max(time.perf_counter() - began, 1e-6)

    return min(once(), once())


def _largest_result(call: Callable[[], object], weights: list[torch.Tensor]) -> int:
    """The bytes of the largest tensor that an operation makes, views of the weights left out."""
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    largest = 0

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return result

    with Sizes():  # type: ignore[no-untyped-call]
        call()
    return largest

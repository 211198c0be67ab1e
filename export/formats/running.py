"""A file as a function.

Owns what every format's `runner` returns, and running it in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import Arrays, Output
from export.bundle.detections import joined
from export.bundle.rows import Rows

if TYPE_CHECKING:
    import torch

Run = Callable[..., Arrays]
"""One batch of each input, [n, …] → each output [n, …]."""


def run_in_batches(run: Run, inputs: tuple[Rows, ...], batch: int, specs: Sequence[Output] = ()) -> Arrays:
    """All of `inputs` through `run`, `batch` images at a time; the last batch may be smaller.

    `specs` are those of the outputs, where there may be lists among them.
    """
    count = len(inputs[0])
    parts = [run(*(np.asarray(rows[start : start + batch]) for rows in inputs)) for start in range(0, count, batch)]
    return joined(parts, specs) if specs else tuple(map(np.concatenate, zip(*parts, strict=True)))


def as_function(module: Callable[..., Any], device: torch.device | str = "cpu") -> Run:
    """A torch module, or what is called like one, as such a function; its outputs in the order of their structure."""
    import torch

    def run(*batch: np.ndarray) -> Arrays:
        with torch.no_grad():
            made = module(*(torch.from_numpy(array).to(device) for array in batch))
        return tuple(tensor.cpu().numpy() for tensor in tensors_of(made))

    return run


def tensors_of(output: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of what a module returned, in the order of its structure."""
    from torch.utils import _pytree as pytree

    return tuple(pytree.tree_leaves(output))

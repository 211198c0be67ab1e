"""A file as a function.

Owns what every format's `runner` returns, and running it in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import BOX_KINDS, Arrays, Output
from export.bundle.detections import joined
from export.bundle.rows import Rows
from export.progress import Advance, unheard

if TYPE_CHECKING:
    import torch

Run = Callable[..., Arrays]
"""One batch of each input, [n, …] → each output [n, …]."""


def run_in_batches(
    run: Run, inputs: tuple[Rows, ...], batch: int, specs: Sequence[Output] = (), advance: Advance = unheard
) -> Arrays:
    """All of `inputs` through `run`, `batch` images at a time; the last batch may be smaller.

    `specs` are those of the outputs, where there may be lists among them. `advance` is told of each batch.
    """
    count = len(inputs[0])

    def each() -> Iterator[Arrays]:
        for start in range(0, count, batch):
            yield run(*(np.asarray(rows[start : start + batch]) for rows in inputs))
            advance(min(batch, count - start))

    parts = each()
    if any(spec.kind in BOX_KINDS for spec in specs):
        return joined(list(parts), specs)
    wholes: list[_Whole] = []
    for outputs in parts:
        wholes = wholes or [_Whole(output, count) for output in outputs]
        for whole, output in zip(wholes, outputs, strict=True):
            whole.append(output)
    return tuple(whole.array for whole in wholes)


class _Whole:
    """What `np.concatenate` makes of arrays like `first`, with a place for `count` rows from the start.

    Small arrays that are kept leave no room between them for the large ones that come and go: the memory of an export
    grew with the inputs (50,000 of 12 kB: 2.9 GB, and 1.3 GB in the oracle's process; so 1.0 and 0.7, as with 500).
    """

    def __init__(self, first: np.ndarray, count: int) -> None:
        self._rows, self._used = np.empty((count, *first.shape[1:]), first.dtype), 0

    def append(self, rows: np.ndarray) -> None:
        end = self._used + len(rows)
        if end > len(self._rows) or rows.shape[1:] != self._rows.shape[1:]:  # a file that is not right
            self._rows = np.concatenate([self.array, rows])
        self._rows[self._used : end] = rows
        self._used = end

    @property
    def array(self) -> np.ndarray:
        return self._rows[: self._used]


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

"""What a bundle is made from, whatever it comes from.

Owns the record, and what must hold for every source. Knows neither file formats nor folding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import Arrays, Output, Preprocessing, Source, Takes, TensorSpec
from export.bundle.rows import Rows, pieces
from export.sources.ends import dynamic_shapes
from trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Calibration:
    """Inputs that quantisation takes its ranges from: `raw` [N, …] as in `Material`, none of them one to be judged by.

    `identity` says which they are: exporting again with the same changes nothing. `labels`, int64 [N], where known.
    """

    raw: Rows
    identity: str
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class ModelInputs:
    """What a model takes, float32 [N, *input.shape[1:]], preprocessed from `raw` where and when `np.asarray` asks."""

    raw: Rows
    preprocessing: Preprocessing
    input: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *(int(size) for size in self.input.shape[1:]))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> ModelInputs:
        return ModelInputs(self.raw[rows], self.preprocessing, self.input)

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> np.ndarray:
        inputs = self.preprocessing.apply(np.asarray(self.raw), self.input.shape)
        return inputs if dtype is None else inputs.astype(dtype)


@dataclass(frozen=True)
class Material:
    """What a bundle is made from: the trained `module` (float32, eval mode) and the inputs to hold it to.

    `raw` are rows [N, …] as a user has them, of the first input, and `more_raw` those of further inputs; `labels` are
    int64 [N] or None. `weights` makes the bytes of the safetensors file that a full bundle keeps.
    """

    module: nn.Module
    weights: Callable[[], bytes]
    source: Source
    input: TensorSpec
    output: Output
    preprocessing: Preprocessing
    raw: Rows
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    calibration: Calibration | None = None
    more_inputs: tuple[TensorSpec, ...] = ()
    more_outputs: tuple[Output, ...] = ()
    more_raw: tuple[Rows, ...] = ()

    @property
    def examples(self) -> Arrays:
        """The first two of `inputs`: as few as an export with a symbolic batch takes."""
        return tuple(np.asarray(rows[:2]) for rows in self.inputs)

    @property
    def inputs(self) -> tuple[Rows, ...]:
        """Every input of the model: float32 [N, *input.shape[1:]], made when it is asked for, and the others."""
        return (ModelInputs(self.raw, self.preprocessing, self.input), *self.more_raw)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Every output, in the order in which the model gives them."""
        return (self.output, *self.more_outputs)

    def dynamic_shapes(self, takes: Takes = "preprocessed") -> tuple[dict[int, Any], ...]:
        """Those of torch.export, for a network that takes the first input so."""
        taken = self.preprocessing.raw if takes == "raw" else self.input
        return dynamic_shapes((taken, *self.more_inputs))

    def drawn(self, count: int) -> Material:
        """With `count` of its inputs, drawn evenly and kept in memory; itself where it has no more."""
        have = len(self.raw)
        if count >= have:
            return self
        places = [index * have // count for index in range(count)]

        def some(rows: Rows) -> np.ndarray:
            return np.concatenate([np.asarray(rows[place : place + 1]) for place in places])

        labels = None if self.labels is None else self.labels[places]
        return replace(self, raw=some(self.raw), labels=labels, more_raw=tuple(map(some, self.more_raw)))

    def names(self, takes: Takes) -> tuple[list[str], list[str]]:
        """What the inputs and the outputs are called in a file that takes the first input so."""
        taken = self.preprocessing.raw if takes == "raw" else self.input
        return [spec.name for spec in (taken, *self.more_inputs)], [spec.name for spec in self.outputs]


def require_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    """Raises UserError where a tensor of a model, `what` in words, is not finite."""
    import torch

    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinity) in {', '.join(bad[:3])}. "
            "Such a model can't be right: train it again."
        )


def known(rows: Rows, others: Rows) -> np.ndarray:
    """For each of `rows` [N, …] whether one of `others` [M, …] is the same byte by byte, bool [N]."""
    seen = set(_digests(others))
    return np.array([digest in seen for digest in _digests(rows)], dtype=bool)


def _digests(rows: Rows) -> Iterator[bytes]:
    for piece in pieces(rows):
        yield from (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in piece)

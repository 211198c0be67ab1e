"""What a bundle is made from, whatever it comes from.

Owns the record, and what must hold for every source. Knows neither file formats nor folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.bundle import Arrays, Output, Preprocessing, Source, Takes, TensorSpec
from trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Calibration:
    """Inputs that quantisation takes its ranges from: `raw` [N, …] as in `Material`, none of them one to be judged by.

    `identity` says which they are: exporting again with the same changes nothing. `labels`, int64 [N], where known.
    """

    raw: np.ndarray
    identity: str
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Material:
    """What a bundle is made from: the trained `module` (float32, eval mode) and the inputs to hold it to.

    `raw` is an array [N, …] as a user has it, of the first input, and `more_raw` those of further inputs; `labels` are
    int64 [N] or None. `weights` are the bytes of the safetensors file that the bundle keeps.
    """

    module: nn.Module
    weights: bytes
    source: Source
    input: TensorSpec
    output: Output
    preprocessing: Preprocessing
    raw: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    calibration: Calibration | None = None
    more_inputs: tuple[TensorSpec, ...] = ()
    more_outputs: tuple[Output, ...] = ()
    more_raw: Arrays = ()

    @property
    def examples(self) -> Arrays:
        """The first two of `inputs`: as few as an export with a symbolic batch takes."""
        first = self.preprocessing.apply(self.raw[:2], self.input.shape)
        return (first, *(array[:2] for array in self.more_raw))

    @property
    def inputs(self) -> Arrays:
        """Every input of the model: float32 [N, *input.shape[1:]], and the others as they are."""
        return (self.preprocessing.apply(self.raw, self.input.shape), *self.more_raw)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Every output, in the order in which the model gives them."""
        return (self.output, *self.more_outputs)

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


def known(arrays: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of `arrays` [N, …] whether one of `others` [M, …] is the same byte by byte, bool [N]."""
    seen = {other.tobytes() for other in others}
    return np.array([array.tobytes() in seen for array in arrays], dtype=bool)

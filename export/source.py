"""Where a model to export comes from.

Owns turning a training checkpoint into a module in eval mode, with the inputs that the oracle is made from. Knows
neither file formats nor folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle import Preprocessing, Source, TensorSpec, sha256_file
from trainer import checkpoint, mnist
from trainer.errors import UserError

if TYPE_CHECKING:
    from torch import nn

INPUT = TensorSpec(name="image", dtype="float32", shape=("batch", 1, 28, 28))
OUTPUT = TensorSpec(name="logits", dtype="float32", shape=("batch", 10))
RAW = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 28, 28))
CLASS_NAMES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Material:
    """What a bundle is made from: the trained `module` (float32, eval mode) and the inputs to hold it to.

    `raw` is an array [N, …] as a user has it, `labels` int64 [N] or None.
    """

    module: nn.Module
    source: Source
    input: TensorSpec
    output: TensorSpec
    preprocessing: Preprocessing
    raw: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None

    @property
    def inputs(self) -> np.ndarray:
        """Model inputs, float32 [N, *input.shape[1:]]."""
        return self.preprocessing.apply(self.raw, self.input.shape)


def describe(path: Path) -> Source:
    """What the checkpoint says of itself, without loading its weights. Raises UserError."""
    metadata = checkpoint.read_metadata(path)
    return Source(
        factory=metadata.model,
        checkpoint_sha256=sha256_file(path),
        recipe=metadata.recipe,
        seed=metadata.seed,
        steps=metadata.steps,
        test_top1=metadata.test_top1,
    )


def load(path: Path, source: Source, data_dir: Path) -> Material:
    """The checkpoint's network with its weights, and the MNIST test set. Raises UserError."""
    import torch

    from trainer.model import Net

    weights, metadata = checkpoint.load(path)
    module = Net().eval()
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(
            f"{path} holds the weights of another network than {source.factory}: {detail} "
            "Train one with `python -m trainer`, or name the right file with --checkpoint."
        ) from None
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"{path} holds values that are not finite (NaN or infinity) in {', '.join(bad[:3])}. "
            "Such a model can't be right: train it again."
        )
    data = mnist.load(data_dir)
    scaling = metadata.preprocessing
    preprocessing = Preprocessing(raw=RAW, scale=scaling.scale, mean=(scaling.mean,), std=(scaling.std,))
    return Material(module, source, INPUT, OUTPUT, preprocessing, data.test_images, data.test_labels, CLASS_NAMES)

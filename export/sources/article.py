"""A training checkpoint of this project as a source: the article's network, and MNIST.

Owns which images the files are judged by, and which int8 is calibrated with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.bundle import Output, Preprocessing, Source, TensorSpec, sha256_file
from export.sources.material import Calibration, Material, known, require_finite
from trainer import checkpoint, mnist
from trainer.errors import UserError

INPUT = TensorSpec(name="image", dtype="float32", shape=("batch", 1, 28, 28))
OUTPUT = Output(name="logits", dtype="float32", shape=("batch", 10))
RAW = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 28, 28))
CLASS_NAMES = tuple(str(digit) for digit in range(10))
CALIBRATION_IMAGES = 500
"""With 500 and with 1,000 images int8 files were off alike (RMS 0.204 and 0.205); 1,000 take twice as long."""
CALIBRATION_SEED = 0


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


def load(path: Path, source: Source, data_dir: Path, *, calibrated: bool = False) -> Material:
    """The checkpoint's network with its weights, and the MNIST test set. Raises UserError.

    `calibrated` adds training images to calibrate with.
    """
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
    require_finite(weights, str(path))
    data = mnist.load(data_dir)
    scaling = metadata.preprocessing
    preprocessing = Preprocessing(raw=RAW, scale=scaling.scale, mean=(scaling.mean,), std=(scaling.std,))
    return Material(
        module,
        path.read_bytes,
        source,
        INPUT,
        OUTPUT,
        preprocessing,
        data.test_images,
        data.test_labels,
        CLASS_NAMES,
        calibration_images(data) if calibrated else None,
    )


def calibration_identity() -> str:
    """Which training images `load` calibrates with."""
    return f"{CALIBRATION_IMAGES} MNIST training images, seed {CALIBRATION_SEED}"


def calibration_images(data: mnist.Mnist) -> Calibration:
    """Some of the training images, drawn from those that are no test image too."""
    order = np.random.default_rng(CALIBRATION_SEED).permutation(len(data.train_images))[: 2 * CALIBRATION_IMAGES]
    new = order[~known(data.train_images[order], data.test_images)][:CALIBRATION_IMAGES]
    return Calibration(data.train_images[new], calibration_identity(), data.train_labels[new].astype(np.int64))

"""A user's inputs, from files.

Owns reading them and what they must be.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from export.sources.material import Calibration, known
from trainer.errors import UserError

RANDOM_INPUTS = 256
"""So many normally distributed inputs make the oracle of a model whose user gave none."""


def read_calibration(path: Path, input_shape: tuple[int, ...], raw: np.ndarray) -> Calibration:
    """Inputs to calibrate with, none of which may be among those that the files are judged by."""
    inputs, labels = read_data(path, input_shape, "--calibration")
    if inputs.dtype != raw.dtype:
        raise UserError(
            f"--calibration {path} holds {inputs.dtype} inputs, those that the files are checked with are {raw.dtype}. "
            "Calibrate with inputs of the same kind."
        )
    judged_by = int(known(inputs, raw).sum())
    if judged_by:
        raise UserError(
            f"{judged_by} of the {len(inputs)} inputs of --calibration {path} are among those that the files are "
            "checked with: the verdict on int8 would be a verdict on what it was fitted to. Calibrate with other "
            "inputs, for example training data."
        )
    contents = hashlib.sha256(inputs.tobytes() + (b"" if labels is None else labels.tobytes()))
    return Calibration(inputs, contents.hexdigest(), labels)


def read_data(path: Path, input_shape: tuple[int, ...], option: str = "--data") -> tuple[np.ndarray, np.ndarray | None]:
    """The inputs [N, *input_shape], uint8 or float32, and the labels, int64 [N], or None. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option} {path} can't be read as an .npz file ({error}). Make one with numpy.savez."
        ) from error
    inputs, labels = arrays.get("inputs"), arrays.get("labels")
    if inputs is None or inputs.shape[1:] != input_shape or inputs.dtype.kind not in "fui" or len(inputs) < 2:
        have = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
        raise UserError(
            f"{option} {path} holds {have}; expected an array `inputs` of numbers with shape "
            f"{['N', *input_shape]}, N at least 2, and optionally `labels` [N]."
        )
    if labels is not None and (labels.shape != (len(inputs),) or labels.dtype.kind not in "ui"):
        raise UserError(
            f"{option} {path}: `labels` is {labels.dtype} {list(labels.shape)}; expected {len(inputs)} whole numbers."
        )
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise UserError(
                f"{option} {path}: `inputs` holds values that are not finite (NaN, infinity, or beyond float32's "
                "range). Leave such inputs out."
            )
    return inputs, None if labels is None else labels.astype(np.int64)


def random_inputs(input_shape: tuple[int, ...]) -> np.ndarray:
    """Normally distributed inputs, float32 [RANDOM_INPUTS, *input_shape], the same every time."""
    return np.random.default_rng(0).standard_normal((RANDOM_INPUTS, *input_shape), dtype=np.float32)

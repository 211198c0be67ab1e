"""Where a model to export comes from: a training checkpoint of this project, or a factory of the user's own.

Owns turning either into a module in eval mode, with the inputs that the oracle is made from. Knows neither file formats
nor folding.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle import Preprocessing, Source, TensorSpec, sha256_file
from trainer import checkpoint, mnist
from trainer.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT = TensorSpec(name="image", dtype="float32", shape=("batch", 1, 28, 28))
OUTPUT = TensorSpec(name="logits", dtype="float32", shape=("batch", 10))
RAW = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 28, 28))
CLASS_NAMES = tuple(str(digit) for digit in range(10))
RANDOM_INPUTS = 256
"""So many normally distributed inputs make the oracle of a model whose user gave none."""
CALIBRATION_IMAGES = 500
"""With 500 and with 1,000 images int8 files were off alike (RMS 0.204 and 0.205); 1,000 take twice as long."""
CALIBRATION_SEED = 0


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

    `raw` is an array [N, …] as a user has it, `labels` int64 [N] or None. `weights` are the bytes of the safetensors
    file that the bundle keeps.
    """

    module: nn.Module
    weights: bytes
    source: Source
    input: TensorSpec
    output: TensorSpec
    preprocessing: Preprocessing
    raw: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    calibration: Calibration | None = None

    @property
    def example(self) -> np.ndarray:
        """The first two of `inputs`: as few as an export with a symbolic batch takes."""
        return self.preprocessing.apply(self.raw[:2], self.input.shape)

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
    _require_finite(weights, str(path))
    data = mnist.load(data_dir)
    scaling = metadata.preprocessing
    preprocessing = Preprocessing(raw=RAW, scale=scaling.scale, mean=(scaling.mean,), std=(scaling.std,))
    return Material(
        module,
        path.read_bytes(),
        source,
        INPUT,
        OUTPUT,
        preprocessing,
        data.test_images,
        data.test_labels,
        CLASS_NAMES,
        _calibration_images(data) if calibrated else None,
    )


def calibration_identity() -> str:
    """Which training images `load` calibrates with."""
    return f"{CALIBRATION_IMAGES} MNIST training images, seed {CALIBRATION_SEED}"


def _calibration_images(data: mnist.Mnist) -> Calibration:
    """Some of the training images, drawn from those that are no test image too."""
    order = np.random.default_rng(CALIBRATION_SEED).permutation(len(data.train_images))[: 2 * CALIBRATION_IMAGES]
    new = order[~_known(data.train_images[order], data.test_images)][:CALIBRATION_IMAGES]
    return Calibration(data.train_images[new], calibration_identity(), data.train_labels[new].astype(np.int64))


def _known(arrays: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of `arrays` [N, …] whether one of `others` [M, …] is the same byte by byte, bool [N]."""
    seen = {other.tobytes() for other in others}
    return np.array([array.tobytes() in seen for array in arrays], dtype=bool)


def load_own(
    model: str, weights: Path | None, input_shape: tuple[int, ...], data: Path | None, calibration: Path | None = None
) -> Material:
    """A model of the user's own, made by calling `module:factory` without arguments.

    `weights` is a safetensors file for its `load_state_dict`; without one the factory's own weights are taken.
    `input_shape` is the shape of one input, batch left out. `data` is an .npz file with `inputs` [N, *input_shape] and
    optionally `labels` [N]; without one, normally distributed inputs stand in, and there are no labels. `calibration`
    is such a file with other inputs, for int8.

    Raises UserError for each of these that is not as described.
    """
    import torch

    module = _call_factory(model).eval()
    if weights is not None:
        _load_weights(module, weights)
    parameters = [*module.named_parameters(), *module.named_buffers()]
    _require_finite(dict(parameters), str(weights or model))
    module = module.float()
    raw, labels = _read_data(data, input_shape) if data is not None else (_random_inputs(input_shape), None)
    calibrated = _read_calibration(calibration, input_shape, raw) if calibration is not None else None
    preprocessing = Preprocessing(
        raw=TensorSpec(name="input", dtype=str(raw.dtype), shape=("batch", *input_shape)),
        scale=1.0,
        mean=(0.0,),
        std=(1.0,),
    )
    input_spec = TensorSpec(name="input", dtype="float32", shape=("batch", *input_shape))
    try:
        with torch.no_grad():
            output = module(torch.from_numpy(preprocessing.apply(raw[:2], input_spec.shape)))
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{model} does not take an input of shape {['batch', *input_shape]}: {type(error).__name__}: {error}. "
            "State the shape of one input with --input, for example 3x224x224."
        ) from error
    if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != 2:
        raise UserError(
            f"{model} returns {type(output).__name__}, expected one tensor whose first dimension is the batch. "
            "Wrap the model in a module that returns the tensor to compare."
        )
    stored = _stored_weights(module)
    return Material(
        module,
        stored,
        Source(factory=model, checkpoint_sha256=hashlib.sha256(stored).hexdigest()),
        input_spec,
        TensorSpec(name="output", dtype="float32", shape=("batch", *output.shape[1:])),
        preprocessing,
        raw,
        labels,
        None,
        calibrated,
    )


def _call_factory(model: str) -> nn.Module:
    from torch import nn

    module_name, _, attribute = model.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--model {model}: {error}. Expected module:factory, importable from the current folder, for example "
            "mypackage.nets:make_net.",
            EXIT_USAGE,
        ) from error
    try:
        made = factory()
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"--model {model}: calling it without arguments raised {type(error).__name__}: {error}."
        ) from error
    if not isinstance(made, nn.Module):
        raise UserError(f"--model {model} made {type(made).__name__}, expected a torch.nn.Module.")
    return made


def _load_weights(module: nn.Module, path: Path) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        module.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--weights {path} can't be read as a safetensors file ({error}). Save the weights with "
            "safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"--weights {path} does not fit the model: {detail}") from error


def _require_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    import torch

    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinity) in {', '.join(bad[:3])}. "
            "Such a model can't be right: train it again."
        )


def _read_calibration(path: Path, input_shape: tuple[int, ...], raw: np.ndarray) -> Calibration:
    """Inputs to calibrate with, none of which may be among those that the files are judged by."""
    inputs, labels = _read_data(path, input_shape, "--calibration")
    if inputs.dtype != raw.dtype:
        raise UserError(
            f"--calibration {path} holds {inputs.dtype} inputs, those that the files are checked with are {raw.dtype}. "
            "Calibrate with inputs of the same kind."
        )
    known = int(_known(inputs, raw).sum())
    if known:
        raise UserError(
            f"{known} of the {len(inputs)} inputs of --calibration {path} are among those that the files are checked "
            "with: the verdict on int8 would be a verdict on what it was fitted to. Calibrate with other inputs, for "
            "example training data."
        )
    contents = hashlib.sha256(inputs.tobytes() + (b"" if labels is None else labels.tobytes()))
    return Calibration(inputs, contents.hexdigest(), labels)


def _read_data(
    path: Path, input_shape: tuple[int, ...], option: str = "--data"
) -> tuple[np.ndarray, np.ndarray | None]:
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


def _random_inputs(input_shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((RANDOM_INPUTS, *input_shape), dtype=np.float32)


def _stored_weights(module: nn.Module) -> bytes:
    """The state as a safetensors file; a tensor that has two names is stored under each."""
    import safetensors.torch

    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()})

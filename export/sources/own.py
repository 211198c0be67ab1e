"""A model of a user's own as a source, with the user's inputs and their preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle import Output, Preprocessing, Source, TensorSpec
from export.sources.data import random_inputs, read_calibration, read_data
from export.sources.making import Declared, make
from export.sources.material import Material, require_finite
from trainer.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from torch import nn

PIXELS = 1 / 255


@dataclass(frozen=True)
class Own:
    """What a user says of a model.

    `model`, `arguments`, `weights` and `pretrained` are as for `export.sources.making.make`. `input_shape` is the shape
    of one input, batch left out; None where the library declares it. `data` is an .npz file with `inputs` [N,
    *input_shape] and optionally `labels` [N]; without one, normally distributed inputs stand in, and there are no
    labels. `calibration` is such a file with other inputs, for int8. `scale`, `mean` and `std`, one value or one for
    each channel, take the inputs to what the model takes: (x · scale - mean) / std; None where nothing is said.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    input_shape: tuple[int, ...] | None = None
    data: Path | None = None
    calibration: Path | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def load(own: Own, say: Callable[[str], None]) -> Material:
    """The model and its inputs; `say` is told what was noticed. Raises UserError where anything is not as described."""
    import torch

    made = make(own.model, own.arguments, own.weights, own.pretrained)
    for note in made.notes:
        say(note)
    module, shape = made.module, own.input_shape or (made.declared.shape if made.declared else None)
    if shape is None:
        raise UserError("--model needs --input, the shape of one input, for example 3x224x224.", EXIT_USAGE)
    require_finite(dict([*module.named_parameters(), *module.named_buffers()]), str(own.weights or own.model))
    raw, labels = read_data(own.data, shape) if own.data is not None else (random_inputs(shape), None)
    calibrated = read_calibration(own.calibration, shape, raw) if own.calibration is not None else None
    preprocessing = _preprocessing(own, made.declared, str(raw.dtype), shape, say)
    input_spec = TensorSpec(name="input", dtype="float32", shape=("batch", *shape))
    try:
        with torch.no_grad():
            output = module(torch.from_numpy(preprocessing.apply(raw[:2], input_spec.shape)))
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{own.model} does not take an input of shape {['batch', *shape]}: {type(error).__name__}: {error}. "
            "State the shape of one input with --input, for example 3x224x224."
        ) from error
    if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != 2:
        raise UserError(
            f"{own.model} returns {type(output).__name__}, expected one tensor whose first dimension is the batch. "
            "Wrap the model in a module that returns the tensor to compare."
        )
    if labels is not None and output.dim() == 2 and not ((labels >= 0) & (labels < output.shape[1])).all():
        raise UserError(
            f"--data {own.data}: `labels` go from {labels.min()} to {labels.max()}, the model has {output.shape[1]} "
            "classes, from 0 on. Leave inputs without a class out."
        )
    stored = _stored_weights(module)
    return Material(
        module,
        stored,
        Source(factory=own.model, checkpoint_sha256=hashlib.sha256(stored).hexdigest()),
        input_spec,
        Output(name="output", dtype="float32", shape=("batch", *output.shape[1:])),
        preprocessing,
        raw,
        labels,
        None,
        calibrated,
    )


def _preprocessing(
    own: Own, declared: Declared | None, dtype: str, shape: tuple[int, ...], say: Callable[[str], None]
) -> Preprocessing:
    """What the user says of the inputs; of pixels of which nothing is said, what the library declares, if it does."""
    scale, mean, std = own.scale, own.mean, own.std
    if dtype == "uint8" and scale is None and mean is None and std is None:
        if declared is None:
            say("the inputs are uint8 and taken as they are, 0 to 255; --scale, --mean and --std say otherwise")
        else:
            scale, mean, std = PIXELS, declared.mean, declared.std
            say(f"preprocessing as declared for {own.model}: pixels / 255, mean {list(mean)}, std {list(std)}")
    channels = shape[0] if len(shape) > 1 else shape[-1]
    for option, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"{option} has {len(values)} values; expected 1, or {channels}, one a channel.", EXIT_USAGE)
    if std is not None and 0 in std:
        raise UserError("--std divides: none of its values may be 0.", EXIT_USAGE)
    return Preprocessing(
        raw=TensorSpec(name="input", dtype=dtype, shape=("batch", *shape)),
        scale=1.0 if scale is None else scale,
        mean=mean or (0.0,),
        std=std or (1.0,),
    )


def _stored_weights(module: nn.Module) -> bytes:
    """The state as a safetensors file; a tensor that has two names is stored under each."""
    import safetensors.torch

    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()})

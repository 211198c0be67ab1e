"""A model of a user's own as a source, with the user's inputs and their preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import Output, Preprocessing, Source, TensorSpec
from export.sources.data import Data, Request, calibration, random_inputs, read_data
from export.sources.framing import Framing, Interpolation
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
    of one input, batch left out; None where the library declares it. `data` is a file with `inputs` [N, *input_shape]
    and optionally `labels` [N], or a folder of images; without one, normally distributed inputs stand in, and there are
    no labels. `calibration` is such a place with other inputs, for int8. `samples` and `calibration_samples` are how
    many of them are taken at most. `resize`, `crop` and `interpolation` are what is done to images (`Framing`).
    `scale`, `mean` and `std`, one value or one for each channel, take the inputs to what the model takes:
    (x · scale - mean) / std. None where nothing is said.
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
    samples: int | None = None
    calibration_samples: int | None = None
    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    interpolation: Interpolation | None = None


def load(own: Own, say: Callable[[str], None], scratch: Path) -> Material:
    """The model and its inputs; `say` is told what was noticed. Raises UserError where anything is not as described.

    `scratch` is a folder for inputs that can't be read from where they lie; it has to last as long as the material.
    """
    import torch

    _require_used(own)
    made = make(own.model, own.arguments, own.weights, own.pretrained)
    for note in made.notes:
        say(note)
    module, shape = made.module, own.input_shape or (made.declared.shape if made.declared else None)
    if shape is None:
        raise UserError("--model needs --input, the shape of one input, for example 3x224x224.", EXIT_USAGE)
    require_finite(dict([*module.named_parameters(), *module.named_buffers()]), str(own.weights or own.model))
    framing = _framing(own, made.declared)
    given = Data(random_inputs(shape), None)
    if own.data is not None:
        given = read_data(Request(own.data, "--data", shape, scratch, own.samples, framing), say)
    preprocessing = _preprocessing(own, made.declared, given, shape, say)
    if own.data is not None and own.data.is_dir():
        preprocessing = preprocessing.model_copy(update={"outside": framing.steps(shape[0])})
    input_spec = TensorSpec(name="input", dtype="float32", shape=("batch", *shape))
    try:
        with torch.no_grad():
            output = module(torch.from_numpy(preprocessing.apply(np.asarray(given.inputs[:2]), input_spec.shape)))
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
    outputs = tuple(output.shape[1:])
    given = _labelled(given, outputs, f"--data {own.data}", say)
    calibrated = None
    if own.calibration is not None:
        where = f"--calibration {own.calibration}"
        asked = Request(own.calibration, "--calibration", shape, scratch, own.calibration_samples, framing)
        others = read_data(asked, say)
        calibrated = calibration(_labelled(others, outputs, where, say), given.inputs, where)
    stored = _stored_weights(module)
    return Material(
        module,
        stored,
        Source(factory=own.model, checkpoint_sha256=hashlib.sha256(stored).hexdigest()),
        input_spec,
        Output(name="output", dtype="float32", shape=("batch", *outputs)),
        preprocessing,
        given.inputs,
        given.labels,
        given.class_names,
        calibrated,
    )


def _require_used(own: Own) -> None:
    """Raises UserError where something is said of inputs that are not given."""
    if own.samples is not None and own.data is None:
        raise UserError("--samples goes with --data.", EXIT_USAGE)
    if own.calibration_samples is not None and own.calibration is None:
        raise UserError("--calibration-samples goes with --calibration.", EXIT_USAGE)
    folders = [place for place in (own.data, own.calibration) if place is not None and place.is_dir()]
    if not folders and (own.resize is not None or own.crop is not None or own.interpolation is not None):
        raise UserError("--resize, --crop and --interpolation go with a folder of images.", EXIT_USAGE)


def _framing(own: Own, declared: Declared | None) -> Framing:
    """What the user says is done to images; where neither a size nor a crop is said, what the library declares."""
    if own.resize is not None or own.crop is not None:
        framing = Framing(own.resize, own.crop)
    else:
        framing = (declared.framing if declared is not None else None) or Framing()
    if own.interpolation is None:
        return framing
    if framing.resize is None:
        raise UserError("--interpolation goes with --resize: how images are resized.", EXIT_USAGE)
    return replace(framing, interpolation=own.interpolation)


def _labelled(given: Data, outputs: tuple[int, ...], where: str, say: Callable[[str], None]) -> Data:
    """The inputs with those labels that are classes of a model with such `outputs`, and the names of these classes.

    Folders number their classes themselves, so where there are more or fewer the numbers mean something else. Raises
    UserError for numbers of no class.
    """
    if given.labels is None:
        return given
    if given.class_names is not None and outputs != (len(given.class_names),):
        say(
            f"{where} has {len(given.class_names)} folders and the model's output is {list(outputs)}: which folder is "
            "which class is not known, so there are no labels. A folder for each class, even if empty, would say it"
        )
        return replace(given, labels=None, class_names=None)
    if len(outputs) == 1 and not ((given.labels >= 0) & (given.labels < outputs[0])).all():
        raise UserError(
            f"{where}: `labels` go from {given.labels.min()} to {given.labels.max()}, the model has {outputs[0]} "
            "classes, from 0 on. Leave inputs without a class out."
        )
    return given


def _preprocessing(
    own: Own, declared: Declared | None, given: Data, shape: tuple[int, ...], say: Callable[[str], None]
) -> Preprocessing:
    """What the user says of the inputs; of pixels of which nothing is said, what the library declares, if it does."""
    scale, mean, std = own.scale, own.mean, own.std
    channels = shape[0] if len(shape) > 1 else shape[-1]
    if scale is None and mean is None and std is None:
        applies = declared is not None and len(declared.mean) in (1, channels)
        if given.inputs.dtype == np.uint8 and declared is not None and applies:
            scale, mean, std = PIXELS, declared.mean, declared.std
            say(f"preprocessing as declared for {own.model}: pixels / 255, mean {list(mean)}, std {list(std)}")
        elif given.inputs.dtype == np.uint8:
            say("the inputs are uint8 and taken as they are, 0 to 255; --scale, --mean and --std say otherwise")
        elif given.span is not None and declared is not None and _looks_raw(given.span, declared):
            say(
                f"the inputs go from {given.span[0]:g} to {given.span[1]:g} and are taken as they are: they don't look "
                f"scaled by the mean {list(declared.mean)} and std {list(declared.std)} declared for {own.model}; "
                "--scale, --mean and --std say what is to be done"
            )
    for option, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"{option} has {len(values)} values; expected 1, or {channels}, one a channel.", EXIT_USAGE)
    if std is not None and 0 in std:
        raise UserError("--std divides: none of its values may be 0.", EXIT_USAGE)
    return Preprocessing(
        raw=TensorSpec(name="input", dtype=str(given.inputs.dtype), shape=("batch", *shape)),
        scale=1.0 if scale is None else scale,
        mean=mean or (0.0,),
        std=std or (1.0,),
    )


def _looks_raw(span: tuple[float, float], declared: Declared) -> bool:
    """Whether values of this span look like pixels that nothing was subtracted from, or that were not scaled."""
    darkest = min(-mean / std for mean, std in zip(declared.mean, declared.std, strict=True))
    brightest = max((1 - mean) / std for mean, std in zip(declared.mean, declared.std, strict=True))
    return span[1] > 2 * brightest or (span[0] >= 0 > darkest)


def _stored_weights(module: nn.Module) -> bytes:
    """The state as a safetensors file; a tensor that has two names is stored under each."""
    import safetensors.torch

    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()})

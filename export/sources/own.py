"""A model of a user's own as a source, with the user's inputs and their preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import Arrays, Dimension, Output, OutputKind, Preprocessing, Source, TensorSpec
from export.bundle.rows import Rows
from export.sources.arrays import arrays_in
from export.sources.data import RANDOM_INPUTS, Data, Request, calibration, read_data
from export.sources.ends import Given, other_sizes, outputs_of, random_inputs
from export.sources.framing import Framing, Interpolation
from export.sources.making import Declared, make
from export.sources.material import Calibration, Material, require_finite
from trainer.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

PIXELS = 1 / 255
FEW_RANDOM = 16
"""Random inputs of a model that takes them one by one."""


@dataclass(frozen=True)
class Own:
    """What a user says of a model.

    `model`, `arguments`, `weights` and `pretrained` are as for `export.sources.making.make`. `inputs` are in the order
    in which the model takes them; none where the library declares its one. `outputs` says of some what they are made
    of. `data` is a file with `inputs` [N, *shape], arrays by the names of further inputs and optionally `labels` [N],
    or a folder of images; without one, random inputs stand in, and there are no labels. `calibration` is such a place
    with other inputs, for int8. `samples` and `calibration_samples` are how many of them are taken at most. `resize`,
    `crop` and `interpolation` are what is done to images (`Framing`). `scale`, `mean` and `std`, one value or one for
    each channel, take the inputs to what the model takes: (x · scale - mean) / std. None where nothing is said.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    inputs: tuple[Given, ...] = ()
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
    outputs: Mapping[str, OutputKind] = field(default_factory=dict)


def load(own: Own, say: Callable[[str], None], scratch: Path) -> Material:
    """The model and its inputs; `say` is told what was noticed. Raises UserError where anything is not as described.

    `scratch` is a folder for inputs that can't be read from where they lie; it has to last as long as the material.
    """
    require_used(own)
    made = make(own.model, own.arguments, own.weights, own.pretrained)
    for note in made.notes:
        say(note)
    module, inputs = made.module, own.inputs
    if not inputs and made.declared is not None:
        inputs = (Given(made.declared.shape, (False,) * len(made.declared.shape)),)
    _require_inputs(inputs)
    shape = inputs[0].shape
    require_finite(dict([*module.named_parameters(), *module.named_buffers()]), str(own.weights or own.model))
    given = given_to(own, made.declared, shape, scratch, say)
    if given is None:
        count = own.samples or (RANDOM_INPUTS if made.batch is None else FEW_RANDOM)
        given = Data(random_inputs(inputs[0], count), None)
    preprocessing = preprocessing_of(own, made.declared, given, inputs[0], say, made.batch)
    specs = tuple(each.spec(each.name or "input", batch=made.batch) for each in inputs)
    more = _more_inputs(own, inputs[1:], len(given.inputs), scratch)
    few = made.batch or 2
    first = preprocessing.apply(np.asarray(given.inputs[:few]), specs[0].shape)
    examples = first, *(np.asarray(rows[:few]) for rows in more)
    output, *more_outputs = _outputs(own, module, specs, examples, made.batch)
    given = labelled(given, output.shape[1:], f"--data {own.data}", say)
    calibrated = calibration_of(own, made.declared, given, shape, output.shape[1:], scratch, say)
    return Material(
        module,
        lambda: _stored_weights(module),
        Source(factory=own.model, checkpoint_sha256=hashlib.sha256(_stored_weights(module)).hexdigest()),
        specs[0],
        output,
        preprocessing,
        given.inputs,
        given.labels,
        given.class_names,
        calibrated,
        specs[1:],
        tuple(more_outputs),
        more,
    )


def _require_inputs(inputs: tuple[Given, ...]) -> None:
    """Raises UserError where they can't be told apart, or there are none."""
    if not inputs:
        raise UserError("--model needs --input, the shape of one input, for example 3x224x224.", EXIT_USAGE)
    names = [each.name for each in inputs]
    if len(inputs) > 1 and (None in names or len(set(names)) < len(names)):
        raise UserError(
            "Of several inputs each --input needs a name of its own, in the order in which the model takes them: "
            "--input image=3x224x224 --input mask=1x224x224.",
            EXIT_USAGE,
        )
    if inputs[0].dtype != "float32":
        raise UserError(
            f"The first input is {inputs[0].dtype}; it is the one that is preprocessed, and that makes float32. Wrap "
            "the model in a module that takes its floats first.",
            EXIT_USAGE,
        )


def _more_inputs(own: Own, inputs: tuple[Given, ...], count: int, scratch: Path) -> tuple[Rows, ...]:
    """Further inputs [count, …], from the same file as the first or random like it. Raises UserError."""
    if not inputs:
        return ()
    if own.data is None:
        return tuple(random_inputs(each, count) for each in inputs)
    if own.data.is_dir() or own.samples is not None:
        raise UserError("Several inputs are read whole, from one .npz or .safetensors file.", EXIT_USAGE)
    arrays = arrays_in(own.data, "--data", scratch)
    for each in inputs:
        rows, wanted = arrays.get(str(each.name)), [count, *each.shape]
        if rows is None or list(rows.shape) != wanted or rows.dtype != each.dtype:
            have = "nothing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise UserError(f"--data {own.data} has {have} as {each.name!r}; expected {each.dtype} {wanted}.")
    return tuple(arrays[str(each.name)] for each in inputs)


def _outputs(
    own: Own, module: nn.Module, specs: tuple[TensorSpec, ...], examples: Arrays, batch: int | None
) -> tuple[Output, ...]:
    """What the model gives for two examples, or for `batch`, and for larger ones where sizes may vary. Raises
    UserError.
    """
    import torch

    def call(arrays: Arrays) -> Any:
        shapes = ", ".join(str(["batch", *array.shape[1:]]) for array in arrays)
        try:
            with torch.no_grad():
                return module(*map(torch.from_numpy, arrays))
        except Exception as error:  # whatever the user's own code raises
            raise UserError(
                f"{own.model} does not take {'an input' if len(arrays) == 1 else 'inputs'} of shape {shapes}: "
                f"{type(error).__name__}: {error}. State the shape of one input with --input, for example 3x224x224; "
                "of several with names, in the order in which the model takes them."
            ) from error

    larger = other_sizes(specs, examples)
    again = None if larger is None else call(larger)
    kinds = own.outputs
    if batch is not None:
        from export.sources.detector import KINDS

        kinds = {**KINDS, **kinds}
    outputs = outputs_of(call(examples), again, kinds, own.model, batch)
    taken = {spec.name for spec in specs}
    return tuple(
        output.model_copy(update={"name": output.name + "_out"}) if output.name in taken else output
        for output in outputs
    )


def require_used(own: Own) -> None:
    """Raises UserError where something is said of inputs that are not given."""
    if own.calibration_samples is not None and own.calibration is None:
        raise UserError("--calibration-samples goes with --calibration.", EXIT_USAGE)
    folders = [place for place in (own.data, own.calibration) if place is not None and place.is_dir()]
    if not folders and (own.resize is not None or own.crop is not None or own.interpolation is not None):
        raise UserError("--resize, --crop and --interpolation go with a folder of images.", EXIT_USAGE)


def given_to(
    own: Own, declared: Declared | None, shape: tuple[int, ...], scratch: Path, say: Callable[[str], None]
) -> Data | None:
    """The inputs that the user gives, None where there are none."""
    if own.data is None:
        return None
    return read_data(Request(own.data, "--data", shape, scratch, own.samples, framing_of(own, declared)), say)


def calibration_of(
    own: Own,
    declared: Declared | None,
    given: Data,
    shape: tuple[int, ...],
    outputs: tuple[Dimension, ...],
    scratch: Path,
    say: Callable[[str], None],
) -> Calibration | None:
    """The inputs to calibrate with, of a model with such `outputs`; None where there are none."""
    if own.calibration is None:
        return None
    where, framing = f"--calibration {own.calibration}", framing_of(own, declared)
    asked = Request(own.calibration, "--calibration", shape, scratch, own.calibration_samples, framing)
    return calibration(labelled(read_data(asked, say), outputs, where, say), given.inputs, where)


def framing_of(own: Own, declared: Declared | None) -> Framing:
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


def labelled(given: Data, outputs: tuple[Dimension, ...], where: str, say: Callable[[str], None]) -> Data:
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
    classes = outputs[0] if len(outputs) == 1 else None
    if isinstance(classes, int) and not ((given.labels >= 0) & (given.labels < classes)).all():
        raise UserError(
            f"{where}: `labels` go from {given.labels.min()} to {given.labels.max()}, the model has {classes} "
            "classes, from 0 on. Leave inputs without a class out."
        )
    return given


def preprocessing_of(
    own: Own,
    declared: Declared | None,
    given: Data,
    first: Given,
    say: Callable[[str], None],
    batch: int | None = None,
) -> Preprocessing:
    """What the user says of the inputs; of pixels of which nothing is said, what the library declares, if it does."""
    scale, mean, std = own.scale, own.mean, own.std
    channels = first.shape[0]
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
    images = own.data is not None and own.data.is_dir()
    return Preprocessing(
        raw=first.spec(first.name or "input", str(given.inputs.dtype), batch),
        scale=1.0 if scale is None else scale,
        mean=mean or (0.0,),
        std=std or (1.0,),
        **({"outside": framing_of(own, declared).steps(first.shape[0])} if images else {}),
    )


def _looks_raw(span: tuple[float, float], declared: Declared) -> bool:
    """Whether values of this span look like pixels that nothing was subtracted from, or that were not scaled."""
    darkest = min(-mean / std for mean, std in zip(declared.mean, declared.std, strict=True))
    brightest = max((1 - mean) / std for mean, std in zip(declared.mean, declared.std, strict=True))
    return span[1] > 10 * brightest or (span[0] >= 0 > darkest)


def _stored_weights(module: nn.Module) -> bytes:
    """The state as a safetensors file; a tensor that has two names is stored under each."""
    import safetensors.torch

    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()})

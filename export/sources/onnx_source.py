"""An ONNX file as a source, with the user's inputs and their preprocessing.

Owns what a file must be for a bundle to be made from it. Knows nothing of folding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle import Arrays, Format, Output, Preprocessing, Source, TensorSpec, sha256_file
from export.bundle.rows import Rows
from export.fold.from_onnx.file import load as load_model
from export.formats.onnx_session import open_session
from export.sources.arrays import INPUTS, arrays_in
from export.sources.data import RANDOM_INPUTS, Data
from export.sources.ends import Given, random_inputs
from export.sources.material import Calibration, ModelInputs
from export.sources.own import Own, calibration_of, given_to, labelled, preprocessing_of, require_used
from trainer.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    import onnx
    from torch import nn

FEWEST_RANDOM = 16
RANDOM_NUMBERS = 32 * 3 * 224 * 224
"""So many random numbers at most, in no fewer inputs than `FEWEST_RANDOM`: the float64 oracle of 32 images of 224x224
takes ResNet-18 three seconds (two cores)."""
BATCH = "batch"
FORMATS: tuple[Format, ...] = ("onnx", "openvino")
"""What such a source can be written as."""
OUTPUT_TYPES = frozenset({"float32", "int64", "int32", "uint8", "int8", "bool"})


@dataclass(frozen=True)
class OnnxMaterial:
    """What a bundle is made from where that is a file, and what there is to hold it to: see `Material`.

    The first dimension of `input` and of `outputs` is a number where the file takes batches of that size alone; then
    `raw` holds whole batches.
    """

    file: Path
    source: Source
    input: TensorSpec
    outputs: tuple[Output, ...]
    preprocessing: Preprocessing
    raw: Rows
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    calibration: Calibration | None = None
    module: nn.Module | None = None
    """What the file was traced from, in eval mode and float32; None where there is no more than the file."""

    @property
    def inputs(self) -> tuple[Rows, ...]:
        """Every input of the model: one, float32 [N, *input.shape[1:]], made when it is asked for."""
        return (ModelInputs(self.raw, self.preprocessing, self.input),)

    @property
    def more_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs after the first: none."""
        return ()

    @property
    def batch(self) -> int | None:
        """The only batch size that the file takes; None where it takes any."""
        first = self.input.shape[0]
        return first if isinstance(first, int) else None


def load(own: Own, say: Callable[[str], None], scratch: Path) -> OnnxMaterial:
    """The file `own.model` and its inputs; `say` is told what was noticed. Raises UserError where it can't be used.

    `scratch` is a folder for inputs that can't be read from where they lie; it has to last as long as the material.
    """
    import onnx

    require_used(own)
    path = Path(own.model)
    load_model(path)  # which says what is wrong with a file that is no model
    model = onnx.load(str(path), load_external_data=False)
    taken = _the_input(model, path)
    _require_float32(model, path)
    shape = _shape(taken, own, scratch)
    one = Given(shape, (False,) * len(shape))
    session = _session(path)
    batch = _batch(session, path, next(_sizes(taken), None), shape, say)
    given = given_to(own, None, shape, scratch, say)
    if given is None:
        given = Data(random_inputs(one, _whole_batches(own.samples or _random_count(shape), batch)), None)
    given = _in_whole_batches(given, batch, own, say)
    first: int | str = BATCH if batch is None else batch
    preprocessing = preprocessing_of(own, None, given, one, say)
    raw_spec = preprocessing.raw.model_copy(update={"name": taken.name, "shape": (first, *shape)})
    preprocessing = preprocessing.model_copy(update={"raw": raw_spec})
    input_spec = TensorSpec(name=taken.name, dtype="float32", shape=(first, *shape))
    made = _run(session, path, preprocessing.apply(np.asarray(given.inputs[: batch or 2]), input_spec.shape))
    given = labelled(given, made[0].shape[1:], f"--data {own.data}", say)
    names = [argument.name for argument in session.get_outputs()]
    if unknown := set(own.outputs) - set(names):
        raise UserError(
            f"--output {min(unknown)}: {path} has no such output; there are {', '.join(names)}.", EXIT_USAGE
        )
    return OnnxMaterial(
        path,
        Source(factory=path.name, checkpoint_sha256=sha256_file(path)),
        input_spec,
        tuple(
            Output(name=name, dtype=str(output.dtype), shape=(first, *output.shape[1:]), kind=own.outputs.get(name))
            for name, output in zip(names, made, strict=True)
        ),
        preprocessing,
        given.inputs,
        given.labels,
        given.class_names,
        calibration_of(own, None, given, shape, made[0].shape[1:], scratch, say),
    )


def _in_whole_batches(given: Data, batch: int | None, own: Own, say: Callable[[str], None]) -> Data:
    """As many of the inputs as make whole batches. Raises UserError where there are not enough for one."""
    rest = 0 if batch is None else len(given.inputs) % batch
    if not rest:
        return given
    kept = len(given.inputs) - rest
    if not kept:
        raise UserError(
            f"--data {own.data} holds {rest} inputs, but {own.model} takes {batch} at a time and no other number. "
            f"Give {batch} at least, or export the model with a batch that is not fixed."
        )
    say(f"{own.model} takes {batch} inputs at a time: the last {rest} of --data are left out")
    return replace(given, inputs=given.inputs[:kept], labels=None if given.labels is None else given.labels[:kept])


def _the_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """The one input of the file, float32. Raises UserError."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    if len(values) != 1:
        names = ", ".join(value.name for value in values) or "none"
        raise UserError(
            f"{path} has {len(values)} inputs ({names}); a bundle is made of a file with one. Export the part of the "
            "model that has one input, or make the others constants."
        )
    kind = values[0].type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        raise UserError(
            f"{path}: the input {values[0].name} is {TensorProto.DataType.Name(kind).lower()}; expected float32. "
            "Export the model with its input in float32: what a user has as other numbers is preprocessed "
            "(--scale, --mean, --std)."
        )
    only: onnx.ValueInfoProto = values[0]
    return only


def _require_float32(model: onnx.ModelProto, path: Path) -> None:
    """Raises UserError for a file that computes in another type: its error would be taken for rounding in float32."""
    from onnx import TensorProto

    from export.formats.onnx_float64 import all_nodes

    floats = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    nodes = list(all_nodes(model))
    quantised = next((n.op_type for n in nodes if "Quantize" in n.op_type or n.op_type.endswith("Integer")), None)
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {attribute.i for node in nodes if node.op_type == "Cast" for attribute in node.attribute}
    types |= {attribute.t.data_type for node in nodes for attribute in node.attribute if node.op_type == "Constant"}
    narrow = next((name for kind, name in floats.items() if kind in types), None)
    if quantised or narrow:
        found = f"is quantised ({quantised})" if quantised else f"computes in {narrow}"
        raise UserError(
            f"{path} {found}; expected a file in float32, which is what narrower ones are held to. Name the file that "
            f"it was made from, and add --variant {'int8' if quantised else 'float16'} for one like it."
        )


def _sizes(value: onnx.ValueInfoProto) -> Iterator[int | None]:
    """The sizes of an input as the file states them; None where one is not fixed."""
    for dim in value.type.tensor_type.shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None


def _shape(value: onnx.ValueInfoProto, own: Own, scratch: Path) -> tuple[int, ...]:
    """The shape of one input: as the file says, and where it does not, as --input or the data do. Raises UserError."""
    known = value.type.tensor_type.HasField("shape")
    sizes = tuple(_sizes(value))[1:]
    if len(own.inputs) > 1 or any(any(each.free) for each in own.inputs):
        raise UserError(
            f"{own.model} has one input, which is judged at one size: name it with one --input, for example 3x224x224.",
            EXIT_USAGE,
        )
    said, where = own.inputs[0].shape if own.inputs else None, "--input says"
    if said is None and own.data is not None and (not known or None in sizes):
        said, where = _shape_of(own.data, scratch), f"--data {own.data} has"
    words = "x".join("?" if size is None else str(size) for size in sizes)
    if said is None:
        if not known or None in sizes:
            raise UserError(
                f"{own.model}: the sizes of one input {value.name} are {words or 'unknown'}, where ? is not fixed. Say "
                "them with --input, for example 3x224x224, or give inputs with --data."
            )
        said = tuple(size for size in sizes if size is not None)
    fits = len(said) == len(sizes) and all(size in (None, other) for size, other in zip(sizes, said, strict=True))
    if known and not fits:
        raise UserError(
            f"{own.model} takes inputs of {words} each, {where} {'x'.join(map(str, said))}. Give inputs of the shape "
            "that the file takes."
        )
    if not said:
        raise UserError(f"{own.model}: the input {value.name} is one number for each image; expected an array.")
    return said


def _shape_of(data: Path, scratch: Path) -> tuple[int, ...] | None:
    """The shape of one input in a file of arrays; None of a folder of images, and where there are no inputs."""
    inputs = None if data.is_dir() else arrays_in(data, "--data", scratch).get(INPUTS)
    return None if inputs is None else inputs.shape[1:]


def _session(path: Path) -> Any:
    """The file in onnxruntime. Raises UserError where it does not take it."""
    try:
        return open_session(str(path), silent=True)
    except Exception as error:  # onnxruntime has a class for each failure
        raise UserError(
            f"onnxruntime does not load {path}: {_first_line(error)}. A bundle is made of a file that onnxruntime runs "
            "on the CPU: an operator of another domain, or a newer opset, needs the runtime that knows it."
        ) from error


def _batch(
    session: Any, path: Path, stated: int | None, shape: tuple[int, ...], say: Callable[[str], None]
) -> int | None:
    """The only batch size that the file takes, None for any.

    Some files state that any will do, but were written for one image: a Reshape in them holds its size.
    """
    if stated is not None:
        return stated
    tried = random_inputs(Given(shape, (False,) * len(shape)), 2)
    try:
        _run(session, path, tried)
    except UserError as refusal:
        try:
            _run(session, path, tried[:1])
        except UserError:
            raise refusal from None
        say(f"{path} states no batch size, but runs with one image at a time only: so it is taken")
        return 1
    return None


def _run(session: Any, path: Path, inputs: np.ndarray) -> Arrays:
    """The outputs for model inputs [N, …]. Raises UserError where there are none, or none for each input."""
    (name,) = (argument.name for argument in session.get_inputs())
    try:
        outputs = tuple(session.run(None, {name: inputs}))
    except Exception as error:  # onnxruntime has a class for each failure
        raise UserError(
            f"{path} does not run with inputs of shape {list(inputs.shape)}: {_first_line(error)}. State the shape of "
            "one input that it takes with --input, for example 3x224x224."
        ) from error
    for argument, output in zip(session.get_outputs(), outputs, strict=True):
        kind = output.dtype.name if isinstance(output, np.ndarray) else type(output).__name__
        if kind not in OUTPUT_TYPES or output.ndim < 2 or len(output) != len(inputs):
            shape = list(output.shape) if isinstance(output, np.ndarray) else "no shape"
            raise UserError(
                f"{path}: the output {argument.name} is {kind} of {shape} for {len(inputs)} inputs; expected float32 "
                "or whole numbers, [batch, …]. Export the part of the model that returns such ones."
            )
    return outputs


def _random_count(shape: tuple[int, ...]) -> int:
    """How many random inputs there are to be: the fewer the larger one is."""
    return min(RANDOM_INPUTS, max(FEWEST_RANDOM, RANDOM_NUMBERS // int(np.prod(shape))))


def _whole_batches(count: int, batch: int | None) -> int:
    return count if batch is None else -(-count // batch) * batch


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

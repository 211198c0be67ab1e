"""Sizes and types of an ONNX file's values: in general, as far as they are fixed, and for one possible input.

Owns what is asked of ONNX's shape inference and, where that does not know, of onnxruntime. What a file says about the
sizes of its values is not believed: it may be stale, and runtimes do not look at it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from export.fold.from_onnx import file, trial
from export.fold.from_onnx.constants import Constants
from export.fold.from_onnx.nodes import STANDARD, given, integer, is_standard

Dims = tuple[int | str, ...]
"""Sizes, of which those that are not fixed have names."""


@dataclass
class Known:
    """What is known of a model's values, by name.

    Attributes:
        inputs: what a caller gives, with a name for each size that is not fixed.
        general: sizes for every input; None for one that inference does not know.
        example: sizes for one possible input.
        dtypes: types of tensors.
        others: values that are no tensors: sequences, optionals, maps.
        size: what the example takes for a size that is not fixed and not the batch.
    """

    inputs: dict[str, Dims | None] = field(default_factory=dict)
    general: dict[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    example: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, ir.DataType] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    size: int = trial.SIZES[0]

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The value's type, None where nothing tells it."""
        return self.dtypes.get(value.name or "")


def infer(model: ir.Model) -> tuple[Known, onnx.ModelProto]:
    """What inference tells in general, and the model without its weights that it was told of."""
    skeleton = _without_sizes(file.skeleton(model))
    known = Known(inputs=_inputs(model))
    _set_inputs(skeleton, known.inputs)
    inferred = _inferred(skeleton)
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        if value.type.WhichOneof("value") not in (None, "tensor_type"):
            known.others.add(value.name)
        if kind.elem_type:
            known.dtypes[value.name] = ir.DataType(kind.elem_type)
        if kind.HasField("shape"):
            known.general[value.name] = tuple(map(_dim, kind.shape.dim))
    return known, skeleton


def complete(known: Known, skeleton: onnx.ModelProto, model: ir.Model, constants: Constants) -> None:
    """Add the example: sizes for a batch and images, the smallest of `trial.SIZES` that the network takes."""
    free = trial.has_other_sizes(known.inputs.values())
    known.example = _example(skeleton, known)
    unknown = [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.name and value.name not in known.example and value.name not in known.others and value not in constants
    ]
    if not unknown and not free:
        return
    try:
        run = trial.observe(model, unknown, known.inputs, trial.SIZES if free else trial.SIZES[:1])
    except Exception:  # onnxruntime has a class for each failure; without these sizes less is folded, and said so
        return
    if run is None:
        return
    known.size, observed = run
    known.example = {**_example(skeleton, known), **observed}


def _inputs(model: ir.Model) -> dict[str, Dims | None]:
    """Sizes as declared, with a name for each that is not fixed; -1 is a way to say so."""
    found: dict[str, Dims | None] = {}
    for value in model.graph.inputs:
        if value.name is None or value.is_initializer():
            continue
        if value.shape is None:
            found[value.name] = None
            continue
        dims: list[int | str] = []
        for axis, size in enumerate(value.shape):
            name = size if isinstance(size, int) else size.value
            fixed = isinstance(name, int) and name > 0
            dims.append(
                name if name is not None and (fixed or isinstance(name, str)) and name else f"{value.name}[{axis}]"
            )
        found[value.name] = tuple(dims)
        for axis, number in _demanded(value).items():
            if axis < len(dims) and isinstance(dims[axis], str):
                dims[axis] = number
                found[value.name] = tuple(dims)
    return found


def _demanded(value: ir.Value) -> dict[int, int]:
    """Sizes that the layers that read an input demand of it, whatever is declared."""
    for use in value.uses():
        weight = given(use.node, 1)
        if use.idx == 0 and weight is not None and weight.shape is not None and len(weight.shape) > 2:
            inputs = weight.shape[0 if use.node.op_type == "ConvTranspose" else 1]
            if isinstance(inputs, int) and is_standard(use.node, "Conv", "ConvTranspose"):
                groups = integer(use.node, "group", 1) if use.node.op_type == "Conv" else 1
                return {1: inputs * groups}
    return {}


def _without_sizes(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the file says of sizes, unless only a foreign operator knows them."""
    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton)
    foreign = {name for node in proto.graph.node if node.domain not in STANDARD for name in node.output}
    kept = [value for value in proto.graph.value_info if value.name in foreign]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for value in proto.graph.output:
        if value.name not in foreign and value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return proto


def _set_inputs(proto: onnx.ModelProto, sizes: Mapping[str, Sequence[int | str] | None]) -> None:
    for value in proto.graph.input:
        given_sizes = sizes.get(value.name)
        if given_sizes is not None:
            kind = value.type.tensor_type
            kind.CopyFrom(helper.make_tensor_type_proto(kind.elem_type, given_sizes).tensor_type)


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # of a file that contradicts itself; what its inputs say is left
        return proto


def _example(skeleton: onnx.ModelProto, known: Known) -> dict[str, tuple[int, ...]]:
    """Sizes of the values for one input, those that inference finds."""
    concrete = onnx.ModelProto()
    concrete.CopyFrom(skeleton)
    batch = trial.batch_names(known.inputs.values())
    numbers = {
        name: None if dims is None else trial.concrete(dims, batch, known.size) for name, dims in known.inputs.items()
    }
    _set_inputs(concrete, numbers)
    foreign = {value.name for value in skeleton.graph.value_info}
    found: dict[str, tuple[int, ...]] = {}
    graph = _inferred(concrete).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [_dim(dim) for dim in kind.shape.dim]
        if value.name in foreign:  # in the names of the inputs' sizes
            dims = list(trial.named(dims, batch, known.inputs.values(), known.size))
        if kind.elem_type != TensorProto.UNDEFINED and kind.HasField("shape") and all(isinstance(d, int) for d in dims):
            found[value.name] = tuple(dims)  # type: ignore[arg-type]
    return found


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None

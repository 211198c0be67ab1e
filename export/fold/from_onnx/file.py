"""ONNX files on disk: loading one with all that it holds, and saving it.

Owns what a file must be to be read, and what `ir` does not carry by itself: sparse initializers,
maps, what a training needs. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from export.fold.errors import FoldError

_Message = TypeVar("_Message", onnx.SparseTensorProto, onnx.TrainingInfoProto)

SMALL = 1024
"""Bytes of a constant that shape inference gets to see: it may be a shape, and is no weight."""

_SKELETON, _SPARSE, _MAPS, _TRAINING = "skeleton", "sparse initializers", "maps", "training"
"""Under these names `ir.Model.meta` has protobuf messages that `ir` can't hold, or that are wanted as such."""


def load(source: Path) -> ir.Model:
    """The model, checked, with its weights in memory. Raises FoldError."""
    if not source.is_file():
        raise FoldError(f"there is no file {source}. Name an ONNX file.")
    try:
        onnx.checker.check_model(str(source))
        proto = onnx.load(source, load_external_data=False)
        maps = {}
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            if _has_map(value.type):
                maps[value.name] = onnx.TypeProto()
                maps[value.name].CopyFrom(value.type)
                value.ClearField("type")
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, os.path.dirname(source))
        model.meta[_SKELETON] = _without_weights(proto)
        model.meta[_SPARSE] = {tensor.values.name: _copied(tensor) for tensor in proto.graph.sparse_initializer}
        model.meta[_MAPS] = maps
        model.meta[_TRAINING] = [_copied(info) for info in proto.training_info]
        _leave(model)
        return ir.external_data.load_to_model(model)
    except Exception as error:  # onnx has no common class: decoding, checking and external data each raise their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FoldError(
            f"{source} is no valid ONNX model ({type(error).__name__}: {first_line[:300]}). Expected a file that "
            "onnx.checker accepts, with external data, if any, beside it. Export it again."
        ) from error


def sparse(model: ir.Model) -> Mapping[str, onnx.SparseTensorProto]:
    """The sparse initializers by name."""
    found: Mapping[str, onnx.SparseTensorProto] = model.meta.get(_SPARSE, {})
    return found


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The file without its weights, which are inputs in their place."""
    found: onnx.ModelProto = model.meta[_SKELETON]
    return found


def _has_map(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _has_map(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _has_map(kind.optional_type.elem_type)
    return bool(kind.HasField("map_type"))


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    graph, whole = light.graph, proto.graph
    graph.name = whole.name
    graph.input.extend(whole.input)
    graph.output.extend(whole.output)
    graph.value_info.extend(whole.value_info)
    listed = {value.name for value in whole.input}

    def feed(name: str, tensor: onnx.TensorProto, dims: Iterable[int]) -> None:
        if name not in listed:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(dims)))

    for tensor in whole.initializer:
        if tensor.ByteSize() <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            feed(tensor.name, tensor, tensor.dims)
    for sparse_tensor in whole.sparse_initializer:
        feed(sparse_tensor.values.name, sparse_tensor.values, sparse_tensor.dims)
    outputs = {value.name for value in whole.output}
    for node in whole.node:
        held = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        large = node.op_type == "Constant" and held and held[0].ByteSize() > SMALL
        if large and not outputs & set(node.output):
            feed(node.output[0], held[0], held[0].dims)
        else:
            graph.node.append(node)
    return light


def _copied(message: _Message) -> _Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _leave(model: ir.Model) -> None:
    """Take all tensors out of the protobuf message, which hands out a copy of one whenever its elements are asked for.

    One that stayed would keep the memory of all.
    """

    def taken(tensor: object) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.TensorProtoTensor) or not tensor.raw or tensor.dtype.bitwidth < 8:
            return None
        metadata = dict(tensor.metadata_props)
        return ir.Tensor(
            tensor.numpy(), tensor.dtype, name=tensor.name, doc_string=tensor.doc_string, metadata_props=metadata
        )

    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = taken(value.const_value) or value.const_value
    nodes = [*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())]
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            tensor = taken(attribute.value) if attribute.type == ir.AttributeType.TENSOR else None
            if tensor is not None:
                node.attributes[name] = ir.Attr(name, attribute.type, tensor, doc_string=attribute.doc_string)


def save(model: ir.Model, path: Path) -> None:
    """Write the model as one file. A sparse initializer that nothing reads any more goes.

    Weights are written one by one, and never are in memory all once more.
    """
    tensors = {value: value.const_value for value in model.graph.initializers.values() if value.const_value is not None}
    try:
        for value in tensors:
            value.const_value = ir.tensor(np.zeros(0, np.float32))
        proto = ir.to_proto(model)
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor
    proto.training_info.extend(model.meta.get(_TRAINING, ()))
    graph = proto.graph
    del graph.initializer[:]
    read = {value.name for node in model.graph.all_nodes() for value in node.inputs if value is not None}
    read |= {value.name for value in model.graph.outputs}
    for name, sparse_tensor in sparse(model).items():
        if name in read:
            graph.sparse_initializer.append(sparse_tensor)
    # `ir` describes each initializer once more among the values.
    described = [value for value in graph.value_info if value.name not in model.graph.initializers]
    del graph.value_info[:]
    graph.value_info.extend(described)
    maps: Mapping[str, onnx.TypeProto] = model.meta.get(_MAPS, {})
    for value_info in (*graph.input, *graph.output, *graph.value_info):
        if value_info.name in maps:
            value_info.type.CopyFrom(maps[value_info.name])
    _write(proto, [(str(value.name), tensor) for value, tensor in tensors.items()], path)


def _write(proto: onnx.ModelProto, tensors: list[tuple[str, ir.TensorProtocol]], path: Path) -> None:
    """A protobuf message is a sequence of fields, each a tag (number × 8 + 2), a length and content, in any order."""
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads: list[bytes] = []
    for name, tensor in tensors:
        if isinstance(tensor, ir.Tensor):
            head = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value)
            head.doc_string = tensor.doc_string or ""
            for key, text in tensor.metadata_props.items():
                head.metadata_props.add(key=key, value=text)
            heads.append(head.SerializeToString() + _field(9, tensor.nbytes))
        else:
            tensor.name = name
            heads.append(ir.to_proto(tensor).SerializeToString())
    lengths = [
        len(head) + (t.nbytes if isinstance(t, ir.Tensor) else 0) for head, (_, t) in zip(heads, tensors, strict=True)
    ]
    total = len(graph) + sum(len(_field(5, length)) + length for length in lengths)
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _field(7, total) + graph)
        for start, length, (_, tensor) in zip(heads, lengths, tensors, strict=True):
            file.write(_field(5, length) + start)
            if isinstance(tensor, ir.Tensor):
                file.write(tensor.tobytes())


def _field(number: int, length: int) -> bytes:
    """The tag of a field with content, and the content's length, of which each byte has seven bits."""
    parts = [number << 3 | 2]
    while length > 0x7F:
        parts.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*parts, length])


def has_external_data(source: Path) -> bool:
    """Whether weights lie beside the file."""
    proto = onnx.load(source, load_external_data=False)
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)

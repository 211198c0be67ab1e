"""The folds of a graph, written into the ONNX model that it was read from.

Owns which nodes and constants each changed operation becomes. Nodes and constants that no fold touches stay as they
are, and so do the names of inputs and outputs; what nothing reads any more goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from export.fold.from_onnx.constants import opset
from export.fold.from_onnx.layers import DTYPES
from export.fold.from_onnx.nodes import Made, Origin, given, integer, name_of, real, subgraphs
from export.fold.graph import Graph, Node, Value
from export.fold.maps import Refused
from export.fold.operations import Affine, Clamp, Identity, Layer, Opaque, Select

Tensor = torch.Tensor

_WRITTEN = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items()}


_DONE = Opaque("what has been written")


def write(model: ir.Model, graph: Graph) -> None:
    """Put the folds into `model`. The graph is of no use afterwards."""
    writer = _Writer(model)
    for value in dict.fromkeys(value for node in graph.nodes for value in node.outputs):
        _resize(value)
    for node in graph.nodes:
        if node.op is not node.read_as:
            writer.node(node)
            writer.remove_unread()
        node.op = node.read_as = _DONE  # its weights are not needed any more, and are large


def _resize(value: Value) -> None:
    """Note in the file that a value has got more channels."""
    made = value.origin
    assert isinstance(made, Made)
    shape = made.value.shape
    if value.shape is None or made.shape is None or value.shape == made.shape or shape is None:
        return
    if len(shape) == len(value.shape) == len(made.shape):
        sizes = [
            now if isinstance(size, int) and now != before else size
            for size, before, now in zip(shape, made.shape, value.shape, strict=True)
        ]
        made.value.shape = ir.Shape(sizes)


@dataclass(frozen=True)
class _Step:
    """One ONNX operation of the value that flows and constants; None leaves an operand out."""

    op_type: str
    operands: tuple[Tensor | None, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict)


class _Writer:
    def __init__(self, model: ir.Model) -> None:
        self.graph, self.opset = model.graph, opset(model)
        self.lists_weights = (model.ir_version or 0) < 4
        self.taken = _names(model.graph)
        self.dropped: list[ir.Value] = []

    def node(self, node: Node) -> None:
        """Write one changed operation."""
        op, read_as = node.op, node.read_as
        if isinstance(op, Layer) and isinstance(read_as, Layer):
            self._layer(node, op, read_as)
        elif isinstance(op, Affine) and isinstance(read_as, Affine):
            self._affine(node, op, read_as)
        elif isinstance(op, Clamp):
            self._clamp(node, op)
        elif isinstance(op, Identity | Select):
            self._replace(node, [], ir.DataType.FLOAT)
        else:
            raise Refused(f"{node.name} has become {op.label}, for which there is no node")

    # -- layers

    def _layer(self, node: Node, op: Layer, read_as: Layer) -> None:
        origin, dtype = _origin(node), _WRITTEN[op.dtype]
        layer, last = origin.nodes[0], origin.nodes[-1]
        scaled = layer.op_type == "Gemm" and any(real(layer, name, 1.0) != 1 for name in ("alpha", "beta"))
        if scaled:  # they are part of the weight and the bias that were read
            for name in ("alpha", "beta"):
                layer.attributes.pop(name, None)
        if op.groups != read_as.groups:
            layer.attributes["group"] = ir.AttrInt64("group", op.groups)
        if scaled or not _equal(op.weight, read_as.weight, dtype):
            upright = op.rank or (layer.op_type == "Gemm" and integer(layer, "transB", 0))
            self._exchange(layer, 1, op.weight if upright else op.weight.T, dtype)
        if op.bias is None or (not scaled and read_as.bias is not None and _equal(op.bias, read_as.bias, dtype)):
            return
        if op.bias.dim() == 1 and layer.op_type != "MatMul":
            if len(layer.inputs) < 3:
                layer.resize_inputs(3)
            self._exchange(layer, 2, op.bias, dtype)
        elif len(origin.nodes) == 2:  # MatMul and the Add behind it
            place = next(place for place, value in enumerate(last.inputs) if value is not layer.outputs[0])
            self._exchange(last, place, op.bias, dtype)
        else:
            if given(layer, 2) is not None:  # the bias is part of the map
                self.dropped += [value for value in layer.inputs[2:] if value is not None]
                layer.resize_inputs(2)
            self._add_after(layer, op.bias.unsqueeze(0) if op.bias.dim() > 1 else op.bias, dtype)

    def _exchange(self, node: ir.Node, place: int, tensor: Tensor, dtype: ir.DataType) -> None:
        """Another constant for one input."""
        old = given(node, place)
        stem = old.name if old is not None and old.name else f"{name_of(node)}_{place}"
        node.replace_input_with(place, self._constant(stem, tensor, dtype))
        if old is not None:
            self.dropped.append(old)

    def _add_after(self, node: ir.Node, tensor: Tensor, dtype: ir.DataType) -> None:
        """Add a constant to the node's output, for everything that reads it."""
        output = node.outputs[0]
        users = list(output.uses())
        constant = self._constant(f"{name_of(node)}_bias", tensor, dtype)
        added = ir.Node("", "Add", [output, constant], name=self._free(f"{name_of(node)}_add"))
        result = added.outputs[0]
        result.name, result.type, result.shape = self._free(f"{output.name}_add"), output.type, output.shape
        self.graph.insert_after(node, added)
        for user, place in users:
            user.replace_input_with(place, result)
        if output.is_graph_output():
            for place, value in enumerate(self.graph.outputs):
                if value is output:
                    self.graph.outputs[place] = result
            output.name, result.name = self._free(f"{output.name}_before"), output.name
            _take_over(result, output)

    # -- what becomes other nodes

    def _affine(self, node: Node, op: Affine, read_as: Affine) -> None:
        """New parameters for a BatchNorm; else a multiplication and an addition, as far as they do something."""
        first, dtype = _origin(node).nodes[0], _WRITTEN[op.dtype]
        if read_as.is_norm:
            scale, shift = op.map.vectors(1, read_as.map.scale.shape[1], node.name)
            # Of zero mean and unit variance; its epsilon is made up for by the scale.
            scale = scale * math.sqrt(1 + real(first, "epsilon", 1e-5))
            for place, part in enumerate((scale, shift, torch.zeros_like(scale), torch.ones_like(scale)), start=1):
                self._exchange(first, place, part, _dtype(first.inputs[place]) or dtype)
            return
        parts = (("Mul", op.map.scale, 1.0), ("Add", op.map.shift, 0.0))
        self._replace(
            node, [_Step(kind, (part,)) for kind, part, neutral in parts if bool((part != neutral).any())], dtype
        )

    def _clamp(self, node: Node, op: Clamp) -> None:
        """One bound for all stays a Relu or a Clip; one for each channel is a Max or a Min."""
        made = node.output.origin
        dtype = (made.dtype if isinstance(made, Made) else None) or ir.DataType.FLOAT
        low, high = op.low, op.high
        if low.numel() == high.numel() == 1:
            steps = self._clip(float(low.reshape(())), float(high.reshape(())))
        else:
            bounds = [
                (kind, bound) for kind, bound in (("Max", low), ("Min", high)) if not bool(torch.isinf(bound).all())
            ]
            if self.opset >= 8:
                steps = [_Step(kind, (bound,)) for kind, bound in bounds]
            else:
                steps = [step for kind, bound in bounds for step in _old_bound(kind, bound)]
        self._replace(node, steps, dtype)

    def _clip(self, low: float, high: float) -> list[_Step]:
        if math.isinf(low) and math.isinf(high):
            return []
        if (low, high) == (0.0, math.inf):
            return [_Step("Relu")]
        limits = {name: bound for name, bound in (("min", low), ("max", high)) if math.isfinite(bound)}
        if self.opset < 11:
            return [_Step("Clip", attributes=limits)]
        operands = [
            torch.tensor(limits[name], dtype=torch.float64) if name in limits else None for name in ("min", "max")
        ]
        return [_Step("Clip", tuple(operands if "max" in limits else operands[:1]))]

    def _replace(self, node: Node, steps: list[_Step], dtype: ir.DataType) -> None:
        """Put these operations in the place of the node's."""
        origin, op = _origin(node), node.op
        x = origin.nodes[0].inputs[origin.places[op.index if isinstance(op, Select) else 0]]
        assert x is not None
        last = origin.nodes[-1]
        output = last.outputs[0]
        if not steps and output.is_graph_output() and (x.producer() is None or x.is_graph_output()):
            steps = [_Step("Identity")]  # an input and an output, or two outputs, can't be one value
        result = x
        for step in steps:
            name = self._free(f"{name_of(last)}_{step.op_type.lower()}")
            operands = [
                None if part is None else self._constant(f"{name}_constant", part, dtype) for part in step.operands
            ]
            attributes = [ir.AttrFloat32(key, number) for key, number in step.attributes.items()]
            made = ir.Node("", step.op_type, [result, *operands], attributes, name=name)
            result = made.outputs[0]
            result.name = self._free(f"{output.name}_{step.op_type.lower()}")
            result.type, result.shape = output.type, output.shape
            self.graph.insert_before(last, made)
        old_name, is_output = output.name, output.is_graph_output()
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        if is_output:
            output.name, result.name = self._free(f"{old_name}_before"), old_name
            _take_over(result, output)
        self.dropped += [value for old in origin.nodes for value in old.inputs if value is not None and value is not x]
        for old in reversed(origin.nodes):
            self.graph.remove(old, safe=True)

    # -- constants

    def _constant(self, stem: str, tensor: Tensor, dtype: ir.DataType) -> ir.Value:
        """A new initializer; below IR version 4 it is listed as an input too."""
        array = _array(tensor, dtype)
        name = self._free(f"{stem}_folded")
        shape = ir.Shape(array.shape)
        tensor_of_file = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor_of_file)
        self.graph.register_initializer(value)
        if self.lists_weights:
            self.graph.inputs.append(value)
        return value

    def remove_unread(self) -> None:
        """Take away the constants and nodes that were read before and are not any more."""
        while self.dropped:
            value = self.dropped.pop()
            if value.uses() or value.is_graph_output():
                continue
            producer = value.producer()
            if producer is not None:
                if producer.graph is self.graph and not any(v.uses() or v.is_graph_output() for v in producer.outputs):
                    self.dropped += [read for read in producer.inputs if read is not None]
                    self.graph.remove(producer, safe=True)
            elif value.is_initializer() and (self.lists_weights or not value.is_graph_input()):
                if value.is_graph_input():
                    self.graph.inputs.remove(value)
                del self.graph.initializers[str(value.name)]

    def _free(self, stem: str | None) -> str:
        name, number = str(stem), 1
        while name in self.taken:
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name)
        return name


def _old_bound(kind: str, bound: Tensor) -> list[_Step]:
    """Opset 7, whose Max and Min take no bound for each channel: max(x, l) = prelu(x - l) + l.

    min(x, h) = -max(-x, -h); a slope of 1 leaves a channel without a bound as it is.
    """
    flip = [_Step("Mul", (torch.tensor(-1.0, dtype=torch.float64),))] if kind == "Min" else []
    finite = torch.where(torch.isinf(bound), 0.0, -bound if kind == "Min" else bound)
    slope = torch.isinf(bound).double()
    return [*flip, _Step("Add", (-finite,)), _Step("PRelu", (slope,)), _Step("Add", (finite,)), *flip]


def _origin(node: Node) -> Origin:
    assert isinstance(node.origin, Origin)
    return node.origin


def _take_over(value: ir.Value, declared: ir.Value) -> None:
    """An output of the network keeps its declaration, right or wrong."""
    value.type, value.shape, value.doc_string = declared.type, declared.shape, declared.doc_string
    value.metadata_props.update(declared.metadata_props)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return value.dtype if value is not None and value.dtype is not None else None if tensor is None else tensor.dtype


def _array(tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.ascontiguousarray(tensor.detach().contiguous().numpy().astype(dtype.numpy()))


def _equal(one: Tensor, other: Tensor, dtype: ir.DataType) -> bool:
    """Whether both are the same as they are written."""
    return one is other or (one.shape == other.shape and np.array_equal(_array(one, dtype), _array(other, dtype)))


def _names(graph: ir.Graph) -> set[str | None]:
    """All names of values and nodes, in subgraphs too."""
    names: set[str | None] = set()
    pending = [graph]
    while pending:
        current = pending.pop()
        names |= set(current.initializers) | {value.name for value in (*current.inputs, *current.outputs)}
        for node in current:
            names |= {node.name, *(value.name for value in (*node.inputs, *node.outputs) if value is not None)}
            pending += subgraphs(node)
    return names

"""Constants of an ONNX file: which values do not depend on the network's input, and what their elements are.

Owns what counts as one: initializers that no caller can override, Constant nodes, and what cheap operations make of
constants alone. Elements are computed when they are asked for, in the type in which the file has them, and only where
the result is not larger than what the file could hold itself. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from export.fold.from_onnx.nodes import given, has_subgraph, integer, integers, is_standard

CHEAP = {
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos",
    "CumSum", "Div", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
    "Gemm", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Mean", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softplus", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
"""Operations that exporters write between a weight and the layer that reads it, or to compute a shape. All always give
the same result. DequantizeLinear is not among them: weights that are stored in int8 stay in int8.
"""

MOST_ELEMENTS = 2**22
"""So many elements may be made of fewer: an Expand of two numbers can ask for more than a machine has."""

MOST_PRODUCTS = 2**30
"""So many multiplications may a product of two matrices of constants take."""

KEPT_ELEMENTS = 2**16
"""Results of so many elements are remembered; larger ones, weights, are asked for once or twice."""


class Constants:
    """The constants of a model's main graph.

    `dtype_of` tells a value's type, where shape inference found it; `sparse` the sparse initializers by name.
    """

    def __init__(
        self,
        model: ir.Model,
        dtype_of: Callable[[ir.Value], ir.DataType | None],
        sparse: Mapping[str, onnx.SparseTensorProto],
    ) -> None:
        self.opset = opset(model)
        self.dtype_of, self.sparse = dtype_of, sparse
        self.overridable = (model.ir_version or 0) >= 4
        """Below that version every initializer is also listed as an input, which means nothing."""
        self.known: dict[ir.Value, np.ndarray | None] = {}
        self.made: set[ir.Value] = set()
        for node in model.graph:
            if self._is_cheap(node) and all(value is None or value in self for value in _sources(node)):
                self.made |= set(node.outputs)

    def __contains__(self, value: object) -> bool:
        """Whether the value never depends on the network's input, known or not."""
        if not isinstance(value, ir.Value):
            return False
        return value in self.made or self._is_source(value)

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """A constant's elements; None where it is none, or too large to be computed, or can't be."""
        if value is None or value not in self:
            return None
        large: list[ir.Value] = []
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self.known:
                pending.pop()
                continue
            node = current.producer()
            if node is None or is_standard(node, "Constant"):
                self._remember(current, _stored(current, self.sparse), large)
                continue
            missing = [source for source in _sources(node) if source is not None and source not in self.known]
            if missing:
                pending += missing
                continue
            for output, result in zip(node.outputs, self._results(node), strict=False):
                self._remember(output, result, large)
        result = self.known[value]
        for computed in large:
            del self.known[computed]
        return result

    def _remember(self, value: ir.Value, array: np.ndarray | None, large: list[ir.Value]) -> None:
        if value not in self.known and array is not None and array.size > KEPT_ELEMENTS:
            large.append(value)
        self.known[value] = array

    def _is_source(self, value: ir.Value) -> bool:
        if value.producer() is not None:
            return False
        if value.is_initializer():
            return not (value.is_graph_input() and self.overridable)
        return value.name in self.sparse and not (value.is_graph_input() and self.overridable)

    def _is_cheap(self, node: ir.Node) -> bool:
        return is_standard(node, *CHEAP) and not has_subgraph(node)

    def _results(self, node: ir.Node) -> list[np.ndarray | None]:
        """What a node makes of constants, None where that is not to be had."""
        nothing: list[np.ndarray | None] = [None] * len(node.outputs)
        arrays = [None if value is None else self.known[value] for value in _sources(node)]
        if any(array is None and value is not None for array, value in zip(arrays, _sources(node), strict=True)):
            return nothing
        if is_standard(node, "Identity"):
            return [arrays[0]]
        try:
            size, work = _cost(node, arrays, self.opset)
            if (
                size > max(MOST_ELEMENTS, sum(array.size for array in arrays if array is not None))
                or work > MOST_PRODUCTS
            ):
                return nothing
            if is_standard(node, "CastLike"):
                like = self.dtype_of(node.inputs[1]) if node.inputs[1] is not None else None
                return [None if like is None or arrays[0] is None else arrays[0].astype(like.numpy())]
            return list(_run(node, arrays, self.opset))
        except Exception:  # the reference raises whatever numpy does; such a value is as good as computed at run time
            return nothing


def opset(model: ir.Model) -> int:
    """The version of ONNX's own operators that the model uses."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


def _sources(node: ir.Node) -> list[ir.Value | None]:
    """The inputs whose elements are looked at."""
    return list(node.inputs[:1]) if is_standard(node, "CastLike") else list(node.inputs)


def _stored(value: ir.Value, sparse: Mapping[str, onnx.SparseTensorProto]) -> np.ndarray | None:
    """The elements of an initializer or a Constant node, as they are in memory: not copied."""
    if value.producer() is None and value.name is not None and value.name in sparse:
        return _dense(sparse[value.name])
    try:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return None
        array: np.ndarray = tensor.numpy()
        return array
    except (ValueError, TypeError):  # a Constant node of a form that is not read, a sparse one, for example
        return None


def _dense(tensor: onnx.SparseTensorProto) -> np.ndarray | None:
    sizes = list(tensor.dims)
    if math.prod(sizes) > MOST_ELEMENTS:
        return None
    values, places = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    dense = np.zeros(sizes, values.dtype)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return dense


def _cost(node: ir.Node, arrays: list[np.ndarray | None], version: int) -> tuple[int, int]:
    """An upper bound for the elements of the result, and for the multiplications of a matrix product."""
    first, *others = [array for array in arrays if array is not None] or [np.zeros(0)]
    if node.op_type == "ConstantOfShape":
        return math.prod(int(size) for size in first), 0
    if node.op_type == "Expand":
        return math.prod(np.broadcast_shapes(first.shape, tuple(int(size) for size in others[0]))), 0
    if node.op_type == "Tile":
        return first.size * math.prod(int(times) for times in others[0].reshape(-1)), 0
    if node.op_type == "Range":
        start, limit, step = (float(array) for array in (first, *others))
        return max(math.ceil((limit - start) / step), 0), 0
    if node.op_type in ("Gather", "GatherND"):
        axis = integer(node, "axis", 0) if node.op_type == "Gather" else 0
        return others[0].size * (first.size // max(first.shape[axis], 1)), 0
    if node.op_type == "Pad":
        pads = integers(node, "pads", []) if version < 11 else [int(side) for side in others[0]]
        if given(node, 3) is not None:
            return first.size + MOST_ELEMENTS + 1, 0  # along some axes alone: not seen in front of a weight
        rank = first.ndim
        return math.prod(max(size + pads[i] + pads[i + rank], 0) for i, size in enumerate(first.shape)), 0
    if node.op_type in ("MatMul", "Gemm"):
        shared = max(first.shape[0 if integer(node, "transA", 0) else -1], 1)
        work = first.size * others[0].size // shared
        return work // shared, work
    if node.op_type in ("Concat", "ScatterND", "ScatterElements", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"):
        return sum(array.size for array in (first, *others)), 0
    if others and not node.op_type.startswith("Reduce"):
        return math.prod(np.broadcast_shapes(*(array.shape for array in (first, *others)))), 0
    return first.size, 0


def _run(node: ir.Node, arrays: list[np.ndarray | None], version: int) -> list[np.ndarray]:
    """By ONNX's reference implementation, which knows every version of every operator."""
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [f"i{index}" if array is not None else "" for index, array in enumerate(arrays)]
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    proto.domain = ""
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph([proto], "constant", inputs, [helper.make_empty_tensor_value_info(o) for o in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]

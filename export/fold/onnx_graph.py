"""ONNX files: into the vocabulary of `graph`, and back with the folds in them.

Owns what each ONNX operator means for folding (opset 7 and newer) and how a fold is written into the file. Knows no
rule of folding. A BatchNorm in a function or a subgraph is reported and stays. Names of inputs and outputs, metadata
and unrelated nodes are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx import helper
from onnx.reference import ReferenceEvaluator

from export.fold import algebra
from export.fold.graph import (
    Add,
    Clamp,
    Concat,
    Elementwise,
    Flatten,
    Graph,
    Identity,
    Layer,
    Node,
    Norm,
    Op,
    Opaque,
    Sizes,
    Spatial,
    Tensor,
    Value,
    connect,
    per_channel,
)
from export.fold.report import KeptNorm

Shapes = dict[str, tuple[int | str | None, ...]]
"""Sizes of values by name; a string or None where a size is not fixed."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Exp": torch.exp,
    "Abs": torch.abs,
    "Sqrt": torch.sqrt,
    "Neg": torch.neg,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
}
_BATCHNORM = "BatchNormalization"
_ARITHMETIC = {
    "Cast", "Concat", "ConstantOfShape", "Slice", "Transpose", "Reshape", "Gather", "Unsqueeze", "Squeeze", "Add",
    "Sub", "Mul", "Div", "Shape", "Range", "Expand",
}  # fmt: skip
_MOST_ELEMENTS = 1000
"""Constants computed while the network runs are followed up to this size: paddings and shapes, not weights."""


def read(
    model: ir.Model, shapes: Shapes, example: dict[str, tuple[int, ...]], observed: dict[str, tuple[int, ...]]
) -> Graph:
    """The main graph in the vocabulary of folding.

    `shapes` says what is fixed, `example` gives sizes for one possible input, both by value name, and `observed` those
    that only a run on that input told.
    """
    reader = _Reader(model, shapes, example, observed)
    nodes = [node for ir_node in model.graph for node in [reader.node(ir_node)] if node is not None]
    kept = reader.kept + [
        KeptNorm(name=_name(node), reason=f"it stands in {where}, and folding works on the main graph")
        for where, inner in _inner_nodes(model)
        for node in inner
        if node.op_type == _BATCHNORM
    ]
    return connect(nodes, kept)


def _inner_nodes(model: ir.Model) -> list[tuple[str, list[ir.Node]]]:
    outer = set(model.graph)
    found = [("a subgraph", [node for node in model.graph.all_nodes() if node not in outer])]
    return found + [(f"the function {f.name}", list(f.all_nodes())) for f in model.functions.values()]


def _name(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


class _Reader:
    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        example: dict[str, tuple[int, ...]],
        observed: dict[str, tuple[int, ...]],
    ) -> None:
        self.shapes, self.example, self.observed = shapes, example | observed, set(observed)
        self.opset = model.graph.opset_imports.get("", 0)
        self.values: dict[ir.Value, Value] = {}
        self.arrays: dict[ir.Value, np.ndarray | None] = {}
        self.doubtful: set[ir.Value | None] = set()  # sizes on which shape inference and runtimes differ
        self.kept: list[KeptNorm] = []
        self.absorbed: set[ir.Node] = set()  # nodes that are part of another one's operation
        for value in model.graph.inputs:
            if value.const_value is None:
                self._value(value).pinned = "an input of the network"
        self.outputs = set(model.graph.outputs)

    # -- values and nodes

    def _value(self, value: ir.Value) -> Value:
        if value not in self.values:
            name = value.name or ""
            declared = self.shapes.get(name)
            example = self.example.get(name, ())
            if declared is None or value in self.doubtful:
                declared = (None,) * len(example)
            fixed = tuple(isinstance(size, int) for size in declared)
            self.values[value] = Value(name, self.example.get(name), fixed, origin=value)
        return self.values[value]

    def node(self, ir_node: ir.Node) -> Node | None:
        if ir_node in self.absorbed or (ir_node.op_type == "Constant" and ir_node.domain == ""):
            return None
        if self._rounds_up(ir_node) or any(value in self.doubtful for value in ir_node.inputs):
            self.doubtful |= set(ir_node.outputs)
        op, read, own_outputs, origin = self._operation(ir_node)
        outputs = list(ir_node.outputs) if own_outputs is None else own_outputs
        if not isinstance(op, Opaque | Sizes):
            self._infer(op, read, outputs)
        for output in outputs:
            if output in self.outputs:
                self._value(output).pinned = "an output of the network"
        return Node(_name(ir_node), op, [self._value(v) for v in read], [self._value(v) for v in outputs], origin)

    def _rounds_up(self, node: ir.Node) -> bool:
        """Whether the node pools over a padded border with ceil_mode.

        Some count a last window that lies in the padding alone, as ONNX's shape inference does, and some don't, as
        torch and onnxruntime.
        """
        return (
            node.op_type in ("MaxPool", "AveragePool")
            and bool(_int(node, "ceil_mode", 0))
            and any(_ints(node, "pads", []))
        )

    def _infer(self, op: Op, read: list[ir.Value], outputs: list[ir.Value]) -> None:
        """Sizes that shape inference did not find, behind a padding that is computed, say."""
        name = outputs[0].name or ""
        inputs = [self.example.get(value.name or "") for value in read]
        known = name in self.example and name not in self.observed  # a run tells sizes, but not whether they are fixed
        if known or any(shape is None for shape in inputs):
            return
        result = tuple(op.evaluate(*(torch.zeros(shape or (), dtype=torch.float64) for shape in inputs)).shape)
        declared = [self.shapes.get(value.name or "", (None,)) for value in read]
        fixed = all(isinstance(size, int) for sizes in declared for size in sizes[1:])
        self.example[name] = result
        self.shapes[name] = (declared[0][0], *result[1:]) if fixed else (None,) * len(result)

    def _operation(self, node: ir.Node) -> tuple[Op, list[ir.Value], list[ir.Value] | None, tuple[ir.Node, ...]]:
        """The operation, the values it reads and makes (None: the node's own), and the ONNX nodes it stands for."""
        opaque = Opaque(node.op_type), self._everything(node), None, (node,)
        if node.domain not in ("", "ai.onnx") or any(isinstance(a.value, ir.Graph) for a in node.attributes.values()):
            return opaque
        if node.op_type == _BATCHNORM:
            norm = self._norm(node)
            return (norm, [_input(node, 0)], [node.outputs[0]], (node,)) if norm is not None else opaque
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._layer(node) or opaque
        if node.op_type == "Sigmoid" and (product := self._silu(node)) is not None:
            self.absorbed.add(product)
            return Elementwise("silu", F.silu), [_input(node, 0)], list(product.outputs), (node, product)
        if node.op_type == "Concat":
            rank = self._rank(node.outputs[0])
            if rank is not None and node.attributes["axis"].as_int() % rank == 1 and all(map(self._flows, node.inputs)):
                return Concat(), [v for v in node.inputs if v is not None], None, (node,)
            return opaque
        if node.op_type in ("Add", "Sum") and len(node.inputs) == 2 and all(map(self._flows, node.inputs)):
            first, second = node.inputs
            if first is not None and second is not None and self._same_shape(first, second):
                return Add(), [first, second], None, (node,)
            return opaque
        x = node.inputs[0] if len(node.inputs) else None
        if node.op_type == "Shape" and x is not None and self._flows(x):
            return Sizes(), [x], None, (node,)
        # A shape may be computed while the network runs; every other operand must be constant.
        operands = [] if node.op_type == "Reshape" else node.inputs[1:]
        if x is None or not self._flows(x) or any(self._flows(v) for v in operands) or self._extra_outputs(node):
            return opaque
        if node.op_type in _FUNCTIONS:
            function = _FUNCTIONS[node.op_type]
            op: Op | None = Elementwise(node.op_type.lower(), function, homogeneous=node.op_type == "Relu")
        else:
            read_as = _OF_ONE_VALUE.get(node.op_type)
            op = read_as(self, node) if read_as is not None else None
        return (op, [x], [node.outputs[0]], (node,)) if op is not None else opaque

    def _everything(self, node: ir.Node) -> list[ir.Value]:
        """All values that the node or its subgraphs read, constants left out."""
        read = [value for value in node.inputs if self._flows(value)]
        for attribute in node.attributes.values():
            graphs = [attribute.value] if isinstance(attribute.value, ir.Graph) else []
            graphs += (
                [g for g in attribute.value if isinstance(g, ir.Graph)]
                if isinstance(attribute.value, tuple | list)
                else []
            )
            for graph in graphs:
                inner = set(graph.all_nodes())
                for other in inner:
                    read += [v for v in other.inputs if v is not None and self._flows(v) and v in self.values]
                read += [v for v in graph.outputs if v in self.values]
        return [value for value in read if value is not None]

    def _flows(self, value: ir.Value | None) -> bool:
        """Whether the value depends on the network's input, as far as can be seen."""
        return value is not None and self._array(value) is None

    def _array(self, value: ir.Value | None) -> np.ndarray | None:
        """A constant's elements: an initializer that no caller can override, or a Constant node's value."""
        # Exporters that store equal tensors once hand them on through Identity.
        while value is not None and (producer := value.producer()) is not None and producer.op_type == "Identity":
            value = producer.inputs[0]
        if value is None or value.is_graph_input():
            return None
        if value not in self.arrays:
            tensor = ir.convenience.get_const_tensor(value)
            self.arrays[value] = self._computed(value) if tensor is None else np.asarray(tensor.numpy())
        return self.arrays[value]

    def _computed(self, value: ir.Value) -> np.ndarray | None:
        """What a short chain of operations on constants makes: exporters compute paddings and shapes like that."""
        node = value.producer()
        if node is None or node.domain or not node.inputs or node.op_type not in _ARITHMETIC or len(node.outputs) != 1:
            return None
        arrays = [None if v is None else self._array(v) for v in node.inputs]
        if any(a is None and v is not None for a, v in zip(arrays, node.inputs, strict=True)):
            return None
        if sum(a.size for a in arrays if a is not None) > _MOST_ELEMENTS:
            return None
        names = [f"i{index}" if v is not None else "" for index, v in enumerate(node.inputs)]
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.append("o")
        feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ]
        graph = helper.make_graph([proto], "constant", inputs, [helper.make_empty_tensor_value_info("o")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        (result,) = list(ReferenceEvaluator(model).run(None, feeds))
        return np.asarray(result)

    def _floats(self, value: ir.Value | None) -> Tensor | None:
        array = self._array(value)
        if array is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.float64)))

    def _rank(self, value: ir.Value) -> int | None:
        shape = self.example.get(value.name or "")
        return None if shape is None else len(shape)

    def _same_shape(self, one: ir.Value, other: ir.Value) -> bool:
        """Equal in general: the same fixed sizes or symbols, and no size unknown."""
        a, b = self.shapes.get(one.name or ""), self.shapes.get(other.name or "")
        if a is not None and a == b and None not in a:
            return True
        # Sizes that shape inference left open: equal in the example, and at least the channels are fixed and equal.
        x, y = self.example.get(one.name or ""), self.example.get(other.name or "")
        return x is not None and x == y and len(x) > 1 and 1 not in x[1:]

    def _extra_outputs(self, node: ir.Node) -> bool:
        """Whether something reads a second output (a mask, indices)."""
        return any(output.uses() or output in self.outputs for output in node.outputs[1:])

    # -- BatchNorm and layers

    def _norm(self, node: ir.Node) -> Norm | None:
        gamma, beta, mean, var = (self._floats(_maybe(node, i)) for i in range(1, 5))
        training = _int(node, "training_mode", 0) or (self.opset < 14 and self._extra_outputs(node))
        reason = None
        if training or self._extra_outputs(node):
            reason = "it normalises by the statistics of the batch, so it is not a fixed scale and shift"
        elif gamma is None or beta is None or mean is None or var is None:
            overridable = any(v is not None and v.is_graph_input() for v in node.inputs[1:])
            reason = (
                "its parameters are inputs of the network, which a caller may override"
                if overridable
                else "its parameters are computed while the network runs"
            )
        elif self.opset < 7 or _int(node, "spatial", 1) != 1:
            reason = (
                "it is an old form of BatchNormalization that folding does not read (opset below 7, or not spatial)"
            )
        if reason is not None or gamma is None or beta is None or mean is None or var is None:
            self.kept.append(KeptNorm(name=_name(node), reason=reason or "its parameters are not constant"))
            return None
        return Norm(*algebra.affine(gamma, beta, mean, var, _float(node, "epsilon", 1e-5)))

    def _layer(self, node: ir.Node) -> tuple[Op, list[ir.Value], list[ir.Value] | None, tuple[ir.Node, ...]] | None:
        x, weight_value = _input(node, 0), _maybe(node, 1)
        weight = self._floats(weight_value)
        if not self._flows(x) or weight is None or weight_value is None:
            return None
        bias_value = _maybe(node, 2)
        bias = self._floats(bias_value)
        if bias_value is not None and bias is None:
            return None
        nodes: tuple[ir.Node, ...] = (node,)
        outputs = list(node.outputs)
        if node.op_type in ("Gemm", "MatMul"):
            if weight.dim() != 2 or self._rank(x) is None:
                return None
            if node.op_type == "Gemm":
                if _int(node, "transA", 0) or _float(node, "alpha", 1.0) != 1 or _float(node, "beta", 1.0) != 1:
                    return None
                weight = weight if _int(node, "transB", 0) else weight.T
                if bias is not None:
                    if bias.numel() not in (1, weight.shape[0]):
                        return None
                    bias = bias.reshape(-1).expand(weight.shape[0])
            else:
                weight = weight.T
                addition = self._bias_after(node, weight.shape[0])
                if addition is not None:
                    added, bias, bias_value = addition
                    self.absorbed.add(added)
                    nodes, outputs = (node, added), list(added.outputs)
            layer = Layer(weight, bias, 0, shared=self._shared(weight_value))
            return layer, [x], outputs, nodes
        rank = weight.dim() - 2
        if self._rank(x) != rank + 2 or rank not in (1, 2, 3):
            return None
        stride, dilation = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
        transposed = node.op_type == "ConvTranspose"
        if transposed and ("output_shape" in node.attributes or _string(node, "auto_pad", "NOTSET") != "NOTSET"):
            return None
        padding = self._padding(node, x, list(weight.shape[2:]), stride, dilation)
        if padding is None:
            return None
        layer = Layer(
            weight,
            bias,
            rank,
            tuple(stride),
            padding,
            tuple(dilation),
            _int(node, "group", 1),
            transposed,
            tuple(_ints(node, "output_padding", [0] * rank)) if transposed else (),
            self._shared(weight_value),
        )
        return layer, [x], outputs, nodes

    def _bias_after(self, node: ir.Node, channels: int) -> tuple[ir.Node, Tensor, ir.Value] | None:
        """The Add of a constant vector that alone reads a MatMul: its bias."""
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0] in self.outputs:
            return None
        added = uses[0].node
        if added.op_type != "Add" or added.domain or added.graph is not node.graph:
            return None
        other = added.inputs[1 - uses[0].idx]
        constant = self._floats(other)
        if (
            other is None
            or constant is None
            or constant.numel() != channels
            or constant.dim() > 2
            or constant.shape[-1] != channels
        ):
            return None
        return added, constant.reshape(-1), other

    def _shared(self, weight: ir.Value) -> bool:
        return len(weight.uses()) > 1 or weight in self.outputs

    def _padding(
        self, node: ir.Node, x: ir.Value, kernel: list[int], stride: list[int], dilation: list[int]
    ) -> tuple[tuple[int, int], ...] | None:
        """Zeros before and after each spatial dimension, or None where they depend on a size that is not fixed."""
        rank = len(kernel)
        mode = _string(node, "auto_pad", "NOTSET")
        if mode == "NOTSET":
            pads = _ints(node, "pads", [0] * 2 * rank)
            return tuple((pads[i], pads[i + rank]) for i in range(rank)) if min(pads, default=0) >= 0 else None
        if mode == "VALID":
            return ((0, 0),) * rank
        sizes = self.shapes.get(x.name or "")
        found = []
        for axis in range(rank):
            reach = dilation[axis] * (kernel[axis] - 1)
            size = sizes[axis + 2] if sizes is not None and len(sizes) == rank + 2 else None
            if stride[axis] == 1:
                total = reach
            elif isinstance(size, int):
                total = max((math.ceil(size / stride[axis]) - 1) * stride[axis] + reach + 1 - size, 0)
            else:
                return None
            half = total // 2
            found.append((half, total - half) if mode == "SAME_UPPER" else (total - half, half))
        return tuple(found)

    # -- operations on one value, see _OF_ONE_VALUE

    def _silu(self, node: ir.Node) -> ir.Node | None:
        """The product x · sigmoid(x) that alone reads the sigmoid, as SiLU is written before opset 24."""
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0] in self.outputs:
            return None
        product: ir.Node = uses[0].node
        if product.op_type == "Mul" and not product.domain and product.inputs[1 - uses[0].idx] is node.inputs[0]:
            return product
        return None

    def _identity(self, node: ir.Node) -> Op:
        return Identity()

    def _dropout(self, node: ir.Node) -> Op | None:
        training = self._array(_maybe(node, 2))
        if _maybe(node, 2) is not None and (training is None or bool(training)):
            return None
        return Identity()

    def _leakyrelu(self, node: ir.Node) -> Op:
        slope = _float(node, "alpha", 0.01)
        return Elementwise("leaky_relu", lambda x: F.leaky_relu(x, slope), homogeneous=True)

    def _elu(self, node: ir.Node) -> Op:
        alpha = _float(node, "alpha", 1.0)
        return Elementwise("elu", lambda x: F.elu(x, alpha))

    def _hardsigmoid(self, node: ir.Node) -> Op:
        alpha, beta = _float(node, "alpha", 0.2), _float(node, "beta", 0.5)
        return Elementwise("hardsigmoid", lambda x: torch.clamp(alpha * x + beta, 0, 1))

    def _gelu(self, node: ir.Node) -> Op:
        approximate = _string(node, "approximate", "none")
        return Elementwise("gelu", lambda x: F.gelu(x, approximate=approximate))

    def _clip(self, node: ir.Node) -> Op | None:
        if self.opset < 11:
            low, high = _float(node, "min", -math.inf), _float(node, "max", math.inf)
        else:
            bounds = [self._floats(_maybe(node, i)) for i in (1, 2)]
            if any(_maybe(node, i) is not None and bounds[i - 1] is None for i in (1, 2)):
                return None
            low, high = (
                default if b is None else float(b) for b, default in zip(bounds, (-math.inf, math.inf), strict=True)
            )
        if (low, high) == (0.0, math.inf):
            return Elementwise("relu", F.relu, homogeneous=True)
        return Elementwise("clip", lambda x: x.clamp(low, high))

    def _maxpool(self, node: ir.Node) -> Op | None:
        return self._pool(node, maximum=True)

    def _averagepool(self, node: ir.Node) -> Op | None:
        return self._pool(node, maximum=False)

    def _pool(self, node: ir.Node, maximum: bool) -> Op | None:
        kernel = _ints(node, "kernel_shape", [])
        rank = len(kernel)
        stride, dilation = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
        padding = self._padding(node, _input(node, 0), kernel, stride, dilation)
        result = self.example.get(node.outputs[0].name or "")
        if padding is None or result is None or rank not in (1, 2, 3):
            return None
        flat = [side for pair in reversed(padding) for side in pair]
        if maximum:

            def largest(x: Tensor) -> Tensor:
                x = F.pad(x, _to_fit(flat, x, result, kernel, stride, dilation), value=-math.inf)
                return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1](x, kernel, stride, 0, dilation)

            return Spatial("MaxPool", largest, linear=False, keeps_constants=True)
        if any(d != 1 for d in dilation):
            return None
        counts = bool(_int(node, "count_include_pad", 0))
        if _int(node, "ceil_mode", 0) and counts:
            return None  # runtimes have not agreed on what the last window is divided by

        def average(x: Tensor) -> Tensor:
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
            fitted = _to_fit(flat, x, result, kernel, stride, dilation)
            total = pool(F.pad(x, fitted), kernel, stride)
            if counts:
                return total
            return total / pool(F.pad(torch.ones_like(x), fitted), kernel, stride)

        return Spatial("AveragePool", average, linear=True, keeps_constants=not counts or not any(flat))

    def _globalaveragepool(self, node: ir.Node) -> Op:
        return Spatial("GlobalAveragePool", lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True), True, True)

    def _globalmaxpool(self, node: ir.Node) -> Op:
        return Spatial("GlobalMaxPool", lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True), False, True)

    def _reducemean(self, node: ir.Node) -> Op | None:
        axes = self._axes(node, 18)
        rank = self._rank(_input(node, 0))
        if not axes or rank is None or any(axis % rank < 2 for axis in axes):
            return None
        keep = bool(_int(node, "keepdims", 1))
        return Spatial("ReduceMean", lambda x: x.mean(tuple(axes), keepdim=keep), linear=True, keeps_constants=True)

    def _axes(self, node: ir.Node, as_input_since: int) -> list[int]:
        if self.opset < as_input_since:
            return _ints(node, "axes", [])
        array = self._array(_maybe(node, 1))
        return [] if array is None else [int(axis) for axis in array.reshape(-1)]

    def _resize(self, node: ir.Node) -> Op | None:
        """Interpolation with weights that sum to 1. Where it samples is not read, so torch's stands in for it."""
        before, after = self.example.get(_input(node, 0).name or ""), self.example.get(node.outputs[0].name or "")
        if before is None or after is None or before[:2] != after[:2] or len(before) not in (3, 4, 5):
            return None
        if _string(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
            return None  # beyond the border stands another constant
        sizes = after[2:]
        return Spatial("Resize", lambda x: F.interpolate(x, sizes), linear=True, keeps_constants=True, stands_in=True)

    def _pad(self, node: ir.Node) -> Op | None:
        rank = self._rank(_input(node, 0))
        if self.opset < 11:
            pads, value = _ints(node, "pads", []), _float(node, "value", 0.0)
        else:
            array, constant = self._array(_maybe(node, 1)), self._array(_maybe(node, 2))
            if array is None or (_maybe(node, 2) is not None and constant is None) or _maybe(node, 3) is not None:
                return None
            pads, value = [int(side) for side in array], 0.0 if constant is None else float(constant)
        mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(
            _string(node, "mode", "constant")
        )
        if (
            rank is None
            or len(pads) != 2 * rank
            or rank < 3
            or any((*pads[:2], *pads[rank : rank + 2]))
            or mode is None
        ):
            return None
        if min(pads) < 0 or (mode == "constant" and value):
            return None
        flat = [side for axis in reversed(range(2, rank)) for side in (pads[axis], pads[axis + rank])]
        return Spatial(f"{mode} pad", lambda x: F.pad(x, flat, mode), linear=True, keeps_constants=mode != "constant")

    def _flatten(self, node: ir.Node) -> Op | None:
        sizes = self.shapes.get(_input(node, 0).name or "", (None, None))
        return Flatten() if _int(node, "axis", 1) == 1 and all(isinstance(size, int) for size in sizes[1:]) else None

    def _reshape(self, node: ir.Node) -> Op | None:
        target = self._array(_maybe(node, 1))
        declared = self.shapes.get(node.outputs[0].name or "")
        before = self.shapes.get(_input(node, 0).name or "")
        if target is None:
            return self._reshaped(node, any_channels=False)
        keeps_batch = target[:1] == [0] and not _int(node, "allowzero", 0)
        if not keeps_batch and (not declared or not before or declared[0] is None or declared[0] != before[0]):
            return None
        return self._reshaped(node, any_channels=keeps_batch and len(target) == 2 and target[1] == -1)

    def _squeeze(self, node: ir.Node) -> Op | None:
        return self._reshaped(node, any_channels=True)

    def _unsqueeze(self, node: ir.Node) -> Op | None:
        return self._reshaped(node, any_channels=True)

    def _reshaped(self, node: ir.Node, any_channels: bool) -> Op | None:
        """A reshape that keeps the channels apart; equal leading sizes prove it, since the order of elements stays."""
        before, after = self.example.get(_input(node, 0).name or ""), self.example.get(node.outputs[0].name or "")
        fixed = self.shapes.get(_input(node, 0).name or "")
        if (
            before is None
            or after is None
            or len(before) < 2
            or len(after) < 2
            or before[0] != after[0]
            or fixed is None
        ):
            return None
        if not all(isinstance(size, int) for size in fixed[1:]):
            return None
        if before[1] == after[1]:
            tail = after[2:]
            return Spatial(
                node.op_type,
                lambda x: x.reshape(*x.shape[:2], *tail),
                linear=True,
                keeps_constants=True,
                any_channels=any_channels,
            )
        if len(after) == 2 and after[1] == math.prod(before[1:]):
            return Flatten(any_channels)
        return None


_OF_ONE_VALUE: dict[str, Callable[[_Reader, ir.Node], Op | None]] = {
    "Identity": _Reader._identity,
    "Dropout": _Reader._dropout,
    "LeakyRelu": _Reader._leakyrelu,
    "Elu": _Reader._elu,
    "HardSigmoid": _Reader._hardsigmoid,
    "Gelu": _Reader._gelu,
    "Clip": _Reader._clip,
    "MaxPool": _Reader._maxpool,
    "AveragePool": _Reader._averagepool,
    "GlobalAveragePool": _Reader._globalaveragepool,
    "GlobalMaxPool": _Reader._globalmaxpool,
    "ReduceMean": _Reader._reducemean,
    "Resize": _Reader._resize,
    "Upsample": _Reader._resize,
    "Pad": _Reader._pad,
    "Flatten": _Reader._flatten,
    "Reshape": _Reader._reshape,
    "Squeeze": _Reader._squeeze,
    "Unsqueeze": _Reader._unsqueeze,
}


def _to_fit(
    flat: list[int],
    x: Tensor,
    result: tuple[int, ...],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The padding, with what `ceil_mode` adds behind so that `result`'s sizes come out; `flat` as F.pad takes it."""
    fitted = list(flat)
    rank = len(kernel)
    for axis in range(rank):
        at = 2 * (rank - 1 - axis)
        needed = (result[axis + 2] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        missing = needed - (x.shape[axis + 2] + fitted[at] + fitted[at + 1])
        fitted[at + 1] += max(missing, 0)
    return fitted


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _maybe(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def _string(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The value's type, or that of the first floating-point value on the way back that states its own."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        constant = ir.convenience.get_const_tensor(current)
        dtype = current.dtype or (constant.dtype if constant is not None else None)
        if dtype is not None and dtype.is_floating_point():
            return dtype
        producer = current.producer()
        if producer is not None and producer not in seen:
            seen.add(producer)
            pending += [v for v in producer.inputs if v is not None]
    return None


# -- back to ONNX ----------------------------------------------------------------------------------------------------


def write(model: ir.Model, graph: Graph) -> None:
    """Put the folds into `model`, the one that `graph` was read from."""
    writer = _Writer(model)
    for value in (value for node in graph.nodes for value in node.outputs):
        written = value.origin
        if (
            isinstance(written, ir.Value)
            and written.shape is not None
            and value.shape is not None
            and len(value.shape) > 1
        ):
            sizes = list(written.shape)
            if isinstance(sizes[1], int) and sizes[1] != value.shape[1]:  # it has got a channel of ones
                written.shape = ir.Shape([sizes[0], value.shape[1], *sizes[2:]])
    for node in graph.nodes:
        if node.op is not node.read_as:
            writer.node(node)
    writer.finish()


class _Writer:
    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.taken = {value.name for node in self.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value}
        self.taken |= set(self.graph.initializers) | {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        self.replaced: set[ir.Value] = set()

    def node(self, node: Node) -> None:
        origin = node.origin
        assert isinstance(origin, tuple)
        op = node.op
        if isinstance(op, Identity):
            self._remove(origin[0])
        elif isinstance(op, Layer):
            self._layer(origin, op)
        elif isinstance(op, Clamp):
            self._clamp(origin[0], op, len(node.output.shape or ()))
        elif isinstance(op, Norm):
            self._norm(origin[0], op)

    def finish(self) -> None:
        """Drop the constants that nothing reads any more."""
        for value in self.replaced:
            producer = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            if producer is not None:
                self.graph.remove(producer, safe=True)
            elif value.name in self.graph.initializers and not value.is_graph_input():
                del self.graph.initializers[str(value.name)]

    def _remove(self, node: ir.Node) -> None:
        before, after = _input(node, 0), node.outputs[0]
        name = after.name
        self.replaced |= {value for value in node.inputs[1:] if value is not None}
        output = after.is_graph_output()
        ir.convenience.replace_all_uses_with(after, before, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        if output:  # the network's output keeps its name and its declaration
            before.name, before.type, before.shape = name, after.type, after.shape
            before.metadata_props.update(after.metadata_props)

    def _layer(self, origin: tuple[ir.Node, ...], op: Layer) -> None:
        node = origin[0]
        old_weight = _input(node, 1)
        like = old_weight.dtype
        weight = op.weight
        if op.rank == 0 and not (node.op_type == "Gemm" and _int(node, "transB", 0)):
            weight = weight.T
        node.replace_input_with(1, self._constant(old_weight.name or f"{_name(node)}_weight", weight, like, old_weight))
        if op.bias is None:
            return
        if node.op_type == "MatMul" or op.bias.dim() > 1:
            self._added_bias(origin, op, like)
            return
        old_bias = _maybe(node, 2)
        stem = (old_bias.name if old_bias is not None else None) or f"{old_weight.name}_bias"
        bias = self._constant(stem, op.bias, like, old_bias)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias)

    def _added_bias(self, origin: tuple[ir.Node, ...], op: Layer, like: ir.DataType | None) -> None:
        """A bias as an Add of its own: what a MatMul needs, and what a bias map is."""
        assert op.bias is not None
        node, last = origin[0], origin[-1]
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # a convolution whose bias is now part of the map
            self.replaced.add(node.inputs[2])
            node.resize_inputs(2)
        if len(origin) == 2:  # MatMul and the Add behind it
            index = next(i for i, value in enumerate(last.inputs) if value is not node.outputs[0])
            old = last.inputs[index]
            last.replace_input_with(index, self._constant((old.name if old else None) or "bias", op.bias, like, old))
            return
        constant = op.bias.unsqueeze(0) if op.bias.dim() > 1 else op.bias
        self._insert_after(node, "Add", self._constant(f"{_name(node)}_bias_map", constant, like, None))

    def _insert_after(self, node: ir.Node, op_type: str, constant: ir.Value) -> ir.Node:
        """op_type(node's output, constant), read by everything that read the node's output."""
        output = node.outputs[0]
        added = ir.Node("", op_type, [output, constant], name=self._free(f"{_name(node)}_{op_type.lower()}"))
        result = added.outputs[0]
        result.type, result.shape = output.type, output.shape
        named = output.name
        is_output = output.is_graph_output()
        users = list(output.uses())
        for user, index in users:
            if user is not added:
                user.replace_input_with(index, result)
        if is_output:
            for index, value in enumerate(self.graph.outputs):
                if value is output:
                    self.graph.outputs[index] = result
        result.name = self._free(f"{named}_{op_type.lower()}")
        if is_output:
            output.name = self._free(f"{named}_before")
            result.name = named
        self.graph.insert_after(node, added)
        return added

    def _clamp(self, node: ir.Node, op: Clamp, rank: int) -> None:
        """A maximum, and a minimum where there is one, in the place of a ReLU."""
        like = _dtype(_input(node, 0))
        wanted = [(t, b) for t, b in (("Max", op.low), ("Min", op.high)) if torch.isfinite(b).any()]
        last = node
        for op_type, bound in wanted:
            finite = bound.clamp(-3.0e38, 3.0e38) if like == ir.DataType.FLOAT else bound
            constant = self._constant(f"{_name(node)}_{op_type.lower()}", per_channel(finite, rank), like, None)
            last = self._insert_after(last, op_type, constant)
        self._remove(node)

    def _norm(self, node: ir.Node, op: Norm) -> None:
        eps = _float(node, "epsilon", 1e-5)
        # A BatchNorm of zero mean and unit variance, of which epsilon is a part.
        parts = (op.scale, op.shift, torch.zeros_like(op.scale), torch.full_like(op.scale, 1 - eps))
        for index, part in enumerate(parts, start=1):
            old = _input(node, index)
            node.replace_input_with(index, self._constant(old.name or f"{_name(node)}_{index}", part, old.dtype, old))

    def _constant(self, stem: str, tensor: Tensor, like: ir.DataType | None, old: ir.Value | None) -> ir.Value:
        """A new initializer, which takes the place of `old`."""
        dtype = like or ir.DataType.FLOAT
        array = tensor.contiguous().numpy().astype(dtype.numpy())
        if old is not None:
            self.replaced.add(old)
        name = self._free(f"{stem}_folded")
        value = ir.Value(
            name=name,
            type=ir.TensorType(dtype),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, dtype=dtype, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def _free(self, stem: str) -> str:
        name, number = stem, 1
        while name in self.taken:
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name)
        return name

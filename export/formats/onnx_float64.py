"""An ONNX file computed in float64: the truth of a bundle that is made from a file.

Owns how a file becomes one that computes in float64, and running it. Knows nothing of folding, and of a bundle nothing.

The file is read as ONNX's own reference implementation reads it, with every float32 number in it widened to float64,
which is exact, and every cast to float32 made one to float64. What the reference computes slowly, or in float32
whatever it is given, torch computes (`export.formats.onnx_layers64`). Four images of ResNet-18 (224x224, two AVX-512
cores): 4.0 s by the reference alone, of which its pool takes 2.5 s and its convolutions 1.4 s; 0.39 s like this; 0.25 s
by the torch module that the file was exported from, in float64, which differs by 1.5e-12 of the largest logit: a file
keeps the epsilon of a BatchNorm in float32. onnxruntime has no convolution in float64 on the CPU (1.31,
NOT_IMPLEMENTED).

The reference implementation has faults too: whoever takes its word should see that onnxruntime's in float32 differs by
no more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.bundle import Arrays
from export.formats.onnx_layers64 import LAYERS

TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "stash_type")
"""Attributes that name a type of numbers."""

IN_FLOAT32 = frozenset({"AffineGrid", "GridSample", "CausalConvWithState", "LinearAttention", "DeformConv"})
"""Operators that the reference implementation computes in float32 at some point (onnx 1.23), or so slowly that nobody
would wait for it."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


class NotComputable(Exception):
    """A file that can't be computed in float64; the message says which node, and why."""


class Float64File:
    """The file as a function in float64. Raises NotComputable where it has an operator that can't be computed."""

    def __init__(self, path: Path) -> None:
        model = widened(onnx.load(str(path)))
        for node in all_nodes(model):
            if node.domain in ("", "ai.onnx") and node.op_type in IN_FLOAT32 | RANDOM:
                why = "is random" if node.op_type in RANDOM else "has no implementation in float64"
                raise NotComputable(f"{_named(node)} {why}")
        try:
            self._evaluator = ReferenceEvaluator(model, new_ops=list(LAYERS))
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise NotComputable(_first_line(error)) from error
        inits = self._evaluator.rt_inits_
        for name, values in inits.items():  # torch takes no array that can't be written to
            inits[name] = np.array(values) if isinstance(values, np.ndarray) else values
        self._outputs = [value.name for value in model.graph.output]
        initialised = {tensor.name for tensor in model.graph.initializer}
        (self._input,) = (value.name for value in model.graph.input if value.name not in initialised)
        self._done_with = _last_uses(model.graph, {value.name for value in model.graph.output})

    def __call__(self, inputs: np.ndarray) -> Arrays:
        """Model inputs [N, …] of any float type → its outputs, float64 or whole numbers. Raises NotComputable.

        A value is forgotten after its last use: of a large network not all of them fit into memory.
        """
        values: dict[str, Any] = {"": None, **self._evaluator.rt_inits_, self._input: inputs.astype(np.float64)}
        with np.errstate(all="ignore"):
            for node, over in zip(self._evaluator.rt_nodes_, self._done_with, strict=True):
                context = {"context": values} if node.need_context() else {}
                try:
                    made = node.run(*(values[name] for name in node.input), **context)
                except Exception as error:  # each operator raises its own
                    raise NotComputable(f"{_named(node.onnx_node)}: {_first_line(error)}") from error
                for name, value in zip(node.output, made, strict=False):
                    if isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float16):
                        raise NotComputable(f"{_named(node.onnx_node)} was computed in {value.dtype}, not in float64")
                    values[name] = value
                for name in over:
                    values.pop(name, None)
        return tuple(np.asarray(values[name]) for name in self._outputs)


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with float64 in the place of float32, everywhere. The argument is changed."""
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(value.type)
        for tensor in graph.initializer:
            _widen(tensor)
        for sparse in graph.sparse_initializer:
            _widen(sparse.values)
    for node in all_nodes(model):
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
        if node.op_type == "ConstantOfShape" and not node.attribute:  # which would be zeros of float32
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1), "zero")))
    return model


def _widen_attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    for tensor in (attribute.t, *attribute.tensors, attribute.sparse_tensor.values):
        if tensor.data_type == TensorProto.FLOAT:
            _widen(tensor)
    if attribute.name in TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT:
        attribute.i = TensorProto.DOUBLE
    if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        numbers = np.float64(attribute.f) if attribute.name == "value_float" else np.array(attribute.floats, np.float64)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.asarray(numbers), "value")))


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.tensor_type.elem_type == TensorProto.FLOAT:
        kind.tensor_type.elem_type = TensorProto.DOUBLE


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model, those inside of others and of its functions too."""

    def within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    yield from within(inner.node)

    yield from within(model.graph.node)
    for function in model.functions:
        yield from within(function.node)


def _last_uses(graph: onnx.GraphProto, kept: set[str]) -> list[list[str]]:
    """For each node the values that none after it reads, also inside of another; what is `kept` is read to the end."""
    constants = {tensor.name for tensor in graph.initializer}
    last: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        inside = [
            name
            for attribute in node.attribute
            for inner in (attribute.g, *attribute.graphs)
            for nested in _graphs(inner)
            for read in nested.node
            for name in read.input
        ]
        outputs = [value.name for a in node.attribute for inner in (a.g, *a.graphs) for value in inner.output]
        for name in (*node.input, *node.output, *inside, *outputs):
            last[name] = place
    over: list[list[str]] = [[] for _ in graph.node]
    for name, place in last.items():
        if name and name not in kept and name not in constants:
            over[place].append(name)
    return over


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

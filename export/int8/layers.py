"""The integer layers of an ONNX file as onnxruntime runs it: which nodes multiply 8-bit numbers, and in which order.

Owns reading them from the graph that onnxruntime makes of a file. The order of a convolution's products is that of
onnxruntime's kernels on x86: it puts the channels last, so that a row of weights goes position by position through the
kernel, with the channels of each position side by side. Convolutions with one channel in and out for each group have a
kernel of their own, which multiplies in more than 16 bits.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.formats.onnx_session import open_session
from export.int8.pairs import can_saturate

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Before they are quantised."""
WEIGHTS = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "MatMulIntegerToFloat": 1, "ConvInteger": 1}
WEIGHTS |= {"MatMulInteger": 1, "DynamicQuantizeMatMul": 1}
"""Where the weights stand among the inputs, by the operator."""


@dataclass(frozen=True)
class IntegerLayer:
    """A node that multiplies 8-bit activations by constant 8-bit weights.

    `rows` are the weights, int8 or uint8 [channels, K], in the order in which a kernel on x86 reads them; `direct`: by
    a kernel that does not add up in 16 bits. `saturating`, bool [channels, ⌈K/2⌉], are the pairs that can leave those.
    """

    name: str
    node: onnx.NodeProto
    rows: np.ndarray
    direct: bool

    @functools.cached_property
    def saturating(self) -> np.ndarray:
        found = can_saturate(self.rows)
        return found if self.rows.dtype == np.int8 and not self.direct else np.zeros_like(found)


def optimised(path: Path) -> onnx.ModelProto:
    """The graph that onnxruntime makes of a file, before it chooses layouts for this machine."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 4  # it warns that such a file is for this machine
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def integer_layers(model: onnx.ModelProto) -> Iterator[IntegerLayer]:
    """Those of a graph that `optimised` made, in its order."""
    constants = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        place = WEIGHTS.get(node.op_type)
        if place is None or len(node.input) <= place or node.input[place] not in constants:
            continue
        rows, _, direct = rows_of(node, numpy_helper.to_array(constants[node.input[place]]))
        if rows is not None:
            yield IntegerLayer(node.name, node, rows, direct)


def rows_of(node: onnx.NodeProto, weights: np.ndarray) -> tuple[np.ndarray | None, int, bool]:
    """A layer's weights as rows [channels, K], which of their dimensions the channels are, and whether it is `direct`.

    None where they are no matrix and no filters.
    """
    if "Conv" in node.op_type:
        if "Transpose" in node.op_type:  # onnxruntime has none of integers
            return None, 1, False
        groups = int(attribute(node, "group", 1))
        rows = np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
        return rows, 0, weights.shape[1] == 1 == len(weights) // groups
    if weights.ndim != 2:
        return None, weights.ndim - 1, False
    transposed = bool(attribute(node, "transB", 0))
    return (weights, 0, False) if transposed else (weights.T, 1, False)


def multiply_adds(model: onnx.ModelProto, example: np.ndarray) -> dict[str, int]:
    """How many products the layers of a model in float add up for `example`, its input, by the names of their nodes.

    Of those with constant weights; each output adds up as many as a row of the weights has.
    """
    constants = {each.name: each for each in model.graph.initializer}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    rows = {}
    for node in model.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants:
            found, _, _ = rows_of(node, numpy_helper.to_array(constants[node.input[1]]))
            if found is not None:
                rows[node.name] = found.shape[1]
                watched.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    if not rows:
        return {}
    session = open_session(watched.SerializeToString())
    outputs = session.run(None, {session.get_inputs()[0].name: example})
    return {name: length * output.size for (name, length), output in zip(rows.items(), outputs, strict=True)}


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or what it is where it isn't given."""
    return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)

"""The layers of a float file that onnxruntime will compute in integers: their scales, and what rounding does to them.

Owns the scales of weights and the correction of biases, on a graph as onnxruntime prepares it for quantising.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.bundle.rows import Rows
from export.formats.onnx_session import open_session
from export.int8.layers import LAYERS, attribute, rows_of
from export.int8.pairs import LARGEST_WEIGHT, safe_scales, worst_pairs

BATCH = 20
AXES_AS_INPUT = 18
"""The opset from which ReduceMean takes its axes as an input."""
"""Inputs at a time: feature maps of many at once are large."""


@dataclass(frozen=True)
class Layer:
    """A layer that is to be quantised: its node, its weights as rows [channels, K], the scale of each row, float32
    [channels], and which dimension of the weights counts the channels.
    """

    node: onnx.NodeProto
    weights: np.ndarray
    rows: np.ndarray
    scales: np.ndarray
    axis: int

    def overrides(self) -> list[dict[str, Any]]:
        """The scales as onnxruntime takes them."""
        return [{"axis": self.axis, "scale": scale, "zero_point": np.int8(0)} for scale in self.scales]

    def rounded_off(self) -> np.ndarray:
        """What quantising takes from the weights, float32 in their own shape."""
        shape = [1] * self.weights.ndim
        shape[self.axis] = -1
        scales = self.scales.reshape(shape)
        whole = np.rint(self.weights / scales).clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        return np.asarray(self.weights - whole * scales, np.float32)


def layers_of(graph: onnx.GraphProto) -> Iterator[Layer]:
    """Those with constant weights that onnxruntime has integer kernels for.

    A scale is a 127th of a channel's largest weight, or the finest with which no two weights of a channel can saturate,
    whatever order a kernel takes them in.
    """
    constants = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if node.op_type not in LAYERS or node.input[1] not in constants:
            continue
        weights = numpy_helper.to_array(constants[node.input[1]])
        rows, axis, _ = rows_of(node, weights)
        if rows is not None:
            yield Layer(node, weights, rows, safe_scales(worst_pairs(rows)).astype(np.float32), axis)


def shifts(model: onnx.ModelProto, layers: Sequence[Layer], inputs: Rows) -> dict[str, np.ndarray]:
    """By a layer's name, what its mean output over `inputs` loses when its weights are rounded, float32 [channels].

    Computed by the model itself, in which each layer stands once more beside itself with what is rounded off. Of layers
    without a place for a bias there is none.
    """
    layers = [layer for layer in layers if _takes_bias(layer)]
    if not layers:
        return {}
    opset = max(int(used.version) for used in model.opset_import if used.domain in ("", "ai.onnx"))
    beside = onnx.ModelProto()
    beside.CopyFrom(model)
    graph = beside.graph
    del graph.output[:]
    for number, layer in enumerate(layers):
        weights, lost, mean, axes = (f"{what} of layer {number}" for what in ("rounded off", "lost", "mean", "axes"))
        node = onnx.NodeProto()
        node.CopyFrom(layer.node)
        node.name, node.input[1:], node.output[:] = lost, [weights], [lost]
        others = [axis for axis in range(layer.weights.ndim) if axis != 1]  # the channels of the output are second
        graph.initializer.append(numpy_helper.from_array(layer.rounded_off(), weights))
        graph.node.append(node)
        if opset < AXES_AS_INPUT:
            graph.node.append(helper.make_node("ReduceMean", [lost], [mean], axes=others, keepdims=0))
        else:
            graph.initializer.append(numpy_helper.from_array(np.array(others, np.int64), axes))
            graph.node.append(helper.make_node("ReduceMean", [lost, axes], [mean], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(mean, onnx.TensorProto.FLOAT, None))
    session = open_session(beside.SerializeToString(), silent=True)
    name, count = session.get_inputs()[0].name, len(inputs)
    sums = [np.zeros(len(layer.rows)) for layer in layers]
    for start in range(0, count, BATCH):
        batch = np.asarray(inputs[start : start + BATCH])
        for total, found in zip(sums, session.run(None, {name: batch}), strict=True):
            total += len(batch) / count * found
    return {layer.node.name: total.astype(np.float32) for layer, total in zip(layers, sums, strict=True)}


def with_biases(model: onnx.ModelProto, more: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of the model with more bias, [channels], in the layers of these names."""
    corrected = onnx.ModelProto()
    corrected.CopyFrom(model)
    graph = corrected.graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        if node.name not in more:
            continue
        had = constants[node.input[2]].reshape(-1) if len(node.input) > 2 and node.input[2] else np.float32(0)
        name = f"{node.name}_corrected_bias"
        graph.initializer.append(numpy_helper.from_array(np.asarray(had + more[node.name], np.float32), name))
        node.input[2:] = [name]
    used = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return corrected


def _takes_bias(layer: Layer) -> bool:
    """Convolutions, and matrix products with one; what torch.onnx writes has it added as it is."""
    node = layer.node
    return node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "beta", 1.0) == 1.0)

"""The preprocessing in front of an ONNX file, so that it takes the raw input as a user has it.

Owns the nodes that do it; `export.raw_input` does the same for a model of torch, and says why they stand there.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.bundle import Preprocessing, TensorSpec

SUFFIX = "_preprocessed"


def from_raw(model: onnx.ModelProto, preprocessing: Preprocessing, input: TensorSpec) -> onnx.ModelProto:
    """`model`, which is changed: its one input has the raw input's type, and what reads it reads raw · factor - offset.

    The name of the input stays: that of `preprocessing.raw`, whose shape must be the input's.
    """
    graph, name, inner = model.graph, input.name, input.name + SUFFIX
    (value,) = (value for value in graph.input if value.name == name)
    _rename(graph, name, inner)
    axis = (1, -1, *[1] * (len(input.shape) - 2))
    std = np.asarray(preprocessing.std, np.float64).reshape(axis)
    mean = np.asarray(preprocessing.mean, np.float64).reshape(axis)
    numbers = {"factor": preprocessing.scale / std, "offset": mean / std}
    for constant, number in numbers.items():
        graph.initializer.append(numpy_helper.from_array(number.astype(np.float32), f"{name}_{constant}"))
    nodes = [
        helper.make_node("Cast", [name], [f"{name}_float"], f"{name}/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_float", f"{name}_factor"], [f"{name}_scaled"], f"{name}/Mul"),
        helper.make_node("Sub", [f"{name}_scaled", f"{name}_offset"], [inner], f"{name}/Sub"),
    ]
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(preprocessing.raw.dtype))
    return model


def _rename(graph: onnx.GraphProto, name: str, other: str) -> None:
    """Let every node, also inside of others, read `other` instead of `name`."""
    for node in graph.node:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = other
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, name, other)

"""int8 files of one layer, whose integers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def quantised_layer(path: Path, node: onnx.NodeProto, weights: np.ndarray, shape: list[int | str]) -> Path:
    """A file in which `node` reads x, uint8 with scale 1/255 and no zero point, `w`, int8 with scale 1, and a bias."""
    constants = {
        "w": weights.astype(np.int8),
        "x scale": np.float32(1 / 255),
        "w scale": np.float32(1 / 127),
        "y scale": np.float32(0.5),
        "zero": np.uint8(0),
        "w zero": np.int8(0),
        "y zero": np.uint8(128),
    }
    y = node.output[0]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w scale", "w zero"], ["wd"]),
        node,
        helper.make_node("QuantizeLinear", [y, "y scale", "y zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y scale", "y zero"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path

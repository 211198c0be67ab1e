"""An ONNX file in float64: against torch's own float64, and each operator that isn't the reference's against others."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import File
from torch import nn

from export.formats.onnx_float64 import Float64File, NotComputable

WINDOWS = [
    {},
    {"strides": [2, 3]},
    {"pads": [1, 0, 0, 2]},
    {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"dilations": [2, 1], "pads": [2, 2, 2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "VALID"},
]
POOLS = [
    *WINDOWS,
    {"ceil_mode": 1, "strides": [2, 2]},
    {"ceil_mode": 1, "strides": [3, 2], "pads": [1, 1, 1, 1]},
    {"ceil_mode": 1, "strides": [2, 2], "pads": [0, 1, 1, 0]},
]


def of_one(folder: Path, op_type: str, weights: list[np.ndarray], opset: int = 19, **attributes: Any) -> Path:
    """A file of one operator, for images of 2 channels."""
    file = File(opset=opset, ir_version=9)
    x = file.input("x", "n", 2, 9, 11)
    names = [file.constant(array.astype(np.float32)) for array in weights]
    file.output(file.node(op_type, x, *names, **attributes))
    path = folder / "one.onnx"
    path.write_bytes(file.model().SerializeToString())
    return path


def require_as_onnxruntime(path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 9, 11)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    (found,) = Float64File(path)(x)
    assert found.dtype == np.float64
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attributes", "group"), [*itertools.product(WINDOWS, (1, 2))], ids=str)
def test_convolution(tmp_path: Path, attributes: dict[str, Any], group: int) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((4, 2 // group, 3, 2)), rng.standard_normal(4)]
    require_as_onnxruntime(of_one(tmp_path, "Conv", weights, group=group, **attributes))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 3], "pads": [1, 0, 0, 1]},
        {"strides": [2, 2], "output_padding": [1, 0]},
        {"strides": [2, 2], "dilations": [2, 1], "group": 2},
        {"strides": [2, 2], "output_shape": [18, 21]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ],
    ids=str,
)
def test_transposed_convolution(tmp_path: Path, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((2, 4 // attributes.get("group", 1), 3, 3)), rng.standard_normal(4)]
    if "group" in attributes:
        weights[1] = rng.standard_normal(4)
    require_as_onnxruntime(of_one(tmp_path, "ConvTranspose", weights, **attributes))


@pytest.mark.parametrize("attributes", POOLS, ids=str)
def test_maximum(tmp_path: Path, attributes: dict[str, Any]) -> None:
    require_as_onnxruntime(of_one(tmp_path, "MaxPool", [], kernel_shape=[3, 3], **attributes))


@pytest.mark.parametrize(("attributes", "counted"), [*itertools.product(POOLS, (0, 1))], ids=str)
def test_average(tmp_path: Path, attributes: dict[str, Any], counted: int) -> None:
    path = of_one(tmp_path, "AveragePool", [], kernel_shape=[3, 3], count_include_pad=counted, **attributes)
    require_as_onnxruntime(path)


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 19])
def test_a_batchnorm_has_its_own_statistics(tmp_path: Path, opset: int) -> None:
    """onnx's reference, 1.23, takes those of the batch in opsets 9 to 13."""
    file = File(opset=opset, ir_version=8)
    file.output(file.norm(file.input("x", "n", 2, 9, 11), 2, epsilon=0.1))
    require_as_onnxruntime(file.save(tmp_path))


def test_erf_is_not_rounded_to_float32(tmp_path: Path) -> None:
    """onnx's reference, 1.23, gives float64 numbers that were float32."""
    path = of_one(tmp_path, "Erf", [])
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 11)).astype(np.float32)
    (found,) = Float64File(path)(x)
    np.testing.assert_allclose(found, np.vectorize(math.erf)(x.astype(np.float64)), rtol=1e-14)


class Net(nn.Module):
    """What a network for images is made of; no GELU, whose √2 a file holds in float32 where torch has it in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(3, 2, 1))
        self.second = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.Tanh())
        self.third = nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(6, 6, 3, groups=3), nn.Sigmoid())
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.Softmax(1))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x)))
        made: torch.Tensor = self.head(x.mean((2, 3)))
        return made


def test_a_file_is_what_torch_computes_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(3, 3, 20, 24)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # As it is: in eval mode the exporter folds BatchNorms into what comes before, and rounds to float32.
        kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=17, **kept, **names)
    with torch.no_grad():
        wanted = net.double()(x.double()).numpy()
    (found,) = Float64File(path)(x.numpy())
    assert np.abs(found - wanted).max() <= 1e-10 * np.abs(wanted).max()


def test_casts_and_constants_are_widened_also_inside_of_nodes(tmp_path: Path) -> None:
    """1/3 in float32 is not 1/3 in float64; but what was float32 in the file stays the number that it was."""
    third = float(np.float32(1 / 3))
    one = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]

    def branch(factor: float) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Constant", [], ["factor"], value_float=factor),
            helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["cast", "factor"], ["made"]),
        ]
        return helper.make_graph(nodes, "branch", [], [helper.make_empty_tensor_value_info("made")])

    nodes = [
        helper.make_node("ConstantOfShape", ["two"], ["zeros"]),
        helper.make_node("If", ["yes"], ["scaled"], then_branch=branch(1 / 3), else_branch=branch(1.0)),
        helper.make_node("Add", ["scaled", "zeros"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.array(True), "yes"), numpy_helper.from_array(np.array([2]), "two")]
    graph = helper.make_graph(nodes, "graph", one[:1], one[1:], constants)
    path = tmp_path / "if.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x = np.array([[0.1, 3.0]], np.float32)
    (found,) = Float64File(path)(x)
    assert found.tolist() == (x.astype(np.float64) * third).tolist()


@pytest.mark.parametrize(
    ("op_type", "words"), [("RandomNormalLike", "is random"), ("NoSuchThing", "NoSuchThing")], ids=str
)
def test_what_can_t_be_computed_is_named(tmp_path: Path, op_type: str, words: str) -> None:
    with pytest.raises(NotComputable, match=words):
        Float64File(of_one(tmp_path, op_type, []))

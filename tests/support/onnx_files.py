"""ONNX files made by hand, and what must hold of each and its fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.fold.onnx_model import FoldedFile, explain_onnx, fold_onnx
from export.fold.report import FoldReport, Strategy

BATCHNORM = "BatchNormalization"
TOLERANCE = {TensorProto.DOUBLE: 1e-12, TensorProto.FLOAT: 2e-5, TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 1e-1}


class File:
    """A model in the making. What adds something returns its name, so that calls read as the network does."""

    def __init__(self, opset: int = 17, ir_version: int = 8, dtype: Any = np.float32, seed: int = 0) -> None:
        self.opset, self.ir_version, self.dtype = opset, ir_version, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.value_info: list[onnx.ValueInfoProto] = []
        self.sparse: list[onnx.SparseTensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains = [helper.make_opsetid("", opset)]
        self._count = 0

    def free(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def input(self, name: str, *shape: int | str, dtype: Any = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self._type(dtype), shape))
        return name

    def output(self, name: str, *shape: int | str, dtype: Any = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, self._type(dtype), shape or None))
        return name

    def _type(self, dtype: Any) -> int:
        return int(helper.np_dtype_to_tensor_dtype(self.dtype if dtype is None else np.dtype(dtype)))

    def constant(self, array: Any, name: str = "", dtype: Any = None) -> str:
        """An initializer, of the file's own type where the array is one of Python's floats or float64."""
        array = np.asarray(array)
        if dtype is not None or array.dtype == np.float64:
            array = array.astype(dtype or self.dtype)
        name = name or self.free("c")
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, name: str = "") -> str:
        """Weights that keep the size of what they are multiplied with."""
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1)), name)

    def node(self, op_type: str, *inputs: str, outputs: Iterable[str] = (), **attributes: Any) -> str:
        """A node; the name of its (first) output."""
        made = list(outputs) or [self.free(op_type.lower())]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, **attributes))
        return made[0]

    def conv(self, x: str, channels_in: int, channels_out: int, kernel: int = 3, **attributes: Any) -> str:
        """A convolution of an image with bias, its size kept unless `pads` or `auto_pad` say otherwise."""
        if "auto_pad" not in attributes:
            attributes = {"pads": [kernel // 2] * 4} | attributes
        weight = self.random(channels_out, channels_in // attributes.get("group", 1), kernel, kernel)
        bias = self.constant(self.rng.standard_normal(channels_out))
        return self.node("Conv", x, weight, bias, name=self.free("conv"), **attributes)

    def parameters(self, channels: int, positive: bool = False) -> list[np.ndarray]:
        """Gamma (every third negative unless `positive`), beta, mean and variance that are far from the identity."""
        gamma = self.rng.uniform(0.5, 2, channels) * (1 if positive else np.where(np.arange(channels) % 3 == 1, -1, 1))
        beta, mean = self.rng.standard_normal((2, channels))
        return [gamma, beta, mean, self.rng.uniform(0.5, 2, channels)]

    def norm(self, x: str, channels: int, *, positive: bool = False, outputs: Iterable[str] = (), **more: Any) -> str:
        """A BatchNorm that matters."""
        parameters = [self.constant(array) for array in self.parameters(channels, positive)]
        return self.node(BATCHNORM, x, *parameters, outputs=outputs, **({"name": self.free("norm")} | more))

    def model(self) -> ModelProto:
        """Below IR version 4 the weights are listed among the inputs, as the format wants it."""
        listed = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in self.weights]
        inputs = [*self.inputs, *(listed if self.ir_version < 4 else [])]
        graph = helper.make_graph(self.nodes, "graph", inputs, self.outputs, self.weights, value_info=self.value_info)
        graph.sparse_initializer.extend(self.sparse)
        return helper.make_model(
            graph, opset_imports=self.domains, ir_version=self.ir_version, functions=self.functions
        )

    def save(self, folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(self.model().SerializeToString())
        return path


def norms(model: ModelProto) -> list[NodeProto]:
    """Every BatchNormalization of the standard, in functions and subgraphs too."""

    def inside(nodes: Iterable[NodeProto]) -> list[NodeProto]:
        found = []
        for node in nodes:
            if node.op_type == BATCHNORM and node.domain in ("", "ai.onnx"):
                found.append(node)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    found += inside(graph.node)
        return found

    return [*inside(model.graph.node), *(norm for function in model.functions for norm in inside(function.node))]


def is_valid(path: Path) -> bool:
    """Whether onnx.checker takes it."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError:
        return False
    return True


def op_types(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def stale(model: ModelProto) -> set[str]:
    """Weights that no output depends on."""

    def read(node: NodeProto) -> set[str]:
        graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
        inner = [read(other) for graph in graphs for other in graph.node]
        return set(node.input).union(*inner, *({value.name for value in graph.output} for graph in graphs))

    needed = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= read(node)
    return {tensor.name for tensor in model.graph.initializer} - needed


def callers_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs without the weights, which files below IR version 4 list among them."""
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in given]


def feeds(model: ModelProto, batch: int = 3, size: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """An input for each, bright, with `batch` and `size` where a size is not declared."""
    rng = np.random.default_rng(seed)
    made = {}
    for value in callers_inputs(model):
        kind = value.type.tensor_type
        sizes = [
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else (size if axis else batch)
            for axis, d in enumerate(kind.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floating = np.issubdtype(dtype, np.floating)
        made[value.name] = (2 * rng.standard_normal(sizes) if floating else rng.integers(0, 2, sizes)).astype(dtype)
    return made


def run(path: Path, inputs: Mapping[str, np.ndarray], reference: bool = False) -> list[Any]:
    """By onnxruntime with its optimisations off, or by ONNX's reference, which knows every type."""
    if reference:
        return list(ReferenceEvaluator(str(path)).run(None, dict(inputs)))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def assert_same(before: Any, after: Any, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest finite value; NaN and infinities where they were."""
    assert type(before) is type(after), (type(before), type(after))
    if isinstance(before, list):
        assert len(before) == len(after), (len(before), len(after))
        for one, other in zip(before, after, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(before, dict):
        assert list(before) == list(after), (list(before), list(after))
        assert_same(*(np.array(list(scores.values())) for scores in (before, after)), tolerance)
    elif isinstance(before, np.ndarray) and before.dtype.kind not in "OSU":
        kinds = [(array.dtype, array.shape) for array in (before, after)]
        assert kinds[0] == kinds[1], kinds
        x, y = before.astype(np.float64), after.astype(np.float64)
        finite = np.isfinite(x)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        scale = np.abs(x[finite]).max(initial=1e-3)
        difference = np.abs(y[finite] - x[finite]).max(initial=0) / scale
        assert difference <= tolerance, f"off by {difference:.1e}, at most {tolerance:.1e}"
    else:
        assert np.array_equal(before, after), (before, after)


def assert_reported(model: ModelProto, report: FoldReport) -> None:
    """Each BatchNorm once, by its name where it has one, and with a reason where it stays."""
    expected, names = norms(model), [norm.name for norm in (*report.folded, *report.kept)]
    assert len(names) == len(expected), report
    assert not Counter(norm.name for norm in expected if norm.name) - Counter(names), report
    assert all(norm.reason for norm in report.kept), report


def fold_and_compare(
    source: Path,
    strategy: Strategy = "auto",
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    size: int = 12,
    unchecked: bool = False,
    reference: bool = False,
    stale_outputs: bool = False,
    tolerance: float | None = None,
) -> FoldedFile:
    """Fold to folded.onnx beside `source` and hold that file to it: its function at two batch sizes, its inputs and
    outputs, and the report of `fold_onnx` and `explain_onnx`. `unchecked` is for what onnxruntime does not run,
    `stale_outputs` for outputs whose declaration is wrong and may be mended.
    """
    target = source.with_name("folded.onnx")
    before = onnx.load(source)
    assert norms(before), "nothing to fold"
    if tolerance is None:
        types = [value.type.tensor_type.elem_type for value in (*before.graph.input, *before.graph.output)]
        tolerance = max((TOLERANCE.get(kind, 0) for kind in types), default=0)
    fed = [dict(inputs or feeds(before, batch, size, seed)) for batch, seed in ((3, 0), (2, 1))]
    expected = [run(source, given, reference) for given in fed]
    assert_reported(before, explain_onnx(source, strategy))
    result = fold_onnx(source, target, strategy, **({"unchecked": True} if unchecked else {}))
    assert_reported(before, result.report)
    after = onnx.load(target)
    assert is_valid(target) or not is_valid(source), "onnx.checker refuses the folded file"
    assert len(norms(after)) == len(result.report.kept), result.report
    assert len(stale(after)) <= len(stale(before)), f"no output depends on {sorted(stale(after))}"
    assert callers_inputs(after) == callers_inputs(before), "other inputs"
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output], "other outputs"
    assert stale_outputs or list(after.graph.output) == list(before.graph.output), "outputs declared otherwise"
    versions = [(model.ir_version, model.opset_import) for model in (before, after)]
    assert versions[0] == versions[1], versions
    if not unchecked:
        assert result.difference is not None, result.not_run
        assert result.difference >= 0, "a NaN"
    for given, outputs in zip(fed, expected, strict=True):
        assert_same(outputs, run(target, given, reference), tolerance)
    return result


def is_folded(source: Path, strategy: Strategy = "auto", **options: Any) -> bool:
    """`fold_and_compare`, and whether no BatchNorm is left."""
    return not fold_and_compare(source, strategy, **options).report.kept

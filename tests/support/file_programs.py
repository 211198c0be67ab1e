"""ONNX files as data: nodes, constants in the forms that a file may hold them in, branches; and running them.

A `File` is written in any floating type, so that one in half precision can be held against itself in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

BATCHNORM = "BatchNormalization"

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


class NotRun(Exception):
    """onnx or onnxruntime does not take it."""


def session(model: ModelProto, *, optimised: bool = False) -> onnxruntime.InferenceSession:
    """Raises NotRun."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each failure
        raise NotRun(str(error)) from error


def run(running: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Raises NotRun."""
    try:
        return [np.asarray(result) for result in running.run(None, dict(feeds))]
    except Exception as error:  # as above
        raise NotRun(str(error)) from error


@functools.cache
def newest() -> tuple[int, int]:
    """The newest opset and IR version that this onnxruntime takes without a warning."""

    def taken(opset: int, ir_version: int) -> bool:
        node = helper.make_node("Relu", ["x"], ["y"])
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:])
        try:
            session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version))
        except NotRun:
            return False
        return True

    opset = next(o for o in range(onnx.defs.onnx_opset_version(), 0, -1) if taken(o, 8))
    return opset, next(ir for ir in range(onnx.IR_VERSION, 0, -1) if taken(8, ir))


# -- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant in float64, or in the type named by `kind`: ``"model"`` is the file's own floating type.

    `form` is how the file holds it: an initializer, a Constant node, or either behind an operation on it.
    """

    array: np.ndarray
    kind: str = "model"
    form: str = "initializer"

    def typed(self, dtype: np.dtype[Any]) -> np.ndarray:
        return self.array.astype(dtype if self.kind == "model" else self.kind)


MODEL_TYPE = object()
"""An attribute's value that stands for the file's own floating type."""


@dataclass(frozen=True, eq=False)
class Statement:
    """A node; `blocks` are the bodies of its branches, by attribute."""

    op_type: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def everything(self) -> set[str]:
        """All that it reads, its branches included."""
        return set(self.reads).union(*(block.read for block in self.blocks.values())) - {""}

    def node(self, file: File, dtype: np.dtype[Any], name: str = "") -> NodeProto:
        attributes = {
            key: helper.np_dtype_to_tensor_dtype(dtype) if value is MODEL_TYPE else value
            for key, value in self.attributes.items()
        }
        bodies = {key: block.graph(file, dtype, f"{name}_{key}") for key, block in self.blocks.items()}
        return helper.make_node(self.op_type, self.reads, self.makes, name=name, **attributes, **bodies)

    def __str__(self) -> str:
        attributes = ", ".join(f"{k}={'model type' if v is MODEL_TYPE else v}" for k, v in self.attributes.items())
        lines = [
            f"{', '.join(self.makes)} = {self.op_type}({', '.join(self.reads)}{'; ' if attributes else ''}{attributes})"
        ]
        for key, block in self.blocks.items():
            lines += [f"    {key}:", *(f"        {line}" for s in block.statements for line in str(s).splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Block:
    """A branch: statements that may read values of the graph around them, with constants of their own."""

    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def read(self) -> set[str]:
        return set(self.outputs).union(*(statement.everything() for statement in self.statements))

    def graph(self, file: File, dtype: np.dtype[Any], name: str) -> onnx.GraphProto:
        nodes, initializers = file.held(self.constants, dtype)
        nodes += [statement.node(file, dtype, f"{name}_{i}") for i, statement in enumerate(self.statements)]
        outputs = [helper.make_tensor_value_info(o, helper.np_dtype_to_tensor_dtype(dtype), None) for o in self.outputs]
        return helper.make_graph(nodes, name, [], outputs, initializers)


@dataclass
class File:
    """A model, from which a file of any floating type can be made.

    Attributes:
        symbols: by input, the names of its symbolic sizes, by axis; an empty name is a size of which nothing is said.
        example: by input, an example in float64, or of a flag.
        overridable: constants that are listed as inputs too, in an IR version where that lets a caller override them.
    """

    opset: int
    ir_version: int
    dtype: np.dtype[Any]
    example: dict[str, np.ndarray]
    symbols: dict[str, dict[int, str]]
    constants: dict[str, Constant] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    outputs: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    named: bool = True
    described: bool = False
    overridable: set[str] = field(default_factory=set)

    def held(
        self, names: Sequence[str], dtype: np.dtype[Any], *, plain: bool = False
    ) -> tuple[list[NodeProto], list[TensorProto]]:
        """Constants as nodes and initializers; in the trial of a node all are `plain`."""
        nodes: list[NodeProto] = []
        initializers: list[TensorProto] = []

        def initializer(name: str, array: np.ndarray) -> None:
            initializers.append(numpy_helper.from_array(array.copy(order="C"), name))

        for name in names:
            constant = self.constants[name]
            array, form = constant.typed(dtype), "initializer" if plain else constant.form
            if form == "initializer":
                initializer(name, array)
            elif form == "node":
                nodes.append(
                    helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, f"{name}_value"))
                )
            elif form == "identity":
                initializer(f"{name}_stored", array)
                nodes.append(helper.make_node("Identity", [f"{name}_stored"], [name]))
            elif form == "transposed":
                initializer(f"{name}_stored", array.T)
                nodes.append(helper.make_node("Transpose", [f"{name}_stored"], [name]))
            elif form == "node, transposed":
                value = numpy_helper.from_array(array.T.copy(order="C"), f"{name}_value")
                nodes.append(helper.make_node("Constant", [], [f"{name}_stored"], value=value))
                nodes.append(helper.make_node("Transpose", [f"{name}_stored"], [name]))
            elif form == "cast":
                initializer(f"{name}_stored", array.astype(np.float32))
                to = helper.np_dtype_to_tensor_dtype(array.dtype)
                nodes.append(helper.make_node("Cast", [f"{name}_stored"], [name], to=to))
            else:
                assert form == "reshaped"
                initializer(f"{name}_stored", array.reshape(-1))
                initializer(f"{name}_shape", np.array(array.shape, np.int64))
                nodes.append(helper.make_node("Reshape", [f"{name}_stored", f"{name}_shape"], [name]))
        return nodes, initializers

    def model(self, dtype: np.dtype[Any] | None = None) -> ModelProto:
        dtype = dtype or self.dtype
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        inner = {name for s in self.statements for block in s.blocks.values() for name in block.constants}
        nodes, initializers = self.held([name for name in self.constants if name not in inner], dtype)
        counts = enumerate(self.statements)
        nodes += [s.node(self, dtype, f"{s.op_type.lower()}_{i}" if self.named else "") for i, s in counts]

        def described(name: str) -> onnx.ValueInfoProto:
            array = self.example[name]
            sizes = [self.symbols.get(name, {}).get(axis, size) for axis, size in enumerate(array.shape)]
            element = TensorProto.BOOL if array.dtype == np.bool_ else kind
            return helper.make_tensor_value_info(name, element, [size if size != "" else None for size in sizes])

        inputs = [described(name) for name in self.example]
        for tensor in initializers:
            if self.ir_version < 4 or tensor.name in self.overridable:
                inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        fixed = not any(self.symbols.values())

        def made(name: str) -> onnx.ValueInfoProto:
            shape = self.shapes[name]
            return helper.make_tensor_value_info(name, kind, shape if fixed else [None] * len(shape))

        outputs = [made(name) for name in self.outputs]
        inside = [m for s in self.statements for m in s.makes if m in self.shapes and m not in self.outputs]
        graph = helper.make_graph(
            nodes,
            "random",
            inputs,
            outputs,
            initializers,
            value_info=[made(m) for m in inside] if self.described else [],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="random")

    def inputs(
        self, seed: int, sizes: Callable[[int, int], int] = lambda axis, size: size, scale: float = 1.0
    ) -> Feeds:
        """Random inputs; `sizes` says what a symbolic size, of that axis and that size in the example, is."""
        generator = np.random.default_rng(seed)
        feeds = {}
        for name, array in self.example.items():
            symbolic = self.symbols.get(name, {})
            shape = [sizes(axis, size) if axis in symbolic else size for axis, size in enumerate(array.shape)]
            if array.dtype == np.bool_:
                feeds[name] = generator.random(shape) < 0.5 if shape else np.array(seed % 2 == 0)
            else:
                feeds[name] = (generator.standard_normal(shape) * scale).astype(np.float16).astype(np.float64)
        return feeds

    def features(self) -> set[str]:
        found = {s.op_type for s in self.statements} | {f"opset {self.opset}", f"IR {self.ir_version}", str(self.dtype)}
        found |= {s.op_type for o in self.statements for b in o.blocks.values() for s in b.statements}
        found |= {f"constant: {constant.form}" for constant in self.constants.values()}
        symbolic = {axis for axes in self.symbols.values() for axis in axes}
        found.add("sizes: fixed" if not symbolic else "sizes: batch" if symbolic == {0} else "sizes: all")
        found |= {"several outputs"} if len(self.outputs) > 1 else set()
        found |= {"overridable weights"} if self.overridable else set()
        found |= (
            {"a BatchNorm with its extra outputs"}
            if any(s.op_type == BATCHNORM and len(s.makes) > 1 for s in self.statements)
            else set()
        )
        reads = [
            r for s in self.statements for r in s.reads if self.constants.get(r, Constant(np.zeros(()))).array.ndim > 1
        ]
        return found | ({"shared weights"} if len(set(reads)) < len(reads) else set())

    def listing(self) -> str:
        inputs = ", ".join(f"{n} {list(a.shape)} symbolic {self.symbols.get(n, {})}" for n, a in self.example.items())
        constants = [f"{n}: {list(c.array.shape)} {c.kind}, {c.form}" for n, c in self.constants.items()]
        head = f"opset {self.opset}, IR {self.ir_version}, {self.dtype}; inputs: {inputs}"
        return "\n".join([head, *constants, *map(str, self.statements), f"return {', '.join(self.outputs)}"])


Feeds = dict[str, np.ndarray]


def cast(feeds: Feeds, dtype: np.dtype[Any]) -> Feeds:
    return {name: array if array.dtype == np.bool_ else array.astype(dtype) for name, array in feeds.items()}


def batchnorms(model: ModelProto) -> int:
    """BatchNormalization nodes, those in branches and functions included."""

    def count(nodes: Any) -> int:
        return sum(
            (node.op_type == BATCHNORM) + sum(count(g.node) for a in node.attribute for g in (a.g, *a.graphs))
            for node in nodes
        )

    return count(model.graph.node) + sum(count(function.node) for function in model.functions)

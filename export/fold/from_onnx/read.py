"""The main graph of an ONNX file in the vocabulary of folding.

Owns the walk over the nodes, and what the file's values are: their sizes, in general and in the example, their types,
and who reads them beside the nodes. What an operator means stands in `operators`; whatever goes wrong in reading one
node makes that node opaque, with the reason. Knows no rule of folding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from export.fold.from_onnx.constants import Constants
from export.fold.from_onnx.layers import DTYPES
from export.fold.from_onnx.nodes import (
    BATCHNORM,
    STANDARD,
    Made,
    NotFinite,
    Origin,
    Reading,
    Unreadable,
    has_subgraph,
    is_standard,
    name_of,
    subgraphs,
)
from export.fold.from_onnx.operators import RULES
from export.fold.from_onnx.sizes import Known
from export.fold.from_onnx.survey import out_of_reach
from export.fold.graph import Graph, Node, Op, Value, connect
from export.fold.maps import Size
from export.fold.operations import (
    Affine,
    Clamp,
    Concat,
    Elementwise,
    Identity,
    Layer,
    Opaque,
    Sizes,
    Slice,
    Spatial,
    Sum,
    Transpose,
)
from export.fold.report import KeptNorm

Tensor = torch.Tensor

UNKNOWN_SIZE = 32
"""Taken in an example for a size of which nothing is known, that of what a foreign operator makes, say."""


def read(model: ir.Model, constants: Constants, known: Known) -> Graph:
    """The main graph. Raises NotFinite where a parameter of a layer or BatchNorm is no number."""
    reader = Reader(model, constants, known)
    nodes = [node for ir_node in model.graph for node in reader.nodes(ir_node)]
    return connect(nodes, (*reader.kept, *out_of_reach(model)))


class Reader:
    """One walk over a model; what the operators' rules ask stands first."""

    def __init__(self, model: ir.Model, constants: Constants, known: Known) -> None:
        self.opset, self.constants, self.known = constants.opset, constants, known
        self.outputs = set(model.graph.outputs)
        self.inputs = set(model.graph.inputs)
        self.values: dict[ir.Value, Value] = {}
        self.symbols: dict[str, int] = {}
        self.doubtful: set[ir.Value] = set()  # sizes on which shape inference and runtimes differ
        self.absorbed: set[ir.Node] = set()  # nodes that are part of another one's operation
        self.kept: list[KeptNorm] = []

    # -- what the rules ask

    def flows(self, value: ir.Value | None) -> bool:
        """Whether the value depends on the network's input, as far as can be seen."""
        return value is not None and value not in self.constants

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """A constant's elements in its own type, or None."""
        return self.constants.array(value)

    def tensor(self, value: ir.Value) -> Tensor:
        """A constant's elements in their own type, sharing their memory. Unreadable where they are not known."""
        array = self.array(value)
        if array is None:
            raise Unreadable(f"{value.name} is computed while the network runs")
        return as_tensor(array)

    def parameter(self, value: ir.Value) -> Tensor:
        """The same for a parameter of a layer or BatchNorm. Raises NotFinite."""
        tensor = self.tensor(value)
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # of NaN, both are NaN
            if not math.isfinite(float(low)) or not math.isfinite(float(high)):
                raise NotFinite(f"{value.name} holds values that are not finite (NaN or infinity)")
        return tensor

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """Sizes in the example."""
        return self.value(value).shape

    def rank(self, value: ir.Value) -> int:
        """How many sizes it has. Unreadable where that is not known."""
        shape = self.shape(value)
        if shape is None:
            raise Unreadable(f"the rank of {value.name} is not known")
        return len(shape)

    def sizes(self, value: ir.Value) -> tuple[Size, ...]:
        """Sizes in general. Unreadable where not even the rank is known."""
        self.rank(value)
        return self.value(value).sizes

    def fixed(self, value: ir.Value, axis: int) -> int | None:
        """A size that is always the same, or None."""
        sizes = self.value(value).sizes
        return sizes[axis][0] if axis < len(sizes) and not sizes[axis][1] else None

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The value's type."""
        made = self.value(value).origin
        return made.dtype if isinstance(made, Made) else None

    def suppose(self, value: ir.Value, sizes: Sequence[int | None]) -> None:
        """Take these sizes for a value of which nothing else is known; None is any."""
        target = self.value(value)
        if target.shape is None:
            shape = tuple((UNKNOWN_SIZE if axis else 2) if size is None else size for axis, size in enumerate(sizes))
            target.shape = shape
            target.sizes = self._checked(value, shape, [None if s is None else (s, ()) for s in sizes])
            target.origin = Made(value, shape, self.known.dtype(value))

    def is_output(self, value: ir.Value) -> bool:
        """Whether it is an output of the network."""
        return value in self.outputs

    def only_user(self, value: ir.Value) -> tuple[ir.Node, int] | None:
        """The node of the main graph that alone reads a value, and at which place."""
        uses = list(value.uses())
        if len(uses) != 1 or value in self.outputs or uses[0].node.graph is not value.graph:
            return None
        return uses[0].node, uses[0].idx

    def doubt(self, node: ir.Node) -> None:
        """What shape inference says of the sizes of this node's outputs is not what every runtime makes of them."""
        self.doubtful |= set(node.outputs)

    # -- the walk

    def nodes(self, node: ir.Node) -> list[Node]:
        """What a node is for folding: none where it makes constants or is part of another one."""
        if node in self.absorbed or all(output in self.constants for output in node.outputs if output.name):
            return []
        try:
            readings = self._readings(node)
        except NotFinite:
            raise
        except Unreadable as unreadable:
            return [self._opaque(node, str(unreadable))]
        except Exception as error:  # whatever a node that nobody thought of may raise: it stays what it is
            return [self._opaque(node, f"reading it raised {type(error).__name__}: {error}")]
        if any(reading.op.reads_elements and not reading.inputs for reading in readings):
            return [self._opaque(node, "what it makes of a constant is not computed")]
        return [self._node(reading) for reading in readings] or [self._opaque(node, "")]

    def _readings(self, node: ir.Node) -> list[Reading]:
        rule = RULES.get(node.op_type)
        if node.domain not in STANDARD or has_subgraph(node) or rule is None:
            return []
        read = rule(self, node)
        if isinstance(read, Op):
            read = Reading(read, [v for v in node.inputs if v is not None and self.flows(v)], node.outputs[0], (node,))
        return [read] if isinstance(read, Reading) else read

    def _node(self, reading: Reading) -> Node:
        value = self.value(reading.output)
        self._settle(reading, value)
        if reading.output in self.outputs:
            value.pinned = "an output of the network"
        first = reading.nodes[0]
        places = tuple(
            next(place for place, other in enumerate(first.inputs) if other is read) for read in reading.inputs
        )
        inputs = [self.value(read) for read in reading.inputs]
        return Node(name_of(first), reading.op, inputs, [value], Origin(reading.nodes, places))

    def _opaque(self, node: ir.Node, reason: str) -> Node:
        if is_standard(node, BATCHNORM):
            self.kept.append(KeptNorm(name=name_of(node), reason=reason))
        read = [value for value in node.inputs if value is not None and self.flows(value)]
        pending = subgraphs(node)
        while pending:  # what its branches read of the graph around them
            graph = pending.pop()
            for inner in graph:
                read += [v for v in inner.inputs if v is not None and v in self.values and self.flows(v)]
                pending += subgraphs(inner)
            read += [value for value in graph.outputs if value in self.values and self.flows(value)]
        if any(value in self.doubtful for value in read):
            self.doubt(node)
        outputs = [self.value(output) for output in node.outputs if output.name]
        for value, output in zip(outputs, (output for output in node.outputs if output.name), strict=True):
            if output in self.outputs:
                value.pinned = "an output of the network"
        return Node(
            name_of(node), Opaque(node.op_type, reason), [self.value(v) for v in read], outputs, Origin((node,), ())
        )

    # -- values

    def value(self, value: ir.Value) -> Value:
        """The value in the graph of folding."""
        if value not in self.values:
            name = value.name or ""
            shape = self.known.example.get(name)
            new = Value(name, shape, origin=Made(value, shape, self.known.dtype(value)))
            if value in self.inputs:
                new.pinned = "an input of the network"
            if shape is not None:
                new.sizes = self._checked(value, shape, self._inferred(value))
            self.values[value] = new
        return self.values[value]

    def _inferred(self, value: ir.Value) -> list[Size | None]:
        name = value.name or ""
        declared: Sequence[int | str | None] = self.known.inputs.get(name) or self.known.general.get(name) or ()
        if value in self.doubtful:
            return []
        return [None if size is None else (size, ()) if isinstance(size, int) else (1, (size,)) for size in declared]

    def _checked(self, value: ir.Value, shape: tuple[int, ...], sizes: Sequence[Size | None]) -> tuple[Size, ...]:
        """`sizes` where they agree with the example; a name of its own for each other one."""
        if len(sizes) != len(shape):
            sizes = [None] * len(shape)
        checked: list[Size] = []
        for axis, (number, size) in enumerate(zip(shape, sizes, strict=True)):
            if size is not None:
                for symbol in size[1] if len(size[1]) == 1 and size[0] == 1 else ():
                    self.symbols.setdefault(symbol, number)
                if size[0] * math.prod(self.symbols.get(symbol, 0) for symbol in size[1]) != number:
                    size = None
            if size is None:
                size = (1, (f"{value.name}[{axis}]",))
                self.symbols[size[1][0]] = number
            checked.append(size)
        return tuple(checked)

    def _settle(self, reading: Reading, value: Value) -> None:
        """Sizes and type of what a node makes, as far as its inputs' sizes and its operation tell them."""
        made, op = reading.output, reading.op
        if any(read in self.doubtful for read in reading.inputs):
            self.doubtful.add(made)
        inputs = [self.value(read) for read in reading.inputs]
        if isinstance(op, Sizes):
            return
        if value.shape is None and all(read.shape is not None for read in inputs):
            value.shape = _computed(op, inputs)
        if value.shape is not None and all(read.shape is not None for read in inputs):
            derived = reading.sizes or _derived(op, inputs, value.shape)
            general = self._inferred(made)
            if len(general) != len(value.shape):
                general = [None] * len(value.shape)
            keeps_batch = isinstance(op, Layer) or (isinstance(op, Spatial) and 0 not in op.axes)
            if keeps_batch and inputs[0].fixed and made not in self.doubtful:
                # What inference does not follow, a padding that is computed, say, is no less fixed for that.
                general = [(number, ()) for number in value.shape]
            merged = [size if size is not None else other for size, other in zip(derived, general, strict=True)]
            value.sizes = self._checked(made, value.shape, merged)
            if all(size is not None for size in derived):
                self.doubtful.discard(made)
        dtype = self.known.dtype(made) or _dtype(op, inputs)
        value.origin = Made(made, value.shape, dtype)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, which nothing may write into."""
    if array.dtype.name == "bfloat16":
        return as_tensor(array.view(np.int16)).view(torch.bfloat16)
    if not array.dtype.isnative or any(step < 0 for step in array.strides):
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only memory of the file's
        return torch.from_numpy(array)


def _computed(op: Op, inputs: list[Value]) -> tuple[int, ...] | None:
    try:
        return tuple(op.evaluate(*(torch.zeros(value.known_shape(), dtype=torch.float64) for value in inputs)).shape)
    except Exception:  # what can't be computed has no known sizes
        return None


def _derived(op: Op, inputs: list[Value], shape: tuple[int, ...]) -> tuple[Size | None, ...]:
    """Sizes that follow from the inputs' and the operation; None for those that inference has to tell."""
    first = inputs[0].sizes
    unknown: tuple[Size | None, ...] = (None,) * len(shape)
    if isinstance(op, Identity | Elementwise | Clamp | Affine | Sum) and len(first) == len(shape):
        return first
    if isinstance(op, Layer):
        made: Size = (op.channels_out, ())
        return (*first[:-1], made) if op.rank == 0 else (first[0], made, *unknown[2:])
    if isinstance(op, Transpose):
        return tuple(first[axis] for axis in op.order)
    if isinstance(op, Spatial) and not op.dropped:
        return tuple(None if axis in op.axes else size for axis, size in enumerate(first))
    if isinstance(op, Spatial):
        return tuple(size for axis, size in enumerate(first) if axis not in op.axes)
    if isinstance(op, Slice):
        return tuple((len(op.indices), ()) if axis == op.axis else size for axis, size in enumerate(first))
    if isinstance(op, Concat):
        parts = [value.sizes[op.axis] for value in inputs]
        total: Size | None = None if any(size[1] for size in parts) else (sum(size[0] for size in parts), ())
        return tuple(total if axis == op.axis else size for axis, size in enumerate(first))
    return unknown


def _dtype(op: Op, inputs: list[Value]) -> ir.DataType | None:
    if isinstance(op, Layer):
        return next((dtype for dtype, torch_dtype in DTYPES.items() if torch_dtype == op.dtype), None)
    made = inputs[0].origin if inputs else None
    return made.dtype if isinstance(made, Made) else None

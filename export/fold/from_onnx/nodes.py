"""One ONNX node: its attributes and inputs, and what reading it gives.

Owns the value types that `read` and the operators share. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from export.fold.graph import Op
    from export.fold.maps import Size

BATCHNORM = "BatchNormalization"

STANDARD = ("", "ai.onnx")
"""The names of the domain whose operators are read; the same names in another domain mean something else."""


class Unreadable(Exception):
    """This node is none of the operations that folding knows; the message says why, for the report."""


class NotFinite(Exception):
    """A layer's or a BatchNorm's parameters hold NaN or infinity, so that no result would be right."""


@dataclass(frozen=True)
class Reading:
    """What one or several ONNX nodes are for folding.

    Attributes:
        inputs: the values it reads; constants are part of `op`.
        output: the value it makes.
        nodes: the ONNX nodes it stands for.
        sizes: of the output, where the operator alone tells them; None for one that does not.
    """

    op: Op
    inputs: list[ir.Value]
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    sizes: tuple[Size | None, ...] | None = None


@dataclass(frozen=True)
class Origin:
    """What a `graph.Node` was read from: the ONNX nodes, and at which places the first of them reads its inputs."""

    nodes: tuple[ir.Node, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """What a `graph.Value` was read from: the ONNX value, its sizes in the example then, and its type."""

    value: ir.Value
    shape: tuple[int, ...] | None
    dtype: ir.DataType | None


def name_of(node: ir.Node) -> str:
    """The node's name, or its output's where it has none."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether it is one of these operators of ONNX itself."""
    return node.op_type in op_types and node.domain in STANDARD


def given(node: ir.Node, index: int) -> ir.Value | None:
    """The input at that place, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: ir.Node, index: int) -> ir.Value:
    """The input at that place."""
    value = given(node, index)
    if value is None:
        raise Unreadable(f"its input {index} is missing")
    return value


def is_listed(value: ir.Value) -> bool:
    """Whether an output has a name: one without is left out."""
    return bool(value.name)


def integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute, or `default` where it is not given."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def real(node: ir.Node, name: str, default: float) -> float:
    """An attribute, or `default` where it is not given."""
    return float(node.attributes[name].as_float()) if name in node.attributes else default


def text(node: ir.Node, name: str, default: str) -> str:
    """An attribute, or `default` where it is not given."""
    return str(node.attributes[name].as_string()) if name in node.attributes else default


def integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    """An attribute, or `default` where it is not given."""
    return [int(number) for number in node.attributes[name].as_ints()] if name in node.attributes else default


def has_subgraph(node: ir.Node) -> bool:
    """Whether an attribute is a graph: a branch or the body of a loop."""
    return bool(subgraphs(node))


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the node's attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        value = attribute.value
        found += [
            graph for graph in (value if isinstance(value, tuple | list) else [value]) if isinstance(graph, ir.Graph)
        ]
    return found

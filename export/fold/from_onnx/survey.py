"""What there is to fold in an ONNX file, told without torch: where there is nothing, nobody has to wait for it.

Owns the question. Knows no operator better than is needed to answer it.
"""

from __future__ import annotations

import onnx_ir as ir

from export.fold.from_onnx.constants import Constants
from export.fold.from_onnx.nodes import BATCHNORM, is_standard, name_of, subgraphs
from export.fold.report import KeptNorm

ARITHMETIC = ("Add", "Sub", "Mul", "Div")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def out_of_reach(model: ir.Model) -> tuple[KeptNorm, ...]:
    """The BatchNorms in functions and subgraphs, each once."""
    inner = [("a subgraph", node) for outer in model.graph for node in _inside(outer)]
    for function in model.functions.values():
        where = f"the function {function.name}"
        inner += [(where, node) for outer in function for node in (outer, *_inside(outer))]
    return tuple(
        KeptNorm(name=name_of(node), reason=f"it stands in {where}, and folding works on the main graph")
        for where, node in inner
        if is_standard(node, BATCHNORM)
    )


def _inside(node: ir.Node) -> list[ir.Node]:
    """All nodes of the node's subgraphs, and of theirs."""
    found: list[ir.Node] = []
    pending = subgraphs(node)
    while pending:
        for inner in pending.pop():
            found.append(inner)
            pending += subgraphs(inner)
    return found


def has_something_to_fold(model: ir.Model, constants: Constants) -> bool:
    """Whether the main graph has a BatchNorm, constants' arithmetic for each channel, or layers that are added."""
    if any(is_standard(node, BATCHNORM) for node in model.graph):
        return True
    if not any(is_standard(node, *LAYERS) for node in model.graph):
        return False
    return any(_is_arithmetic(node, constants) or _adds_layers(node) for node in model.graph)


def _is_arithmetic(node: ir.Node, constants: Constants) -> bool:
    if not is_standard(node, *ARITHMETIC) or len(node.inputs) != 2:
        return False
    flowing = [value for value in node.inputs if value is not None and value not in constants]
    fixed = [value for value in node.inputs if value is not None and value in constants]
    if len(flowing) != 1 or len(fixed) != 1:
        return False
    if node.op_type == "Add" and _made_by(flowing[0], "MatMul"):
        return False  # its bias
    dtype = fixed[0].dtype or constants.dtype_of(fixed[0])
    if dtype is not None and not dtype.is_floating_point():
        return False
    shape = fixed[0].const_value.shape if fixed[0].const_value is not None else fixed[0].shape
    return shape is None or sum(size != 1 for size in shape) == 1


def _adds_layers(node: ir.Node) -> bool:
    """Whether it adds what layers make, or what a layer makes to that layer's input."""
    if not is_standard(node, "Add", "Sub", "Sum"):
        return False
    producers = [None if value is None else value.producer() for value in node.inputs]
    layers = [made for made in producers if made is not None and is_standard(made, *LAYERS)]
    sums = [made for made in producers if made is not None and is_standard(made, "Add", "Sub")]
    return len(layers) + len(sums) == len(producers) or any(layer.inputs[0] in node.inputs for layer in layers)


def _made_by(value: ir.Value, *op_types: str) -> bool:
    producer = value.producer()
    return producer is not None and is_standard(producer, *op_types)

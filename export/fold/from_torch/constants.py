"""Constants of an exported graph: its parameters and buffers, and what is computed from them alone.

Owns following such computations (weight normalisation, a BatchNorm taken apart), in the graph's own dtype. Knows no
rule of folding.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import fx

from export.fold.from_torch.nodes import attribute

Tensor = torch.Tensor

MOST_ELEMENTS = 2**26
"""Constants of more elements (256 MiB in float32) are not computed."""


class Constants:
    """The tensors of a module's graph that no input changes; those that are computed, when they are asked for."""

    def __init__(self, module: fx.GraphModule, written: set[str]) -> None:
        """`written` are the names of attributes that the graph itself writes into: they are no constants."""
        self.module = module
        self.known: dict[fx.Node, Tensor] = {}
        self.computed: set[fx.Node] = set()
        self._reads: Counter[int] = Counter()
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(module, node)
                if isinstance(value, Tensor) and str(node.target) not in written:
                    self.known[node] = value
                    self._reads[value.untyped_storage().data_ptr()] += len(node.users)
            elif self._computable(node):
                self.computed.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.known or node in self.computed

    def get(self, argument: Any) -> Tensor | None:
        """The tensor of a node, or None where it depends on the input or is no tensor."""
        if not isinstance(argument, fx.Node) or argument not in self:
            return None
        pending = [argument]
        while pending:
            node = pending[-1]
            missing = [n for n in node.all_input_nodes if n not in self.known] if node not in self.known else []
            if missing:
                pending += missing
                continue
            pending.pop()
            if node not in self.known:
                arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: self.known[n])
                with torch.no_grad():
                    self.known[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        found = self.known[argument]
        return found if isinstance(found, Tensor) else None

    def shared(self, node: Any) -> bool:
        """Whether something else reads the same tensor."""
        if node in self.computed:
            return len(node.users) > 1
        return self._reads[self.known[node].untyped_storage().data_ptr()] > 1

    def _computable(self, node: fx.Node) -> bool:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return False
        schema = target._schema
        if schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.all_input_nodes:
            return False
        if any(not isinstance(size, int) for size in value.shape) or math.prod(value.shape) > MOST_ELEMENTS:
            return False
        return all(n in self for n in node.all_input_nodes)

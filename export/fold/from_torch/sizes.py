"""Sizes of an exported graph's values: in general, as symbols, and in the example that folds are checked with.

Owns the choice of that example: the sizes that the graph was exported with, but a batch of two where the batch is
symbolic, so that a check costs no more than it must.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from export.fold.graph import Value
from export.fold.maps import Size

BATCH = 2


class Sizing:
    """Gives sizes of nodes; one assignment of numbers to symbols holds for all."""

    def __init__(self, graph: fx.Graph) -> None:
        self.numbers: dict[Any, int] = {}
        batches: set[Any] = set()
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim():
                first = value.shape[0]
                if isinstance(first, torch.SymInt) and first.node.expr.is_Symbol:
                    batches.add(first.node.expr)
                for size in value.shape[1:]:
                    if isinstance(size, torch.SymInt):
                        batches -= set(size.node.expr.free_symbols)
        self.batches = batches

    def of(self, node: fx.Node) -> tuple[tuple[int, ...] | None, tuple[Size, ...]]:
        """The example's sizes, or None where they depend on data, and the sizes in general."""
        shape = getattr(node.meta.get("val"), "shape", None)
        if shape is None:
            return None, ()
        try:
            return tuple(self._example(size) for size in shape), tuple(_symbolic(size) for size in shape)
        except (KeyError, TypeError, ValueError):  # sizes that data decide have no example
            return None, ()

    def number(self, node: fx.Node) -> Any:
        """What a node that computes a size is in the example. Raises ValueError for a tensor."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            raise ValueError(f"{node.name} is a tensor")
        return self._example(value)

    def _example(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        hints = size.node.shape_env
        chosen = {}
        for symbol in expression.free_symbols:
            small = symbol in self.batches and _allows(hints, symbol)
            chosen[symbol] = BATCH if small else _hint(hints, symbol)
        return int(expression.subs(chosen))


def _allows(environment: Any, symbol: Any) -> bool:
    limits = environment.var_to_range.get(symbol)
    return limits is None or bool(limits.lower <= BATCH)


def _hint(environment: Any, symbol: Any) -> int:
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return int(hints[symbol])


def _symbolic(size: Any) -> Size:
    if isinstance(size, int):
        return size, ()
    number, symbols = 1, []
    for factor in size.node.expr.as_ordered_factors():
        if factor.is_Integer:
            number *= int(factor)
        else:
            symbols.append(str(factor))
    return number, tuple(sorted(symbols))


def same(value: Value, sizes: tuple[tuple[int, ...] | None, tuple[Size, ...]]) -> bool:
    """Whether a value has these sizes for every input."""
    return value.shape is not None and value.shape == sizes[0] and value.sizes == sizes[1]

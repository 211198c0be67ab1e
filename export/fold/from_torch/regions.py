"""Regions of an exported graph: autocast, gradient modes, branches.

Owns putting regions that only switch gradients in line, since they compute what their contents compute, and naming the
BatchNorms in all others, which stay.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from export.fold.from_torch.nodes import NORMS, aten_name, attribute, module_path
from export.fold.report import KeptNorm


def inline_gradient_modes(module: fx.GraphModule) -> None:
    """Put the contents of `enable_grad` and `no_grad` regions into `module.graph` itself."""
    for node in list(module.graph.nodes):
        if "wrap_with_set_grad_enabled" not in str(node.target) or node.op != "call_function":
            continue
        _, region, *arguments = node.args
        inner = attribute(module, region)
        if not isinstance(inner, fx.GraphModule) or any(n.op == "get_attr" for n in inner.graph.nodes):
            continue
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        copies: dict[fx.Node, Any] = dict(zip(placeholders, arguments, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, copies)
        results = results if isinstance(results, tuple | list) else (results,)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        if not node.users:
            module.graph.erase_node(node)
            if not region.users:
                module.graph.erase_node(region)


def batchnorms_inside(module: fx.GraphModule) -> list[KeptNorm]:
    """The BatchNorms of all regions that are left, each with where it stands."""
    kept = []
    for kind, region in _regions(module):
        for node in region.graph.nodes:
            if aten_name(node) in NORMS:
                reason = f"it stands in {kind}, and folding works on the graph around it"
                kept.append(KeptNorm(name=module_path(node), reason=reason))
    return kept


def _regions(module: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    for node in module.graph.nodes:
        inner = attribute(module, node)
        if isinstance(inner, fx.GraphModule):
            user = next(iter(node.users), None)
            label = str(user.target) if user is not None else "nothing"
            where = {"wrap_with_autocast": "an autocast region", "cond": "a branch"}.get(label, f"a region of {label}")
            yield where, inner
            yield from _regions(inner)

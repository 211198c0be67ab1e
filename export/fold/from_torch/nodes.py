"""What the nodes of an exported graph are called, and what they are given.

Owns reading one node. Knows neither what its operation means nor what the graph is for.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

NORMS = {"batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"}


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value if argument.has_default_value() else None for argument in schema}
    bound.update(zip(bound, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def aten_name(node: fx.Node) -> str:
    """The name of an aten operator, whichever overload. Another one's has its namespace; where there is none, empty."""
    return getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")


def attribute(module: nn.Module, node: fx.Node) -> Any:
    """What a node fetches from its module: a tensor, or the graph of a region. None where it fetches nothing."""
    if node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def module_path(node: fx.Node) -> str:
    """The path of the torch.nn module that the node stands for; else the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if path and kind.startswith("torch.nn.modules"):
            return str(path)
    return node.name

"""Which tensors of an exported graph share memory, and what writes into them.

Owns making a graph functional: an operation in place becomes its twin out of place wherever nobody can tell the
difference, and back again in the folded graph. Where somebody can, everything that may share the memory is named, so
that no fold touches it. Knows no rule of folding.

What may share memory is read from the operators' schemas; an operator that promises nothing (a composite one, whose
parts may return a view) may share memory with each of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from export.fold.from_torch.nodes import aten_name, attribute, bind

_FRESH = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "matmul", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "layer_norm", "group_norm", "instance_norm", "softmax", "log_softmax", "relu6", "selu",
    "silu", "hardswish", "scaled_dot_product_attention", "upsample_nearest2d", "upsample_bilinear2d", "square",
    "adaptive_max_pool1d",
}  # fmt: skip
"""Composite operators that return new memory all the same."""

IN_PLACE = "ninefold_in_place"
"""Key of a node's `meta`: the operator in place that it was."""


@dataclass
class Effects:
    """What a graph writes into.

    Attributes:
        unstable: for each node whose memory is written into in a way that others see, what does it.
        constants: names of the attributes that are written into.
    """

    unstable: dict[fx.Node, str] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)


def functionalise(module: fx.GraphModule) -> Effects:
    """Turn operations in place into their twins, in `module.graph`, where that changes nothing; name the others."""
    effects = Effects()
    sharing = _Sharing(module)
    for node in list(module.graph.nodes):
        written = written_by(node, module)
        if not written:
            sharing.add(node)
            continue
        x = written[0]
        family = sharing.family(written)
        twin = _twin(node)
        private = _private(family) and not _read_after(node, family - {x})
        if len(written) == 1 and twin is not None and private:
            node.meta[IN_PLACE] = node.target
            node.target = twin
            for user in [user for user in x.users if user > node]:
                user.replace_input_with(x, node)
            sharing.add(node)
            continue
        sharing.add(node)
        for member in {*family, node}:
            effects.unstable[member] = f"shares memory that {node.name} writes into"
            if member.op == "get_attr":
                effects.constants.add(str(member.target))
    module.graph.lint()
    return effects


def reinstate(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Work in place again where the graph once did, if that is still nobody's business: it saves memory."""
    sharing = _Sharing(module)
    for node in list(graph.nodes):
        former = node.meta.get(IN_PLACE)
        if former is not None and node.op == "call_function" and node.target is _twin_of(former):
            family = sharing.family([node.args[0]])
            if _private(family) and not _read_after(node, family):
                node.target = former
        sharing.add(node)


def _private(family: Iterable[fx.Node]) -> bool:
    """Whether none of it is the caller's or the model's own."""
    return all(member.op not in ("placeholder", "get_attr") for member in family)


def _read_after(node: fx.Node, family: Iterable[fx.Node]) -> bool:
    return any(user > node for member in family for user in member.users)


def written_by(node: fx.Node, module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose memory this one writes into; `module` has the regions."""
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        fetched = {n: attribute(module, n) for n in node.all_input_nodes}
        regions = {n: inner for n, inner in fetched.items() if isinstance(inner, fx.GraphModule)}
        if any(written_by(n, inner) for inner in regions.values() for n in inner.graph.nodes):
            return [n for n in node.all_input_nodes if n not in regions]
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    bound = bind(node)
    found: list[fx.Node] = []
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _nodes(bound[argument.name])
    # These write running statistics without saying so in their schema.
    if aten_name(node) in ("batch_norm", "instance_norm") and (bound.get("training") or bound.get("use_input_stats")):
        found += [*_nodes(bound.get("running_mean")), *_nodes(bound.get("running_var"))]
    return found


def _nodes(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    if isinstance(argument, list | tuple):
        return [node for part in argument for node in _nodes(part)]
    return []


def _twin(node: fx.Node) -> Any:
    """The out-of-place twin of an operator that writes into its first argument alone, if it computes the same."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    twin = _twin_of(target)
    own = node.args[0].meta.get("val")
    if twin is None or not isinstance(own, torch.Tensor):
        return None
    # In place the result keeps its dtype, out of place it may become the wider one of the other operand.
    others = [n.meta.get("val") for n in node.all_input_nodes[1:]]
    if any(isinstance(other, torch.Tensor) and other.dtype != own.dtype for other in others):
        return None
    if not own.is_floating_point() and any(isinstance(argument, float) for argument in node.args[1:]):
        return None
    return twin


def _twin_of(target: Any) -> Any:
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None)


class _Sharing:
    """Which of the nodes added so far may share memory."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.edges: dict[fx.Node, set[fx.Node]] = {}
        self.storages: dict[int, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        sources = set(_sources(node))
        if node.op == "get_attr":
            value = attribute(self.module, node)
            if isinstance(value, torch.Tensor):
                first = self.storages.setdefault(value.untyped_storage().data_ptr(), node)
                sources |= {first} - {node}
        self.edges.setdefault(node, set()).update(sources)
        for source in sources:
            self.edges.setdefault(source, set()).add(node)

    def family(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """All nodes so far that may share memory with one of these, and these."""
        found = set(nodes)
        pending = list(found)
        while pending:
            for other in self.edges.get(pending.pop(), ()):
                if other not in found:
                    found.add(other)
                    pending.append(other)
        return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory the node's output may share."""
    if node.op != "call_function":
        return []
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(node.all_input_nodes)  # getitem, regions and whatever else
    annotated = [argument.name for argument in target._schema.arguments if argument.alias_info is not None]
    if annotated:
        bound = bind(node)
        return [n for name in annotated for n in _nodes(bound[name])]
    if aten_name(node) in _FRESH:
        return []
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return list(node.all_input_nodes) if composite or target.namespace != "aten" else []

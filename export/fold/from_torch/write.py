"""Writing: a folded graph as an `fx.GraphModule`.

Owns which constants the new module has and how each changed operation is spelled in aten. Knows no rule of folding.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from export.fold.from_torch.aliases import reinstate, written_by
from export.fold.from_torch.nodes import attribute, bind
from export.fold.graph import Graph, Node
from export.fold.operations import Affine, Clamp, Identity, Layer, Select

Tensor = torch.Tensor
aten = torch.ops.aten


def write(module: fx.GraphModule, graph: Graph) -> fx.GraphModule:
    """A new module that computes the folded `graph`, read from `module`. Shares no storage with it.

    The graph is what it was when read afterwards: its float64 weights, twice the model's size where that is float32,
    are let go one by one while the new ones are made.
    """
    fx_graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = fx_graph.graph_copy(module.graph, copies)
    if result is not None:
        fx_graph.output(result)
    fx_graph._codegen = module.graph._codegen
    writer = _Writer(module, fx_graph, copies)
    forgotten = [node.origin for node in graph.nodes if isinstance(node.op, Identity) and not node.inputs]
    unread = {copies[origin] for origin in forgotten if isinstance(origin, fx.Node)}
    for node in graph.nodes:
        writer.node(node)
        node.op = node.read_as
    # What writes into an input or a buffer may be read by nobody; torch does not know that of regions. And it calls a
    # dropout impure that is one by name alone.
    fx_graph.eliminate_dead_code(
        lambda node: node not in unread and (node.is_impure() or bool(written_by(node, module)))
    )
    attributes: dict[str, Any] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for target in sorted({str(n.target) for n in fx_graph.nodes if n.op == "get_attr"}):
        attribute = writer.attributes.get(target)
        if attribute is None:
            attribute = operator.attrgetter(target)(module)
            if isinstance(attribute, Tensor):
                attribute = _copy(attribute, storages)
        attributes[target] = attribute
    folded = fx.GraphModule(attributes, fx_graph, "Folded")
    reinstate(folded.graph, folded)
    folded.recompile()
    folded.meta.update(module.meta)
    return folded.eval()


def _copy(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy; what shared memory before, as views of each other do, shares the copy's."""
    storage = tensor.untyped_storage()
    own = storages.get(storage.data_ptr())
    if own is None:
        own = storages[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
    copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    copied.set_(own, tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copied


class _Writer:
    def __init__(self, module: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
        self.module, self.graph, self.copies = module, graph, copies
        self.attributes: dict[str, Any] = {}
        self.taken = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
        self.users = Counter(str(n.target) for n in module.graph.nodes if n.op == "get_attr" for _ in n.users)

    def node(self, node: Node) -> None:
        original = node.origin
        assert isinstance(original, fx.Node)
        target = self.copies.get(original)
        op = node.op
        if target is None or op is node.read_as or not node.inputs:  # nothing reads what has no inputs any more
            return
        if isinstance(op, Identity | Select):
            self._replace(target, _value_read(node, target))
        elif isinstance(op, Layer):
            self._layer(target, op)
        elif isinstance(op, Clamp):
            self._clamp(target, op)
        elif isinstance(op, Affine) and op.is_norm:
            self._norm(target, op)
        elif isinstance(op, Affine):
            self._arithmetic(target, op, _value_read(node, target))
        else:
            raise TypeError(f"no way to write {type(op).__name__}")

    def _replace(self, target: fx.Node, other: Any) -> None:
        target.replace_all_uses_with(other)
        self.graph.erase_node(target)

    def _layer(self, target: fx.Node, op: Layer) -> None:
        arguments = bind(target)
        weight, former = arguments["weight"], arguments["bias"]
        like = self._like(weight)
        name = str(weight.target) if weight.op == "get_attr" else f"{weight.name}.weight"
        prefix = name.rpartition(".")[0]
        with self.graph.inserting_before(target):
            arguments["weight"] = self._attribute(self._own(weight, prefix, "weight"), op.weight, like)
            arguments["bias"] = None
            if op.bias is not None and op.bias.dim() == 1:
                bias_name = self._own(former, prefix, "bias")
                arguments["bias"] = self._attribute(bias_name, op.bias, like)
        if "groups" in arguments:
            arguments["groups"] = op.groups
        target.args, target.kwargs = tuple(arguments.values()), {}
        if op.bias is not None and op.bias.dim() > 1:
            with self.graph.inserting_after(target):
                bias_map = self._attribute(self._free(prefix, "bias_map"), op.bias.unsqueeze(0), like)
            with self.graph.inserting_after(bias_map):
                sum_node = self.graph.call_function(aten.add.Tensor, (target, bias_map))
            self._describe(sum_node, target)
            target.replace_all_uses_with(sum_node, delete_user_cb=lambda user: user is not sum_node)

    def _like(self, constant: fx.Node) -> Tensor:
        """The constant as it is, or, where it is computed, what torch.export says of it."""
        own = attribute(self.module, constant)
        return constant.meta["val"] if own is None else own  # type: ignore[no-any-return]

    def _own(self, former: fx.Node | None, prefix: str, label: str) -> str:
        """The name of the constant that takes the place of `former`, whose own it is if nothing else reads that."""
        if former is not None and former.op == "get_attr" and self.users[str(former.target)] == 1:
            return str(former.target)
        return self._free(prefix, label)

    def _clamp(self, target: fx.Node, op: Clamp) -> None:
        current, like = target.args[0], target.meta["val"]
        assert isinstance(current, fx.Node)
        ends = ((op.low, "low", aten.maximum.default), (op.high, "high", aten.minimum.default))
        with self.graph.inserting_before(target):
            if op.low.numel() == op.high.numel() == 1:
                bounds = [float(bound) if torch.isfinite(bound).all() else None for bound in (op.low, op.high)]
                current = self.graph.call_function(aten.clamp.default, (current, *bounds))
                self._describe(current, target)
            else:
                for bound, label, function in ends:
                    if not torch.isfinite(bound).any():
                        continue
                    shaped = bound.reshape([1] * (like.dim() - bound.dim()) + list(bound.shape))
                    constant = self._attribute(self._free("", f"{target.name}_{label}"), shaped, like)
                    current = self.graph.call_function(function, (current, constant))
                    self._describe(current, target)
        self._replace(target, current)

    def _norm(self, target: fx.Node, op: Affine) -> None:
        arguments = bind(target)
        mean, eps = arguments["running_mean"], arguments["eps"]
        like = self._like(mean)
        prefix = str(mean.target).rpartition(".")[0]
        scale, shift = op.map.vectors(1, like.numel(), target.name)
        # A BatchNorm of zero mean and unit variance, of which eps is a part.
        parts = (scale, shift, torch.zeros_like(scale), torch.full_like(scale, 1 - eps))
        with self.graph.inserting_before(target):
            nodes = [
                self._attribute(self._free(prefix, f"folded_{label}"), part, like)
                for label, part in zip(("weight", "bias", "running_mean", "running_var"), parts, strict=True)
            ]
        target.args, target.kwargs = (target.args[0], *nodes, False, 0.0, eps, False), {}

    def _arithmetic(self, target: fx.Node, op: Affine, value: fx.Node) -> None:
        current, like = value, target.meta["val"]
        with self.graph.inserting_before(target):
            for tensor, neutral, label, function in (
                (op.map.scale, 1.0, "scale", aten.mul.Tensor),
                (op.map.shift, 0.0, "shift", aten.add.Tensor),
            ):
                if bool((tensor == neutral).all()):
                    continue
                constant = self._attribute(self._free("", f"{target.name}_{label}"), tensor, like)
                current = self.graph.call_function(function, (current, constant))
                self._describe(current, target)
        self._replace(target, current)

    def _describe(self, node: fx.Node, like: fx.Node) -> None:
        node.meta.update({key: like.meta[key] for key in ("nn_module_stack", "val", "stack_trace") if key in like.meta})

    def _attribute(self, target: str, tensor: Tensor, like: Tensor) -> fx.Node:
        """A constant of that name, in the dtype, on the device and in the memory format of `like`."""
        placed = tensor.detach().to(device=like.device, dtype=like.dtype)
        alike = placed.dim() == like.dim()
        placed = placed.contiguous(memory_format=_memory_format(like) if alike else torch.contiguous_format)
        if placed.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            placed = placed.clone()  # a weight that stays as it was is the model's own
        self.attributes[target] = torch.nn.Parameter(placed) if isinstance(like, torch.nn.Parameter) else placed
        node = self.graph.create_node("get_attr", target)
        node.meta["val"] = placed
        return node

    def _free(self, prefix: str, label: str) -> str:
        stem = f"{prefix}.{label}" if prefix else label
        name, number = stem, 1
        while name in self.taken:
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name)
        return name


def _value_read(node: Node, target: fx.Node) -> fx.Node:
    """What `target` reads in the place of the one value that `node` read; its other operands are constants."""
    original = node.origin
    assert isinstance(original, fx.Node)
    return target.all_input_nodes[original.all_input_nodes.index(node.inputs[0].origin)]  # type: ignore[arg-type]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is laid out so and not plainly too, else contiguous."""
    if not tensor.is_contiguous():
        for rank, kind in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensor.dim() == rank and tensor.is_contiguous(memory_format=kind):
                return kind
    return torch.contiguous_format

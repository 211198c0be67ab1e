"""torch.export programs: into the vocabulary of `graph`, and back with the folds in them.

Owns what each aten operation means for folding and how a folded network is written as an `fx.GraphModule`. Knows no
rule of folding. An operation that is not listed here is opaque: it is never folded through, and stays as it is.

In-place activations are read as their out-of-place twins. That is exact because a fold changes a value only where
exactly the readers it knows of exist; an alias is a reader.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from export.fold import algebra
from export.fold.graph import (
    Add,
    Clamp,
    Concat,
    Elementwise,
    Flatten,
    Graph,
    Identity,
    Layer,
    Node,
    Norm,
    Op,
    Opaque,
    Sizes,
    Spatial,
    Tensor,
    Value,
    connect,
    per_channel,
)
from export.fold.report import KeptNorm

aten = torch.ops.aten

_ELEMENTWISE = {
    "relu", "relu6", "leaky_relu", "hardtanh", "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "celu", "softplus",
    "hardswish", "hardsigmoid", "mish", "log_sigmoid", "exp", "abs", "square", "sqrt", "clamp", "clamp_min",
    "clamp_max", "neg", "softsign", "erf", "sin", "cos", "threshold", "hardshrink", "softshrink",
}  # fmt: skip
_HOMOGENEOUS = {"relu", "leaky_relu"}
_IDENTITY = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "alias",
}
_MAX_POOL = {"max_pool1d", "max_pool2d", "max_pool3d"}
_MAX_POOL_PAIR = {
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
}
_AVG_POOL = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_ADAPTIVE_AVG_POOL = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
_RESIZE = {
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
}  # fmt: skip
_RESHAPE = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
_CONV = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_CONV_TRANSPOSE = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}


def read(module: fx.GraphModule) -> Graph:
    """The module's graph in the vocabulary of folding."""
    reader = _Reader(module)
    nodes = []
    for fx_node in module.graph.nodes:
        node = reader.node(fx_node)
        if node is not None:
            nodes.append(node)
    return connect(nodes, reader.kept)


class _Reader:
    def __init__(self, module: fx.GraphModule) -> None:
        self.constants: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Value] = {}
        self.kept: list[KeptNorm] = []
        readers: Counter[int] = Counter()
        for fx_node in module.graph.nodes:
            if fx_node.op == "get_attr":
                tensor = operator.attrgetter(str(fx_node.target))(module)
                if isinstance(tensor, Tensor):
                    self.constants[fx_node] = tensor
                    readers[tensor.untyped_storage().data_ptr()] += len(fx_node.users)
        self.readers = readers

    def node(self, fx_node: fx.Node) -> Node | None:
        if fx_node in self.constants or self._pool_pair(fx_node):
            return None
        op, inputs = self._operation(fx_node)
        output = self._value(fx_node)
        if fx_node.op in ("placeholder", "output"):
            for value in (output, *inputs):
                value.pinned = f"an {'input' if fx_node.op == 'placeholder' else 'output'} of the network"
        return Node(_name(fx_node), op, inputs, [output], fx_node)

    def _value(self, fx_node: fx.Node) -> Value:
        shape = getattr(fx_node.meta.get("val"), "shape", None)
        sizes = fixed = None
        if shape is not None:
            fixed = tuple(isinstance(size, int) for size in shape)
            hints = tuple(size if isinstance(size, int) else size.node.hint for size in shape)
            sizes = None if None in hints else tuple(int(size) for size in hints)
        value = Value(fx_node.name, sizes, fixed or ())
        self.values[fx_node] = value
        return value

    def _operation(self, fx_node: fx.Node) -> tuple[Op, list[Value]]:
        """The operation and the values it reads; opaque unless everything about it is known."""
        everything = [self.values[n] for n in fx_node.all_input_nodes if n in self.values]
        if fx_node.op != "call_function":
            return Opaque(fx_node.op), everything
        if fx_node.target is operator.getitem:
            pool = fx_node.args[0]
            if not isinstance(pool, fx.Node) or not self._pool_pair(pool):
                return Opaque("getitem"), everything
            whole = _rest_applied(pool)
            (read,) = pool.all_input_nodes
            return Spatial("max pool", lambda x: whole(x)[0], linear=False, keeps_constants=True), [self.values[read]]
        target = fx_node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return Opaque(str(target)), everything
        name = target._schema.name.removeprefix("aten::")
        arguments = _bind(fx_node)
        found: tuple[Op, list[Value]] | None = None
        match name.removesuffix("_"):
            case "batch_norm" | "_native_batch_norm_legit_no_training":
                found = self._norm(fx_node, arguments)
            case "linear":
                found = self._layer(fx_node, arguments, 0, transposed=False)
            case base if base in _CONV:
                found = self._layer(fx_node, arguments, _CONV[base], transposed=False)
            case base if base in _CONV_TRANSPOSE:
                found = self._layer(fx_node, arguments, _CONV_TRANSPOSE[base], transposed=True)
            case "sym_size" if arguments["dim"] % len(fx_node.args[0].meta["val"].shape) != 1:  # type: ignore[union-attr]
                found = Opaque(name), []  # a size that no fold changes
            case "sym_size":
                found = Sizes(), everything
            case "cat" | "concat":
                found = self._concat(fx_node, arguments)
            case "add":
                found = self._add(arguments)
            case base:
                op = self._of_one_value(fx_node, base, arguments)
                found = None if op is None else (op, [self.values[arguments[next(iter(arguments))]]])
        return found or (Opaque(name), everything)

    def _constant(self, argument: Any) -> Tensor | None:
        return self.constants.get(argument) if isinstance(argument, fx.Node) else None

    def _norm(self, fx_node: fx.Node, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        x = arguments["input"]
        gamma, beta = arguments["weight"], arguments["bias"]
        mean, var = self._constant(arguments["running_mean"]), self._constant(arguments["running_var"])
        reason = None
        if arguments.get("training") or mean is None or var is None:
            reason = "it normalises by the statistics of the batch, so it is not a fixed scale and shift"
        elif any(isinstance(p, fx.Node) and p not in self.constants for p in (gamma, beta)):
            reason = "its parameters are computed while the network runs"
        elif x not in self.values or fx_node.target is not aten.batch_norm.default:
            reason = f"{fx_node.target} is not a form of BatchNorm that folding reads"
        if reason is not None:
            self.kept.append(KeptNorm(name=_name(fx_node), reason=reason))
            return None
        assert mean is not None
        assert var is not None
        scale, shift = algebra.affine(self._constant(gamma), self._constant(beta), mean, var, arguments["eps"])
        return Norm(scale, shift), [self.values[x]]

    def _layer(
        self, fx_node: fx.Node, arguments: dict[str, Any], rank: int, transposed: bool
    ) -> tuple[Op, list[Value]] | None:
        x = arguments["input"]
        weight, bias = self._constant(arguments["weight"]), self._constant(arguments["bias"])
        if x not in self.values or weight is None or (bias is None and arguments["bias"] is not None):
            return None
        value = self.values[x]
        if value.shape is None or (rank and len(value.shape) != rank + 2) or not weight.is_floating_point():
            return None
        shared = self.readers[weight.untyped_storage().data_ptr()] > 1
        if rank == 0:
            return Layer(weight, bias, 0, shared=shared), [value]
        dilation = _each(arguments["dilation"], rank)
        if isinstance(arguments["padding"], str):
            total = [
                d * (k - 1) if arguments["padding"] == "same" else 0
                for d, k in zip(dilation, weight.shape[2:], strict=True)
            ]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((p, p) for p in _each(arguments["padding"], rank))
        layer = Layer(
            weight,
            bias,
            rank,
            _each(arguments["stride"], rank),
            padding,
            dilation,
            arguments["groups"],
            transposed,
            _each(arguments["output_padding"], rank) if transposed else (),
            shared,
        )
        return layer, [value]

    def _concat(self, fx_node: fx.Node, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        parts = arguments["tensors"]
        rank = len(fx_node.meta["val"].shape)
        if arguments["dim"] % rank != 1 or any(part not in self.values for part in parts):
            return None
        values = [self.values[part] for part in parts]
        return (Concat(), values) if all(value.shape and len(value.shape) == rank for value in values) else None

    def _add(self, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        first, second = arguments.get("self"), arguments.get("other")
        if first not in self.values or second not in self.values or arguments.get("alpha", 1) != 1:
            return None
        if not _same_sizes(first.meta["val"].shape, second.meta["val"].shape):
            return None
        return Add(), [self.values[first], self.values[second]]

    def _of_one_value(self, fx_node: fx.Node, base: str, arguments: dict[str, Any]) -> Op | None:
        x = next(iter(arguments.values()), None)
        if not isinstance(x, fx.Node) or x not in self.values:
            return None
        shape = x.meta["val"].shape
        if base in _RESHAPE:
            return _reshape(base, shape, fx_node.meta["val"].shape)
        if fx_node.all_input_nodes != [x]:
            return None
        if base in _ELEMENTWISE:
            return Elementwise(base, _rest_applied(fx_node, _functional(fx_node, base)), base in _HOMOGENEOUS)
        if base in _IDENTITY:
            return None if arguments.get("train") else Identity()
        if len(shape) < 3:
            return None
        if base in _MAX_POOL:
            return Spatial(base, _rest_applied(fx_node), linear=False, keeps_constants=True)
        if base in _AVG_POOL:
            whole = not any(_each(arguments["padding"], 1)) or not arguments["count_include_pad"]
            keeps = whole and arguments.get("divisor_override") is None
            return Spatial(base, _rest_applied(fx_node), linear=True, keeps_constants=keeps)
        if base in _ADAPTIVE_AVG_POOL or base in _RESIZE:
            return Spatial(base, _rest_applied(fx_node), linear=True, keeps_constants=True)
        if base == "mean" and arguments.get("dim") and arguments.get("dtype") is None:
            spatial = all(dim % len(shape) >= 2 for dim in arguments["dim"])
            return Spatial(base, _rest_applied(fx_node), linear=True, keeps_constants=True) if spatial else None
        if base in ("pad", "constant_pad_nd"):
            mode, value = arguments.get("mode", "constant"), arguments.get("value")
            if len(arguments["pad"]) > 2 * (len(shape) - 2) or (mode == "constant" and value not in (None, 0, 0.0)):
                return None
            return Spatial(f"{mode} pad", _rest_applied(fx_node), linear=True, keeps_constants=mode != "constant")
        return None

    def _pool_pair(self, pool: fx.Node) -> bool:
        """Whether this is max pooling that returns indices too, of which only the values are read."""
        name = getattr(getattr(pool.target, "_schema", None), "name", "").removeprefix("aten::")
        return (
            name in _MAX_POOL_PAIR
            and pool.args[0] in self.values
            and all(user.target is operator.getitem and user.args[1] == 0 for user in pool.users)
        )


def _bind(fx_node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of the operator's schema, defaults filled in."""
    schema = fx_node.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound = {argument.name: bound.get(argument.name) for argument in schema}
    bound.update(zip((argument.name for argument in schema), fx_node.args, strict=False))
    bound.update(fx_node.kwargs)
    return bound


def _functional(fx_node: fx.Node, base: str) -> Callable[..., Tensor]:
    """The out-of-place twin of the node's operator."""
    target = fx_node.target
    assert isinstance(target, torch._ops.OpOverload)
    if not target._schema.name.endswith("_"):
        return target
    return getattr(getattr(aten, base), target._overloadname)  # type: ignore[no-any-return]


def _rest_applied(fx_node: fx.Node, function: Callable[..., Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """The operator as a function of its first argument alone."""
    call: Callable[..., Tensor] = function or fx_node.target  # type: ignore[assignment]
    return lambda x: call(x, *fx_node.args[1:], **fx_node.kwargs)


def _reshape(base: str, before: torch.Size, after: torch.Size) -> Op | None:
    """A reshape that keeps the channels apart. Views keep the order of elements: equal leading sizes prove it."""
    if len(before) < 2 or len(after) < 2 or not all(isinstance(size, int) for size in (*before[1:], *after[1:])):
        return None
    if _same_sizes(before[:2], after[:2]):
        if _same_sizes(before, after):
            return Identity()
        tail = tuple(after[2:])
        return Spatial(
            base,
            lambda x: x.reshape(*x.shape[:2], *tail),
            linear=True,
            keeps_constants=True,
            any_channels=base != "view",
        )
    if len(after) == 2 and len(before) > 2 and _same_sizes(before[:1], after[:1]):
        return Flatten(any_channels=base == "flatten")
    return None


def _same_sizes(one: Any, other: Any) -> bool:
    """Equal in general, not only in the example: symbolic sizes must be the same expression."""
    return len(one) == len(other) and all(str(a) == str(b) for a, b in zip(one, other, strict=True))


def _each(argument: Any, rank: int) -> tuple[int, ...]:
    values = tuple(argument) if isinstance(argument, list | tuple) else (argument,)
    return values * rank if len(values) == 1 else values


def _name(fx_node: fx.Node) -> str:
    """The path of the torch.nn module that the node stands for; else the node's own name."""
    stack = list((fx_node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if path and kind.startswith("torch.nn.modules"):
            return str(path)
    return fx_node.name


# -- back to torch ---------------------------------------------------------------------------------------------------


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
    for node in graph.nodes:
        writer.node(node)
        node.op = node.read_as
    fx_graph.eliminate_dead_code()
    targets = {str(n.target) for n in fx_graph.nodes if n.op == "get_attr"}
    attributes: dict[str, Any] = {}
    for target in targets:
        found = writer.attributes.get(target)
        if found is None:
            found = operator.attrgetter(target)(module)
            if isinstance(found, Tensor):
                copied = found.detach().clone()
                found = (
                    torch.nn.Parameter(copied, found.requires_grad) if isinstance(found, torch.nn.Parameter) else copied
                )
        attributes[target] = found
    folded = fx.GraphModule(attributes, fx_graph, "Folded")
    folded.meta.update(module.meta)
    return folded.eval()


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
        if target is None:
            return
        op = node.op
        if op is node.read_as:
            return
        if isinstance(op, Identity):
            target.replace_all_uses_with(target.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(target)
        elif isinstance(op, Layer):
            self._layer(target, op)
        elif isinstance(op, Clamp):
            self._clamp(target, op)
        elif isinstance(op, Norm):
            self._norm(target, op)

    def _layer(self, target: fx.Node, op: Layer) -> None:
        arguments = _bind(target)
        weight_name = str(arguments["weight"].target)
        prefix = weight_name.rpartition(".")[0]
        like = operator.attrgetter(weight_name)(self.module)
        with self.graph.inserting_before(target):
            former, arguments["weight"] = arguments["bias"], self._attribute(weight_name, op.weight, like)
            arguments["bias"] = None
            if op.bias is not None and op.bias.dim() == 1:
                own = former is not None and self.users[str(former.target)] == 1
                bias_name = str(former.target) if own else self._free(prefix, "bias")
                arguments["bias"] = self._attribute(bias_name, op.bias, like)
        target.args, target.kwargs = tuple(arguments.values()), {}
        if op.bias is not None and op.bias.dim() > 1:
            with self.graph.inserting_after(target):
                bias_map = self._attribute(self._free(prefix, "bias_map"), op.bias.unsqueeze(0), like)
            with self.graph.inserting_after(bias_map):
                sum_node = self.graph.call_function(aten.add.Tensor, (target, bias_map))
            sum_node.meta.update(target.meta)
            target.replace_all_uses_with(sum_node, delete_user_cb=lambda user: user is not sum_node)

    def _clamp(self, target: fx.Node, op: Clamp) -> None:
        value = target.args[0]
        assert isinstance(value, fx.Node)
        dimensions = len(target.meta["val"].shape)
        like = target.meta["val"]
        current = value
        with self.graph.inserting_before(target):
            for label, bound, function in (
                ("low", op.low, aten.maximum.default),
                ("high", op.high, aten.minimum.default),
            ):
                if torch.isfinite(bound).any():
                    constant = self._attribute(
                        self._free("", f"{target.name}_{label}"), per_channel(bound, dimensions), like
                    )
                    current = self.graph.call_function(function, (current, constant))
                    current.meta.update(
                        {key: target.meta[key] for key in ("nn_module_stack", "val") if key in target.meta}
                    )
        target.replace_all_uses_with(current)
        self.graph.erase_node(target)

    def _norm(self, target: fx.Node, op: Norm) -> None:
        arguments = _bind(target)
        mean_name, eps = str(arguments["running_mean"].target), arguments["eps"]
        like, prefix = operator.attrgetter(mean_name)(self.module), mean_name.rpartition(".")[0]
        # A BatchNorm of zero mean and unit variance, of which eps is a part.
        parts = (op.scale, op.shift, torch.zeros_like(op.scale), torch.full_like(op.scale, 1 - eps))
        with self.graph.inserting_before(target):
            nodes = [
                self._attribute(self._free(prefix, f"folded_{label}"), part, like)
                for label, part in zip(("weight", "bias", "running_mean", "running_var"), parts, strict=True)
            ]
        target.args, target.kwargs = (target.args[0], *nodes, False, 0.0, eps, False), {}

    def _attribute(self, target: str, tensor: Tensor, like: Tensor) -> fx.Node:
        """A constant of that name, in the dtype and on the device of `like`."""
        placed = tensor.to(device=like.device, dtype=like.dtype).contiguous()
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

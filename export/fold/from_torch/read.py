"""Reading: what each aten operation means for folding.

Owns the table of operations. Knows no rule of folding. An operation that is not listed here is opaque: it is never
folded through, and stays as it is. So is one of which anything could not be read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from export.fold import algebra
from export.fold.from_torch import regions
from export.fold.from_torch.aliases import Effects
from export.fold.from_torch.constants import Constants
from export.fold.from_torch.nodes import NORMS, aten_name, bind, module_path
from export.fold.from_torch.sizes import Sizing, same
from export.fold.graph import Graph, Node, Op, Value, connect
from export.fold.maps import Map
from export.fold.operations import (
    Affine,
    Concat,
    Elementwise,
    Identity,
    Layer,
    Opaque,
    Reshape,
    Sizes,
    Slice,
    Spatial,
    Sum,
    Transpose,
    bounded,
    relu,
)
from export.fold.report import KeptNorm

Tensor = torch.Tensor
aten = torch.ops.aten

_ELEMENTWISE = {
    "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "celu", "softplus", "hardswish", "hardsigmoid", "mish",
    "log_sigmoid", "exp", "abs", "square", "sqrt", "softsign", "erf", "sin", "cos", "threshold", "hardshrink",
    "softshrink",
}  # fmt: skip
_IDENTITY = {
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone", "detach", "alias",
}  # fmt: skip
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
_LIKE_ANOTHER = {"view_as", "reshape_as"}
_TRANSPOSE = {"permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis"}
_CONV = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_CONV_TRANSPOSE = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_CHUNKS = {"chunk", "split", "split_with_sizes"}


def read(module: fx.GraphModule, effects: Effects) -> Graph:
    """The module's graph in the vocabulary of folding; `effects` as `aliases.functionalise` found them."""
    reader = _Reader(module, effects)
    nodes = []
    for fx_node in module.graph.nodes:
        node = reader.node(fx_node)
        nodes += reader.looks
        reader.looks.clear()
        if node is not None:
            nodes.append(node)
    return connect(nodes, [*reader.kept, *regions.batchnorms_inside(module)])


class _Reader:
    def __init__(self, module: fx.GraphModule, effects: Effects) -> None:
        self.effects = effects
        self.constants = Constants(module, effects.constants)
        self.sizing = Sizing(module.graph)
        self.values: dict[fx.Node, Value] = {}
        self.kept: list[KeptNorm] = []
        self.looks: list[Node] = []  # at the sizes of another value, by the operation being read

    def node(self, fx_node: fx.Node) -> Node | None:
        if fx_node in self.constants or self._pool_pair(fx_node) or self._chunks(fx_node):
            return None
        everything = [self.values[n] for n in fx_node.all_input_nodes if n in self.values]
        try:
            op, inputs = self._operation(fx_node, everything)
        except Exception as error:  # an operation in a form that the table does not foresee stays as it is
            op, inputs = Opaque(str(fx_node.target), f"reading it raised {type(error).__name__}"), everything
            if aten_name(fx_node) in NORMS:
                self.kept.append(KeptNorm(name=module_path(fx_node), reason=f"it could not be read: {error}"))
        output = self._value(fx_node)
        if fx_node.op in ("placeholder", "output"):
            for value in (output, *inputs):
                value.pinned = f"an {'input' if fx_node.op == 'placeholder' else 'output'} of the network"
        return Node(module_path(fx_node), op, inputs, [output], fx_node)

    def _value(self, fx_node: fx.Node) -> Value:
        shape, sizes = self.sizing.of(fx_node)
        value = Value(fx_node.name, shape, sizes, unstable=self.effects.unstable.get(fx_node, ""), origin=fx_node)
        self.values[fx_node] = value
        return value

    def _operation(self, fx_node: fx.Node, everything: list[Value]) -> tuple[Op, list[Value]]:
        """The operation and the values it reads; opaque unless everything about it is known."""
        if fx_node.op != "call_function":
            return Opaque(fx_node.op), everything
        if fx_node.target is operator.getitem:
            found = self._item(fx_node)
            return found or (Opaque("getitem"), everything)
        target = fx_node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return Opaque(str(target)), everything
        if fx_node in self.effects.unstable and target._schema.is_mutable:
            return Opaque(str(target)), everything
        name = aten_name(fx_node)
        arguments = bind(fx_node)
        found = None
        match name:
            case _ if name in NORMS:
                found = self._norm(fx_node, arguments)
            case "linear":
                found = self._layer(fx_node, arguments, 0, transposed=False)
            case _ if name in _CONV:
                found = self._layer(fx_node, arguments, _CONV[name], transposed=False)
            case _ if name in _CONV_TRANSPOSE:
                found = self._layer(fx_node, arguments, _CONV_TRANSPOSE[name], transposed=True)
            case "sym_size":
                sized = self.values[arguments["self"]]
                # A size that no fold changes is none of its readers.
                return (Opaque(name), []) if arguments["dim"] % sized.rank != 1 else (Sizes(), [sized])
            case "_assert_tensor_metadata":
                return Sizes(), everything
            case "cat" | "concat":
                found = self._concat(fx_node, arguments)
            case "add" | "sub" | "mul" | "div":
                found = self._arithmetic(fx_node, name, arguments)
            case "addcmul":
                found = self._addcmul(fx_node, arguments)
            case "rsub":  # other - alpha self
                turned = {**arguments, "self": arguments["other"], "other": arguments["self"]}
                found = self._arithmetic(fx_node, "sub", turned)
            case _:
                x = next(iter(arguments.values()), None)
                if isinstance(x, fx.Node) and x in self.values:
                    op = self._of_one_value(fx_node, x, name, arguments)
                    found = None if op is None else (op, [self.values[x]])
        return found or (Opaque(name), everything)

    # -- BatchNorm and layers

    def _norm(self, fx_node: fx.Node, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        x = arguments["input"]
        gamma, beta = arguments["weight"], arguments["bias"]
        mean, var = self.constants.get(arguments["running_mean"]), self.constants.get(arguments["running_var"])
        reason = None
        if arguments.get("training") or arguments["running_mean"] is None or arguments["running_var"] is None:
            reason = "it normalises by the statistics of the batch, so it is not a fixed scale and shift"
        elif mean is None or var is None:
            reason = "the network itself changes or computes its statistics"
        elif any(isinstance(p, fx.Node) and p not in self.constants for p in (gamma, beta)):
            reason = "its parameters are computed or changed while the network runs"
        elif x not in self.values or fx_node.target is not aten.batch_norm.default:
            reason = f"{fx_node.target} is not a form of BatchNorm that folding reads"
        elif fx_node.meta["val"].dtype != mean.dtype and fx_node.meta["val"].dtype == torch.float64:
            reason = "it is wider than its statistics"
        if reason is None:
            assert mean is not None
            assert var is not None
            eps = arguments["eps"]
            scale, shift = algebra.affine(self.constants.get(gamma), self.constants.get(beta), mean, var, eps)
            if bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
                offset = float((mean.detach().double().cpu().abs() / (var.detach().double().cpu() + eps).sqrt()).max())
                map = Map.along(scale, shift, 1, self.values[x].rank)
                return Affine(map, True, offset, mean.dtype), [self.values[x]]
            reason = "its scale or shift is not finite"
        self.kept.append(KeptNorm(name=module_path(fx_node), reason=reason))
        return None

    def _layer(
        self, fx_node: fx.Node, arguments: dict[str, Any], rank: int, transposed: bool
    ) -> tuple[Op, list[Value]] | None:
        x = arguments["input"]
        weight, bias = self.constants.get(arguments["weight"]), self.constants.get(arguments["bias"])
        if x not in self.values or weight is None or (bias is None and arguments["bias"] is not None):
            return None
        value = self.values[x]
        if value.shape is None or (rank and len(value.shape) != rank + 2) or not weight.is_floating_point():
            return None
        shared = self.constants.shared(arguments["weight"])
        if rank == 0:
            return Layer(weight, bias, 0, shared=shared, dtype=weight.dtype), [value]
        dilation = each(arguments["dilation"], rank)
        if isinstance(arguments["padding"], str):
            total = [
                d * (k - 1) if arguments["padding"] == "same" else 0
                for d, k in zip(dilation, weight.shape[2:], strict=True)
            ]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((p, p) for p in each(arguments["padding"], rank))
        layer = Layer(
            weight,
            bias,
            rank,
            each(arguments["stride"], rank),
            padding,
            dilation,
            arguments["groups"],
            transposed,
            each(arguments["output_padding"], rank) if transposed else (),
            shared,
            weight.dtype,
        )
        return layer, [value]

    # -- several values

    def _concat(self, fx_node: fx.Node, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        parts = arguments["tensors"]
        rank = len(fx_node.meta["val"].shape)
        if any(part not in self.values for part in parts):
            return None
        values = [self.values[part] for part in parts]
        alike = all(value.shape is not None and len(value.shape) == rank for value in values)
        dtypes = {part.meta["val"].dtype for part in parts}
        return (Concat(arguments["dim"] % rank), values) if alike and len(dtypes) == 1 else None

    def _arithmetic(self, fx_node: fx.Node, name: str, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        """A sum or difference of two values, or a scale and shift by constants."""
        first, second = arguments.get("self"), arguments.get("other")
        factor = arguments.get("alpha", 1)
        if first in self.values and second in self.values:
            a, b = self.values[first], self.values[second]
            alike = a.shape is not None and a.shape == b.shape and a.sizes == b.sizes
            same_type = first.meta["val"].dtype == second.meta["val"].dtype
            plain = factor == 1 and alike and same_type and name in ("add", "sub")
            return (Sum((1, 1 if name == "add" else -1)), [a, b]) if plain else None
        turned = second in self.values
        x, constant = (second, first) if turned else (first, second)
        if x not in self.values or arguments.get("rounding_mode") is not None or (turned and name == "div"):
            return None
        if not x.meta["val"].is_floating_point() or x.meta["val"].dtype != fx_node.meta["val"].dtype:
            return None
        value = self.values[x]
        if not same(value, self.sizing.of(fx_node)):
            return None  # the constant makes it larger
        tensor = self.constants.get(constant)
        if isinstance(constant, int | float) and not isinstance(constant, bool):
            tensor = torch.tensor(float(constant), dtype=torch.float64)
        number = _broadcast(tensor, value.rank)
        if number is None or not isinstance(factor, int | float):
            return None
        one, nothing = torch.ones_like(number), torch.zeros_like(number)
        if name == "mul":
            map = Map(number, nothing)
        elif name == "div":
            map = Map(1 / number, nothing)
        elif name == "add":
            map = Map(one * factor, number) if turned else Map(one, factor * number)
        else:
            map = Map(-factor * one, number) if turned else Map(one, -factor * number)
        if not bool(torch.isfinite(map.scale).all()):
            return None
        dtype = x.meta["val"].dtype
        return Affine(map.shrunk(), False, 0.0, dtype), [value]

    def _addcmul(self, fx_node: fx.Node, arguments: dict[str, Any]) -> tuple[Op, list[Value]] | None:
        """input + value · tensor1 · tensor2, two of which are constants."""
        parts = [arguments[name] for name in ("self", "tensor1", "tensor2")]
        flowing = [index for index, part in enumerate(parts) if part in self.values]
        if len(flowing) != 1 or not isinstance(arguments["value"], int | float):
            return None
        x = self.values[parts[flowing[0]]]
        if x.shape is None or not same(x, self.sizing.of(fx_node)):
            return None
        numbers = [_broadcast(self.constants.get(part), x.rank) for part in parts]
        others = [number for index, number in enumerate(numbers) if index != flowing[0]]
        if any(number is None for number in others):
            return None
        first, second = others[0], others[1]
        assert first is not None
        assert second is not None
        if flowing == [0]:
            shift = arguments["value"] * first * second
            map = Map(torch.ones_like(shift), shift)
        else:
            map = Map(arguments["value"] * second, first)
        if sum(map.varies(axis) for axis in range(map.rank)) > 1:
            return None
        return Affine(map.shrunk(), False, 0.0, fx_node.meta["val"].dtype), [x]

    # -- one value

    def _of_one_value(self, fx_node: fx.Node, x: fx.Node, base: str, arguments: dict[str, Any]) -> Op | None:
        value = self.values[x]
        if value.shape is None:
            return None
        rank = value.rank
        if base in _LIKE_ANOTHER:
            other = self.values[arguments["other"]]
            self.looks.append(Node(other.name, Sizes(), [other], [Value(fx_node.name, None)], fx_node))
            shape = other.known_shape()
            return Reshape(base, lambda t: t.reshape(shape))
        if base in _RESHAPE:
            return Reshape(base, self._call(fx_node))
        if base in _TRANSPOSE:
            distinct = torch.empty(list(range(rank)), device="meta")
            return Transpose(tuple(self._call(fx_node)(distinct).shape))
        if base == "to" or base == "_to_copy":
            return Identity() if fx_node.meta["val"].dtype == x.meta["val"].dtype else None
        slope = self.constants.get(arguments.get("weight")) if base == "prelu" else None
        if slope is not None:
            slopes = slope.detach().double().cpu()
            return Elementwise("prelu", lambda t: torch.prelu(t, slopes.to(t.dtype)), homogeneous=True)
        if fx_node.all_input_nodes != [x]:
            return None
        if base in ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"):
            return _clamp(base, arguments)
        if base in _ELEMENTWISE or base == "leaky_relu":
            return Elementwise(base, self._call(fx_node), homogeneous=base == "leaky_relu")
        if base == "neg":
            minus = torch.full([1] * rank, -1.0, dtype=torch.float64)
            return Affine(Map(minus, torch.zeros_like(minus)), False, 0.0, x.meta["val"].dtype)
        if base in _IDENTITY:
            return None if arguments.get("train") else Identity(self._call(fx_node))
        if base == "slice":
            return self._slice(value, fx_node, arguments)
        return self._spatial(fx_node, value, base, arguments)

    def _spatial(self, fx_node: fx.Node, value: Value, base: str, arguments: dict[str, Any]) -> Op | None:
        rank = value.rank
        call = self._call(fx_node)
        if base in _MAX_POOL:
            return Spatial(base, call, _last(_dimensions(base), rank), linear=False, keeps_constants=True)
        if base in _AVG_POOL:
            whole = not any(each(arguments["padding"], 1)) or not arguments["count_include_pad"]
            keeps = whole and arguments.get("divisor_override") is None
            return Spatial(base, call, _last(_dimensions(base), rank), linear=True, keeps_constants=keeps)
        if base in _ADAPTIVE_AVG_POOL:
            return Spatial(base, call, _last(_dimensions(base), rank), linear=True, keeps_constants=True)
        if base in _RESIZE:
            return Spatial(base, call, tuple(range(2, rank)), linear=True, keeps_constants=True)
        if base == "mean" and arguments.get("dim") and arguments.get("dtype") is None:
            axes = tuple(sorted(axis % rank for axis in arguments["dim"]))
            dropped = not arguments["keepdim"]
            return Spatial(base, call, axes, linear=True, keeps_constants=True, dropped=dropped)
        if base in ("pad", "constant_pad_nd"):
            mode, fill = arguments.get("mode", "constant"), arguments.get("value")
            if mode == "constant" and fill not in (None, 0, 0.0):
                return None
            axes = _last(len(arguments["pad"]) // 2, rank)
            return Spatial(f"{mode} pad", call, axes, linear=True, keeps_constants=mode != "constant")
        return None

    def _slice(self, value: Value, fx_node: fx.Node, arguments: dict[str, Any]) -> Op | None:
        axis = arguments["dim"] % value.rank
        bounds = [arguments["start"], arguments["end"], arguments["step"]]
        if value.sizes[axis][1] or not all(bound is None or isinstance(bound, int) for bound in bounds):
            return None
        size = value.known_shape()[axis]
        return Slice(axis, tuple(range(size))[slice(*bounds)])

    # -- operations of several results, of which each is read by itself

    def _item(self, fx_node: fx.Node) -> tuple[Op, list[Value]] | None:
        maker, index = fx_node.args
        if not isinstance(maker, fx.Node) or not isinstance(index, int):
            return None
        if self._pool_pair(maker):
            value = self.values[maker.args[0]]  # type: ignore[index]
            whole = self._call(maker)
            axes = _last(_dimensions(aten_name(maker)), value.rank)
            return Spatial("max pool", lambda x: whole(x)[0], axes, linear=False, keeps_constants=True), [value]
        if self._chunks(maker):
            value = self.values[maker.args[0]]  # type: ignore[index]
            axis = bind(maker)["dim"] % value.rank
            parts = [part.shape[axis] for part in maker.meta["val"]]
            start = sum(parts[:index])
            return Slice(axis, tuple(range(start, start + parts[index]))), [value]
        return None

    def _pool_pair(self, pool: fx.Node) -> bool:
        """Whether this is max pooling that returns indices too, of which only the values are read."""
        return (
            aten_name(pool) in _MAX_POOL_PAIR
            and pool.args[0] in self.values
            and pool not in self.effects.unstable
            and all(user.target is operator.getitem and user.args[1] == 0 for user in pool.users)
        )

    def _chunks(self, chunks: fx.Node) -> bool:
        """Whether this cuts a value of fixed size into parts, each of which is read by itself."""
        if aten_name(chunks) not in _CHUNKS or chunks.args[0] not in self.values:
            return False
        value = self.values[chunks.args[0]]  # type: ignore[index]
        axis = bind(chunks).get("dim")
        return (
            isinstance(axis, int)
            and value.shape is not None
            and not value.sizes[axis % value.rank][1]
            and chunks not in self.effects.unstable
            and all(user.target is operator.getitem for user in chunks.users)
        )

    def _call(self, fx_node: fx.Node) -> Callable[[Tensor], Tensor]:
        """The operator as it is written, as a function of its first argument; sizes are those of the example."""
        rest = fx.node.map_arg((fx_node.args[1:], fx_node.kwargs), self.sizing.number)
        call: Callable[..., Tensor] = fx_node.target  # type: ignore[assignment]
        return lambda x: call(x, *rest[0], **rest[1])


def each(argument: Any, rank: int) -> tuple[int, ...]:
    """One number for each of `rank` axes, where one may stand for all."""
    values = tuple(argument) if isinstance(argument, list | tuple) else (argument,)
    return values * rank if len(values) == 1 else values


def _broadcast(tensor: Tensor | None, rank: int) -> Tensor | None:
    """A constant as a map's tensor: float64, of that rank; None where it varies along more than one axis."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() > rank:
        return None
    number = tensor.detach().double().cpu()
    number = number.reshape([1] * (rank - number.dim()) + list(number.shape))
    if sum(size > 1 for size in number.shape) > 1 or not bool(torch.isfinite(number).all()):
        return None
    return number


def _last(count: int, rank: int) -> tuple[int, ...]:
    """So many axes at the end."""
    return tuple(range(rank - count, rank))


def _dimensions(base: str) -> int:
    """The digit in the name of a pool: how many axes it works along."""
    return next(int(letter) for letter in base if letter.isdigit())


def _clamp(base: str, arguments: dict[str, Any]) -> Op | None:
    if base == "relu":
        return relu()
    if base == "relu6":
        return bounded(0.0, 6.0, "relu6")
    low, high = arguments.get("min_val", arguments.get("min")), arguments.get("max_val", arguments.get("max"))
    bounds = [low, high]
    if any(bound is not None and not isinstance(bound, int | float) for bound in bounds):
        return None
    low, high = -torch.inf if low is None else float(low), torch.inf if high is None else float(high)
    return bounded(low, high, base) if low <= high else None

"""A network as folding sees it: values, nodes, and operations that say what commutes with a per-channel affine map.

Owns the vocabulary that every source format is translated into (`torch_graph` for torch.export programs) and an
evaluator of it, so that a fold can be checked by itself in float64. The channel is axis 1 of every value. Knows
neither how a fold is found nor which file format the network comes from.

The structure never changes: a fold replaces the `op` of some nodes (a BatchNorm becomes `Identity`, a layer gets other
weights, a ReLU becomes a `Clamp`), so undoing one is putting the former operations back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from export.fold.report import KeptNorm

Tensor = torch.Tensor


@dataclass(eq=False)
class Value:
    """A tensor that flows through the network.

    Attributes:
        shape: sizes as in the example that the graph was made with, or None where they are not known.
        fixed: for each dimension, whether every input has that size.
        origin: the source format's value.
        pinned: why it must stay what it is: ``"an input of the network"``, ``"an output of the network"``; else empty.
    """

    name: str
    shape: tuple[int, ...] | None
    fixed: tuple[bool, ...] = ()
    pinned: str = ""
    origin: object = None
    producer: Node | None = None
    users: list[Node] = field(default_factory=list)

    @property
    def readers(self) -> list[Node]:
        """The nodes that look at the elements, and not at the sizes alone."""
        return [node for node in self.users if not isinstance(node.op, Sizes)]

    @property
    def spatial_is_fixed(self) -> bool:
        """Whether all sizes after batch and channel are known and always the same."""
        return self.shape is not None and all(self.fixed[2:])


@dataclass(eq=False)
class Node:
    """One operation: `inputs` are the values it reads (constants are part of `op`), `origin` the source format's node.

    `read_as` stays the operation that was read, so that whoever writes the network back sees what has changed.
    """

    name: str
    op: Op
    inputs: list[Value]
    outputs: list[Value]
    origin: object = None

    def __post_init__(self) -> None:
        self.read_as = self.op

    @property
    def output(self) -> Value:
        return self.outputs[0]


class Op:
    """What a node computes."""

    def evaluate(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Layer(Op):
    """Convolution (1d, 2d, 3d), transposed convolution, or Linear (`rank` 0): y = W x + bias.

    Attributes:
        weight: [O, I/groups, *kernel]; transposed: [I, O/groups, *kernel]; Linear: [O, I].
        bias: None, [O], or a bias map [O, *spatial].
        padding: zeros read before and after each spatial dimension (transposed: rows cut off).
        shared: another node reads the same weight, so it may not change. (A shared bias may: whoever writes the network
            gives the layer one of its own.)
    """

    weight: Tensor
    bias: Tensor | None
    rank: int
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    shared: bool = False

    @property
    def channels_in(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def channels_out(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def reads_padding(self) -> bool:
        """Whether some output is made from fewer input elements than the others: a constant input gives no constant."""
        return self.transposed or any(side for pair in self.padding for side in pair)

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.rank == 0:
            return F.linear(x, weight, bias)
        if self.transposed:
            y = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.rank - 1](
                x, weight, None, self.stride, 0, self.output_padding, self.groups, self.dilation
            )
            for axis, (before, after) in enumerate(self.padding, start=2):
                y = y.narrow(axis, before, y.shape[axis] - before - after)
        else:
            flat = [side for pair in reversed(self.padding) for side in pair]
            x = F.pad(x, flat) if any(flat) else x
            y = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1](
                x, weight, None, self.stride, 0, self.dilation, self.groups
            )
        if bias is None:
            return y
        return y + (bias if bias.dim() > 1 else per_channel(bias, y.dim()))


@dataclass(frozen=True, eq=False)
class Norm(Op):
    """BatchNorm in eval mode: y = scale x + shift, `scale` and `shift` float64 [C]."""

    scale: Tensor
    shift: Tensor

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x * per_channel(self.scale, x.dim()).to(x.dtype) + per_channel(self.shift, x.dim()).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Identity(Op):
    """y = x: dropout in eval mode, and what is left of a folded BatchNorm."""

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


@dataclass(frozen=True, eq=False)
class Elementwise(Op):
    """The same function of every element. `homogeneous`: f(a x) = a f(x) for a ≥ 0, as ReLU and leaky ReLU have it."""

    label: str
    function: Callable[[Tensor], Tensor]
    homogeneous: bool = False

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])


@dataclass(frozen=True, eq=False)
class Clamp(Op):
    """y = min(max(x, low), high) with `low` and `high` float64 [C]; -inf and inf where there is no bound."""

    low: Tensor
    high: Tensor

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        low, high = (per_channel(bound, x.dim()).to(x.dtype) for bound in (self.low, self.high))
        return torch.minimum(torch.maximum(x, low), high)


@dataclass(frozen=True, eq=False)
class Spatial(Op):
    """Works on each channel by itself, the same way: pooling, resizing, padding, reshaping behind the channel axis.

    Attributes:
        linear: f(a x) = a f(x) for every a. Otherwise f is a maximum, and that holds for a ≥ 0 alone.
        keeps_constants: f(x + s) = f(x) + s. Not so where zeros are read or written at the border.
        any_channels: it takes one more channel as it is; a reshape to fixed sizes does not.
        stands_in: `function` commutes as the real one does but is not the same, so its numbers may not get into a file.
    """

    label: str
    function: Callable[[Tensor], Tensor]
    linear: bool
    keeps_constants: bool
    any_channels: bool = True
    stands_in: bool = False

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])


@dataclass(frozen=True, eq=False)
class Flatten(Op):
    """[N, C, *spatial] → [N, C·P], each channel's P positions side by side. `any_channels` as in `Spatial`."""

    any_channels: bool = True

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1)


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """Channels of the inputs, one after another."""

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, 1)


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Sum of two values of the same shape."""

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]


@dataclass(frozen=True, eq=False)
class Sizes(Op):
    """Looks at sizes alone: a fold may change the elements it gets, but not how many channels there are."""


@dataclass(frozen=True, eq=False)
class Opaque(Op):
    """Anything else. Nothing is folded through it; `label` names it, `reason` says why where that isn't plain."""

    label: str
    reason: str = ""


@dataclass(eq=False)
class Graph:
    """A network; `nodes` in an order in which each comes after what it reads.

    `unread` are the BatchNorms that could not even be read as `Norm`, with the reason; they stay.
    """

    nodes: list[Node]
    unread: tuple[KeptNorm, ...] = ()

    def norms(self) -> list[Node]:
        """The BatchNorms that are left."""
        return [node for node in self.nodes if isinstance(node.op, Norm)]


def connect(nodes: Iterable[Node], unread: Iterable[KeptNorm] = ()) -> Graph:
    """Make a graph of nodes, filling in each value's producer and users."""
    graph = Graph(list(nodes), tuple(unread))
    for node in graph.nodes:
        for value in node.outputs:
            value.producer = node
        for value in node.inputs:
            value.users.append(node)
    return graph


def per_channel(vector: Tensor, dimensions: int) -> Tensor:
    """[C] → [1, C, 1, …] with that many dimensions, to meet a value on its channel axis."""
    return vector.reshape(1, -1, *([1] * (dimensions - 2)))


def evaluate(targets: Sequence[Value], feeds: Mapping[Value, Tensor]) -> list[Tensor]:
    """Compute values from fed ones. Every path back from a target must end in a fed value."""
    known = dict(feeds)
    pending = list(targets)
    while pending:
        value = pending[-1]
        if value in known:
            pending.pop()
            continue
        node = value.producer
        if node is None or isinstance(node.op, Opaque):
            raise ValueError(f"{value.name} can't be computed from the values given")
        missing = [needed for needed in node.inputs if needed not in known]
        if missing:
            pending.extend(missing)
        else:
            known[value] = node.op.evaluate(*(known[needed] for needed in node.inputs))
            pending.pop()
    return [known[value] for value in targets]

"""What the operations of a network mean for folding: each says once how an affine map gets through it.

Owns the operations and, for each, `push` (an input is replaced by a map of it: what becomes of the output?) and `pull`
(the output is to be replaced by a map of it: what must become of the inputs?). Both raise `Refused` where that is not
exact. `Layer` and `Affine` take a map in. Knows neither how a fold is found nor where a network comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from export.fold.graph import Node, Op, Step, Value
from export.fold.maps import Map, Refused, reshaped

Tensor = torch.Tensor


class Operation(Op):
    """An operation with a meaning for folding."""

    def push(self, node: Node, index: int, map: Map) -> Step:
        """The map of the output, where input `index` is replaced by `map` of it. Refused where there is none."""
        raise self.refusal(node)

    def pull(self, node: Node, map: Map) -> list[Step]:
        """Ways to get `map` of the output by maps of the inputs, one map for each. Refused where there is none."""
        raise self.refusal(node)

    def refusal(self, node: Node) -> Refused:
        return Refused(f"a scale and shift does not pass through {self.label} at {node.name}")


class OfOneValue(Operation):
    """An operation through which a map gets alike in both directions."""

    def passes(self, node: Node, map: Map) -> Map:
        """The map on the other side. Refused where it does not get through."""
        raise self.refusal(node)

    def push(self, node: Node, index: int, map: Map) -> Step:
        return Step([self.passes(node, map)])

    def pull(self, node: Node, map: Map) -> list[Step]:
        return [Step([self.passes(node, map)])]


@dataclass(frozen=True, eq=False)
class Layer(Operation):
    """Convolution (1d, 2d, 3d), transposed convolution, or Linear on the last axis (`rank` 0): y = W x + bias.

    Attributes:
        weight: [O, I/groups, *kernel]; transposed: [I, O/groups, *kernel]; Linear: [O, I].
        bias: None, [O], or a bias map [O, *spatial].
        padding: zeros read before and after each spatial dimension (transposed: rows cut off). None where they depend
            on the input's size in a way that is not read: `function` then computes the layer, and no shift gets in.
        function: computes the layer from (x, weight), without a bias, where `padding` is None.
        shared: something else reads the same weight, so that a changed layer gets one of its own.
        dtype: that of the weight as it is written.
    """

    weight: Tensor
    bias: Tensor | None
    rank: int
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] | None = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    shared: bool = False
    dtype: torch.dtype = torch.float64
    function: Callable[[Tensor, Tensor], Tensor] | None = None

    label = "layer"

    @property
    def channels_in(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def channels_out(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def axis(self) -> int:
        """The channel axis of its input and output."""
        return 1 if self.rank else -1

    @property
    def reads_padding(self) -> bool:
        """Whether some output is made from fewer input elements than the others: a constant input gives no constant."""
        return self.transposed or self.padding is None or any(side for pair in self.padding for side in pair)

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.rank == 0:
            return F.linear(x, weight, bias)
        if self.padding is None:
            assert self.function is not None
            y = self.function(x, weight)
        elif self.transposed:
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
        return y + (bias if bias.dim() > 1 else bias.reshape(-1, *([1] * (y.dim() - 2))))


@dataclass(frozen=True, eq=False)
class Affine(Operation):
    """A fixed scale and shift: a BatchNorm in eval mode, or multiplications and additions of constants.

    Attributes:
        is_norm: it is a BatchNorm; each of those is in the report.
        offset: how many standard deviations a BatchNorm's mean is away from zero, at most.
        dtype: that of its parameters as they are written.
    """

    map: Map
    is_norm: bool = True
    offset: float = 0.0
    dtype: torch.dtype = torch.float64

    label = "a scale and shift"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x * self.map.scale.to(x.dtype) + self.map.shift.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Identity(OfOneValue):
    """y = x: dropout in eval mode, and what is left of a folded BatchNorm. `function` where memory is laid out anew."""

    function: Callable[[Tensor], Tensor] | None = None

    label = "identity"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0] if self.function is None else self.function(inputs[0])

    def passes(self, node: Node, map: Map) -> Map:
        return map


@dataclass(frozen=True, eq=False)
class Select(OfOneValue):
    """y = one of the inputs: what is left of a sum of which the other part is folded away.

    While the fold is on trial the node has both inputs, then the chosen one alone (`graph.forget`).
    """

    index: int

    label = "sum"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[self.index if len(inputs) > 1 else 0]

    def passes(self, node: Node, map: Map) -> Map:
        return map


@dataclass(frozen=True, eq=False)
class Elementwise(OfOneValue):
    """The same function of every element. `homogeneous`: f(a x) = a f(x) for a ≥ 0, as leaky ReLU has it."""

    label: str
    function: Callable[[Tensor], Tensor]
    homogeneous: bool = False

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def passes(self, node: Node, map: Map) -> Map:
        if not self.homogeneous or map.shifts or map.negative:
            raise self.refusal(node)
        return map


@dataclass(frozen=True, eq=False)
class Clamp(Operation):
    """y = min(max(x, low), high), float64 bounds that broadcast against x; -inf and inf where there is none.

    A ReLU is one with low = 0. Any map gets through by moving the bounds (`algebra`), where a negative scale makes a
    maximum out of a minimum.
    """

    low: Tensor
    high: Tensor
    label: str = "clamp"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return torch.minimum(torch.maximum(x, self.low.to(x.dtype)), self.high.to(x.dtype))

    def comparisons(self) -> int:
        """How many of its two bounds differ by channel, and so are a comparison with a constant of that many values."""
        return sum(bound.numel() > 1 for bound in (self.low, self.high))

    def homogeneous(self, map: Map) -> bool:
        """Whether the map gets through without moving a bound."""
        scaled = all(bool(((bound == 0) | torch.isinf(bound)).all()) for bound in (self.low, self.high))
        return scaled and not map.shifts and not map.negative

    def _moved(self, low: Tensor, high: Tensor) -> tuple[Op, int]:
        moved = replace(self, low=low, high=high, label="clamp")
        return moved, max(moved.comparisons() - self.comparisons(), 0)

    def pull(self, node: Node, map: Map) -> list[Step]:
        if self.homogeneous(map):
            return [Step([map])]
        ends = [torch.where(map.scale == 0, 0.0, map.scale * bound) + map.shift for bound in (self.low, self.high)]
        op, clamped = self._moved(torch.minimum(*ends), torch.maximum(*ends))
        return [Step([map], op, clamped)]

    def push(self, node: Node, index: int, map: Map) -> Step:
        if self.homogeneous(map):
            return Step([map])
        if map.bordered:
            raise Refused(f"{node.name} does not pass a shift that is missing at the border")
        scale, shift = map.scale + 0 * map.shift, map.shift + 0 * map.scale
        nothing = scale == 0
        divisor = torch.where(nothing, 1.0, scale)
        ends = [torch.where(nothing, 0.0, (bound - shift) / divisor) for bound in (self.low, self.high)]
        low = torch.where(nothing, -torch.inf, torch.minimum(*ends))
        high = torch.where(nothing, torch.inf, torch.maximum(*ends))
        constant = torch.minimum(torch.maximum(shift, self.low), self.high)
        op, clamped = self._moved(low, high)
        return Step([Map(scale, torch.where(nothing, constant, shift)).shrunk()], op, clamped)


@dataclass(frozen=True, eq=False)
class Spatial(Operation):
    """Works along some axes and treats all others alike: pooling, resizing, padding, averaging.

    Attributes:
        axes: those that it works along, in the input, from 0.
        linear: f(a x) = a f(x) for every a. Otherwise f is a maximum, and that holds for a ≥ 0 alone.
        keeps_constants: f(x + s) = f(x) + s. Not so where zeros are read or written at the border.
        dropped: the axes are missing in the output.
        stands_in: `function` commutes as the real one does but is not the same, so its numbers may not get into a file.
    """

    label: str
    function: Callable[[Tensor], Tensor]
    axes: tuple[int, ...]
    linear: bool
    keeps_constants: bool
    dropped: bool = False
    stands_in: bool = False

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def _checked(self, node: Node, map: Map) -> Map:
        if any(map.varies(axis) for axis in self.axes):
            raise Refused(f"{node.name} ({self.label}) works along an axis on which the scale and shift vary")
        if not self.linear and map.negative:
            raise Refused(f"{node.name} ({self.label}) takes a maximum, and {map.negative} scales are negative")
        if not self.linear and map.bordered:
            raise Refused(f"{node.name} does not pass a shift that is missing at the border")
        joined = not self.keeps_constants and map.shifts
        if joined and not self.linear:
            raise Refused(f"{node.name} ({self.label}) takes a maximum over a border, where the shift is missing")
        return replace(map, bordered=map.bordered or joined)

    def push(self, node: Node, index: int, map: Map) -> Step:
        map = self._checked(node, map)
        return Step([map.moved(lambda t: t.squeeze(self.axes)) if self.dropped else map])

    def pull(self, node: Node, map: Map) -> list[Step]:
        if self.dropped:
            for axis in sorted(self.axes):
                map = map.moved(lambda t, axis=axis: t.unsqueeze(axis))  # type: ignore[misc]
        map = self._checked(node, map)
        if map.bordered:
            raise Refused(f"{node.name} reads or writes zeros at the border, so the shift does not pass")
        return [Step([map])]


@dataclass(frozen=True, eq=False)
class Reshape(Operation):
    """The same elements in the same order, other sizes. `function` is the operation as it is written."""

    label: str
    function: Callable[[Tensor], Tensor]

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def push(self, node: Node, index: int, map: Map) -> Step:
        before, after = (_sizes(value) for value in (node.inputs[0], node.output))
        return Step([map.moved(lambda t: reshaped(t, before, after))])

    def pull(self, node: Node, map: Map) -> list[Step]:
        before, after = (_sizes(value) for value in (node.inputs[0], node.output))
        return [Step([map.moved(lambda t: reshaped(t, after, before))])]


@dataclass(frozen=True, eq=False)
class Transpose(Operation):
    """Axes in another order, as `Tensor.permute` takes it."""

    order: tuple[int, ...]

    label = "transposition"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(self.order)

    def push(self, node: Node, index: int, map: Map) -> Step:
        return Step([map.moved(lambda t: t.permute(self.order))])

    def pull(self, node: Node, map: Map) -> list[Step]:
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return [Step([map.moved(lambda t: t.permute(inverse))])]


@dataclass(frozen=True, eq=False)
class Slice(Operation):
    """Some of the elements along one axis: those at `indices`, in that order."""

    axis: int
    indices: tuple[int, ...]

    label = "slice"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return inputs[0].index_select(self.axis, torch.tensor(self.indices))

    def push(self, node: Node, index: int, map: Map) -> Step:
        def cut(tensor: Tensor) -> Tensor:
            indices = torch.tensor(self.indices)
            return tensor if tensor.shape[self.axis] == 1 else tensor.index_select(self.axis, indices)

        return Step([map.moved(cut)])

    def pull(self, node: Node, map: Map) -> list[Step]:
        size = node.inputs[0].known_shape()[self.axis]

        def spread(tensor: Tensor, elsewhere: float) -> Tensor:
            if tensor.shape[self.axis] == 1:
                return tensor
            sizes = list(tensor.shape)
            sizes[self.axis] = size
            whole = torch.full(sizes, elsewhere, dtype=torch.float64)
            return whole.index_copy(self.axis, torch.tensor(self.indices), tensor)

        return [Step([Map(spread(map.scale, 1.0), spread(map.shift, 0.0)).shrunk()])]


@dataclass(frozen=True, eq=False)
class Concat(Operation):
    """The inputs one after another along an axis."""

    axis: int = 1

    label = "concatenation"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.axis)

    def _starts(self, node: Node) -> list[int]:
        starts = [0]
        for value in node.inputs:
            starts.append(starts[-1] + value.known_shape()[self.axis])
            if value.sizes[self.axis][1]:
                raise Refused(f"{node.name} concatenates along an axis of no fixed size")
        return starts

    def push(self, node: Node, index: int, map: Map) -> Step:
        """The other parts stay as they are."""
        starts = self._starts(node)

        def placed(tensor: Tensor, elsewhere: float) -> Tensor:
            sizes = list(tensor.shape)
            sizes[self.axis] = starts[-1]
            whole = torch.full(sizes, elsewhere, dtype=torch.float64)
            whole.narrow(self.axis, starts[index], starts[index + 1] - starts[index]).copy_(tensor)
            return whole

        return Step([Map(placed(map.scale, 1.0), placed(map.shift, 0.0), map.bordered).shrunk()])

    def pull(self, node: Node, map: Map) -> list[Step]:
        """Each part by itself."""
        if not map.varies(self.axis):
            return [Step([map] * len(node.inputs))]
        starts = self._starts(node)

        def part(tensor: Tensor, index: int) -> Tensor:
            if tensor.shape[self.axis] == 1:
                return tensor
            return tensor.narrow(self.axis, starts[index], starts[index + 1] - starts[index])

        return [Step([map.moved(lambda t, i=i: part(t, i)) for i in range(len(node.inputs))])]  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Sum(Operation):
    """Sum of two values of the same shape, each times its sign, 1 or -1."""

    signs: tuple[int, int] = (1, 1)

    label = "sum"

    def evaluate(self, *inputs: Tensor) -> Tensor:
        first, second = (value if sign > 0 else -value for value, sign in zip(inputs, self.signs, strict=True))
        return first + second

    def pull(self, node: Node, map: Map) -> list[Step]:
        """The scale goes into both sides, the shift into either."""
        bare = replace(map, shift=torch.zeros_like(map.shift)).shrunk()
        if not map.shifts:
            return [Step([bare, bare])]
        first, second = (replace(map, shift=sign * map.shift) for sign in self.signs)
        return [Step([first, bare]), Step([bare, second])]


@dataclass(frozen=True, eq=False)
class Sizes(Operation):
    """Looks at sizes alone: a fold may change the elements it gets, but not how many channels there are."""

    label = "a look at the sizes"
    reads_elements = False


@dataclass(frozen=True, eq=False)
class Opaque(Operation):
    """Anything else. Nothing is folded through it; `label` names it, `reason` says why where that isn't plain."""

    label: str
    reason: str = ""

    def evaluate(self, *inputs: Tensor) -> Tensor:
        raise Refused(f"{self.label} is not computed here")

    def refusal(self, node: Node) -> Refused:
        reason = f" ({self.reason})" if self.reason else ""
        return Refused(f"a scale and shift does not pass through {self.label} at {node.name}{reason}")


def relu() -> Clamp:
    """max(x, 0)."""
    return bounded(0.0, torch.inf, "relu")


def bounded(low: float, high: float, label: str) -> Clamp:
    """min(max(x, low), high)."""
    return Clamp(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), label)


def _sizes(value: Value) -> tuple[Sequence[int], Sequence[tuple[int, tuple[str, ...]]]]:
    return value.known_shape(), value.sizes

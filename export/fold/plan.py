"""A way to fold one BatchNorm: which operations to put in, and what that costs the runtime.

Owns the value type and the prices. Knows neither how a way is found nor how it is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from export.fold.graph import Node, Op, Step, Value
from export.fold.maps import Refused
from export.fold.operations import Affine, Layer, Operation
from export.fold.report import Runtime

ALIGNMENT = 4


@dataclass(frozen=True)
class Prices:
    """What a runtime takes for what folding adds, in multiply-adds.

    Attributes:
        kept: of one element of a BatchNorm that stays: what a fold may cost at most.
        mapped: of one element of an added map, a pass of its own through memory.
        stored: of each element, besides, of a map too large for a cache (`CACHED`), which every call reads from memory.
        copied: of one weight that was shared before.
        clamped: of one element of a comparison with one bound per channel.
        unaligned: of a channel of ones that leaves a layer's channels no multiple of ALIGNMENT any more, as a share of
            that layer's work and of those that read it.
    """

    kept: float
    mapped: float
    stored: float
    copied: float
    clamped: float
    unaligned: float


PRICES: dict[Runtime, Prices] = {
    "onnxruntime": Prices(kept=100.0, mapped=32.0, stored=1000.0, copied=0.1, clamped=96.0, unaligned=0.25),
    "torch": Prices(kept=100.0, mapped=32.0, stored=1000.0, copied=0.1, clamped=2.0, unaligned=0.25),
}
"""`mapped`, `clamped` and `unaligned` order the ways as they were measured (two AVX-512 cores; docs/strategies.md).
`kept`, `stored` and `copied` are estimates: `kept` lies between one comparison per element, at which onnxruntime broke
about even, and two, at which it lost.

onnxruntime joins a ReLU to the layer before and keeps both in its blocked layout, which a maximum per channel leaves,
and whose convolutions are not used with other than multiples of four channels: on the article's network, two channels
of ones, of which the second breaks 20 to 21, came to 0.88 to 0.94 of the throughput of one with a bias map.

To torch a maximum per channel is one operation, as the ReLU was: floors alone were 1 to 10 % faster than channels of
ones and maps.
"""

CACHED = 2**16
"""Elements of a bias map, 256 KiB in float32, that stay in a core's cache.

An estimate. Maps for two BatchNorms of 32 channels at 384² made a file of 0.05 MB one of 21 MB, which ran at 0.93 of
it: a larger map has to replace a BatchNorm ten times as large.
"""

MOST_WEIGHTS = 2**24
"""Weights that a convolution with groups may come to have when it is written with one group."""


@dataclass
class Plan:
    """A home for a map.

    Attributes:
        changes: the operations to put in.
        passed: the nodes that the map goes through unchanged.
        wider: values that get more channels, and their sizes in the example then.
        ahead: the map goes into what comes after. Its mean and what the next layer makes of it then cancel there.
        work, mapped, stored, copied, clamped, unaligned: what it costs for one image, in the units of `Prices`.
    """

    method: str
    changes: dict[Node, Op] = field(default_factory=dict)
    passed: set[Node] = field(default_factory=set)
    wider: dict[Value, tuple[int, ...]] = field(default_factory=dict)
    ahead: bool = False
    work: float = 0.0
    mapped: int = 0
    stored: int = 0
    copied: int = 0
    clamped: int = 0
    unaligned: float = 0.0

    def cost(self, prices: Prices) -> float:
        """In multiply-adds for one image: what layers have to do more, and the rest as it is priced."""
        return (
            self.work
            + prices.mapped * self.mapped
            + prices.stored * self.stored
            + prices.copied * self.copied
            + prices.clamped * self.clamped
            + prices.unaligned * self.unaligned
        )

    def copy(self) -> Plan:
        return replace(self, changes=dict(self.changes), passed=set(self.passed), wider=dict(self.wider))

    def op(self, node: Node) -> Operation:
        """What `node` computes with this plan."""
        op = self.changes.get(node, node.op)
        assert isinstance(op, Operation)
        return op

    def put(self, node: Node, layer: Layer) -> None:
        """Give `node` this layer, which from then on has weights of its own."""
        if layer.shared:
            self.copied += layer.weight.numel()
        self.changes[node] = replace(layer, shared=False)

    def take(self, node: Node, step: Step, clamps: bool) -> None:
        """Go through `node`. Refused where that takes bounds per channel and `clamps` does not allow them."""
        if step.op is None:
            self.passed.add(node)
            return
        if step.clamped and not clamps:
            raise Refused(f"{node.op.label} at {node.name} lets it pass with a bound for each channel alone")
        self.clamped += step.clamped * elements(node.output)
        self.changes[node] = step.op

    def into(self, norm: Node) -> tuple[str, ...]:
        """The names of the layers and BatchNorms that take the map."""
        return tuple(
            node.name for node, op in self.changes.items() if node is not norm and isinstance(op, Layer | Affine)
        )


def elements(value: Value) -> int:
    """Elements for one image."""
    return math.prod(value.known_shape()[1:])


def positions(node: Node, layer: Layer) -> int:
    """How many times the kernel is applied to one image."""
    shape = (node.inputs[0] if layer.transposed else node.output).known_shape()
    return math.prod(shape[2:]) if layer.rank else math.prod(shape[1:-1])


def work(node: Node, layer: Layer) -> int:
    """Multiply-adds for one image."""
    return layer.weight.numel() * positions(node, layer)

"""A network as folding sees it: values, nodes, and what each node computes.

Owns the structure that every source format is translated into (`from_torch`, `from_onnx`) and its evaluator, so that a
fold can be checked by itself in float64. What the operations mean for folding stands in `operations`. Knows neither how
a fold is found nor which file format the network comes from.

While folds are tried, the structure stays: a fold replaces the `op` of some nodes (a BatchNorm becomes `Identity`, a
layer gets other weights, a ReLU other bounds), so undoing one is putting the former operations back. Once a fold holds,
`forget` takes away what nothing reads any more.

The graph is functional: a reader makes sure that no value changes after it was made, or says so in `Value.unstable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from export.fold.maps import Map, Refused, Size
from export.fold.report import KeptNorm

Tensor = torch.Tensor


@dataclass(eq=False)
class Value:
    """A tensor that flows through the network.

    Attributes:
        shape: sizes in the example that folds are checked with, or None where they are not known.
        sizes: the same in general, as `maps.Size`; as many as `shape`.
        pinned: why it must stay what it is: ``"an input of the network"``, ``"an output of the network"``; else empty.
        unstable: why its elements are not those that its producer made: something writes into it, or into another
            tensor of the same memory. Such a value must stay, and no other may take its place or be replaced by it.
        origin: the source format's value.
    """

    name: str
    shape: tuple[int, ...] | None
    sizes: tuple[Size, ...] = ()
    pinned: str = ""
    unstable: str = ""
    origin: object = None
    producer: Node | None = None
    users: list[Node] = field(default_factory=list)

    @property
    def readers(self) -> list[Node]:
        """The nodes that look at the elements, and not at the sizes alone; one for each time that it does."""
        return [node for node in self.users if node.op.reads_elements]

    @property
    def rank(self) -> int:
        return len(self.known_shape())

    @property
    def fixed(self) -> bool:
        """Whether all sizes but the first are known and always the same."""
        return self.shape is not None and not any(symbols for _, symbols in self.sizes[1:])

    def known_shape(self) -> tuple[int, ...]:
        """`shape`, or Refused."""
        if self.shape is None:
            raise Refused(f"the shape of {self.name} is not known")
        return self.shape


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


@dataclass
class Step:
    """What becomes of a map on its way through an operation.

    Attributes:
        maps: the map of the one value it arrives at; of each input, when it is on its way back.
        op: the operation with which that is exact, where it is another one.
        clamped: by how many more comparisons with one bound per channel that operation differs, per element.
    """

    maps: list[Map]
    op: Op | None = None
    clamped: int = 0


class Op:
    """What a node computes."""

    label: str
    reads_elements: bool = True

    def evaluate(self, *inputs: Tensor) -> Tensor:
        """Compute it, in the inputs' dtype, by the arguments that are written in the network."""
        raise NotImplementedError


@dataclass(eq=False)
class Graph:
    """A network; `nodes` in an order in which each comes after what it reads.

    `unread` are the BatchNorms that could not even be read as such, with the reason; they stay.
    """

    nodes: list[Node]
    unread: tuple[KeptNorm, ...] = ()


def connect(nodes: Iterable[Node], unread: Iterable[KeptNorm] = ()) -> Graph:
    """Make a graph of nodes, filling in each value's producer and users."""
    graph = Graph(list(nodes), tuple(unread))
    for node in graph.nodes:
        for value in node.outputs:
            value.producer = node
        for value in node.inputs:
            value.users.append(node)
    return graph


def forget(node: Node, value: Value) -> None:
    """`node` reads `value` no more; what was made for it alone reads nothing either."""
    pending = [(node, value)]
    while pending:
        reader, read = pending.pop()
        reader.inputs.remove(read)
        read.users.remove(reader)
        maker = read.producer
        if maker is not None and not any(made.users or made.pinned or made.unstable for made in maker.outputs):
            pending += [(maker, other) for other in maker.inputs]


def evaluate(targets: Sequence[Value], feeds: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
    """Compute values from fed ones; returns them with all that was computed on the way.

    Every path back from a target must end in a fed value: Refused otherwise.
    """
    known = dict(feeds)
    pending = list(targets)
    while pending:
        value = pending[-1]
        if value in known:
            pending.pop()
            continue
        node = value.producer
        if node is None:
            raise Refused(f"{value.name} can't be computed from the values given")
        missing = [needed for needed in node.inputs if needed not in known]
        if missing:
            pending.extend(missing)
        else:
            known[value] = node.op.evaluate(*(known[needed] for needed in node.inputs))
            pending.pop()
    return known

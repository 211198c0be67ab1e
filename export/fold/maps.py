"""Affine maps that travel through a network: y = scale·x + shift, elementwise, broadcast against a value.

Owns the value type and how its two tensors follow a reshape. A BatchNorm is such a map that varies along the channel
axis alone; behind a flattening the same map varies along the flattened axis, behind a transposition along another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

Tensor = torch.Tensor

Size = tuple[int, tuple[str, ...]]
"""A size that may depend on the input: a number times symbols, sorted. `(6, ())` is fixed."""


class Refused(Exception):
    """This way of folding is not exact or not allowed; the message is for the report."""


class Inapplicable(Refused):
    """This way of folding is for another place: no obstacle, and nothing for the report."""


@dataclass(frozen=True, eq=False)
class Map:
    """y = scale·x + shift.

    Attributes:
        scale, shift: float64, with the rank of the value that they act on; each size is the value's, or 1 where the map
            does not vary.
        bordered: zeros have joined the shift at a border on the way, so it varies along axes where its size is 1.
    """

    scale: Tensor
    shift: Tensor
    bordered: bool = False

    @classmethod
    def along(cls, scale: Tensor, shift: Tensor, axis: int, rank: int) -> Map:
        """The map that varies along one axis: `scale` and `shift` [C]."""
        sizes = [1] * rank
        sizes[axis] = -1
        return cls(scale.double().reshape(sizes), shift.double().reshape(sizes))

    @property
    def rank(self) -> int:
        return self.scale.dim()

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def negative(self) -> int:
        """How many of its scales are negative."""
        return int((self.scale < 0).sum())

    def varies(self, axis: int) -> bool:
        return self.scale.shape[axis] > 1 or self.shift.shape[axis] > 1

    def then(self, after: Map) -> Map:
        """This map followed by another one of the same value."""
        return Map(
            after.scale * self.scale, after.scale * self.shift + after.shift, self.bordered or after.bordered
        ).shrunk()

    def moved(self, move: Callable[[Tensor], Tensor]) -> Map:
        """The map behind an operation that moves elements, `move`, which takes each of the two tensors."""
        return replace(self, scale=move(self.scale), shift=move(self.shift)).shrunk()

    def vectors(self, axis: int, size: int, what: str) -> tuple[Tensor, Tensor]:
        """Scale and shift [size] of a map that varies along `axis` alone. Refused otherwise; `what` says for whom."""
        if any(self.varies(other) for other in range(self.rank) if other != axis % self.rank):
            raise Refused(f"each position has a scale and shift of its own where {what} has one for each channel")
        scale, shift = (tensor.reshape(-1).expand(size) for tensor in (self.scale, self.shift))
        return scale, shift

    def shrunk(self) -> Map:
        """The same map, with size 1 along axes where it does not vary."""
        return replace(self, scale=shrink(self.scale), shift=shrink(self.shift))


def shrink(tensor: Tensor) -> Tensor:
    """`tensor` with size 1 along each axis along which it is constant."""
    for axis, size in enumerate(tensor.shape):
        if size > 1 and bool((tensor == tensor.narrow(axis, 0, 1)).all()):
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def times(one: Size, other: Size) -> Size:
    """The product of two sizes."""
    return one[0] * other[0], tuple(sorted(one[1] + other[1]))


def reshaped(
    tensor: Tensor,
    before: tuple[Sequence[int], Sequence[Size]],
    after: tuple[Sequence[int], Sequence[Size]],
) -> Tensor:
    """A map's tensor behind a reshape, which keeps the order of elements.

    `before` and `after` are the value's sizes, in the example and in general. Axes fall into groups that are reshaped
    apart from each other, and the groups must be the same for every input: their products are compared as symbols.
    Where the map varies within a group it is spelled out over all of it, which needs sizes that are fixed. Refused
    where they are not.
    """
    (old, old_sizes), (new, new_sizes) = before, after
    expanded, result = list(tensor.shape), [1] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        left: Size = (1, ())
        right: Size = (1, ())
        left_example = right_example = 1
        while left != right or (i, j) == (first_old, first_new):
            if i < len(old) and (left_example <= right_example or j == len(new)):
                left, left_example = times(left, old_sizes[i]), left_example * old[i]
                i += 1
            elif j < len(new):
                right, right_example = times(right, new_sizes[j]), right_example * new[j]
                j += 1
            else:
                break
        # What is left at the end can only be sizes of 1: they belong to the group before.
        if all(size == (1, ()) for size in (*old_sizes[i:], *new_sizes[j:])):
            i, j = len(old), len(new)
        if all(size == 1 for size in tensor.shape[first_old:i]):
            continue
        if any(size[1] for size in (*old_sizes[first_old:i], *new_sizes[first_new:j])):
            raise Refused("a reshape mixes the channels with a size that is not fixed")
        expanded[first_old:i] = old[first_old:i]
        result[first_new:j] = new[first_new:j]
    return tensor.expand(expanded).reshape(result)

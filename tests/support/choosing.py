"""Random choices from one source, and what a random network may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Draw = Callable[[int, int], int]
"""A whole number between two, both included."""

LARGEST = 1e4
"""A step that makes larger values is not taken: errors of rounding would grow with them."""

MOST_ELEMENTS = 6000


class Chooser:
    """Random choices from one source, so that a network is its seed's, or shrinks under hypothesis."""

    def __init__(self, draw: Draw) -> None:
        self.number = draw

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.number(0, len(options) - 1)]

    def one_in(self, many: int) -> bool:
        return self.number(1, many) == many

    def weighted(self, weights: Mapping[str, int]) -> str:
        left = self.number(1, sum(weights.values()))
        for name, weight in weights.items():
            left -= weight
            if left <= 0:
                return name
        raise AssertionError

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.number(0, 1_000_000))

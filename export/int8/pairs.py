"""Sums of two products: where 8-bit weights let them leave 16 bits, and scales with which they can't.

A kernel multiplies unsigned activations, at most 255, by signed weights; neighbours in a row of weights are added up in
16 bits by `vpmaddubsw` (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2), which saturates. The
sum is largest where both weights have the same sign: 255 · 128 = 32,640 fits, 255 · 129 does not. Owns this algebra on
matrices [channels, K] whose rows are in the order in which a kernel reads them. Knows no file.
"""

from __future__ import annotations

import numpy as np

LARGEST_ACTIVATION = 255
LARGEST_WEIGHT = 127
LOWEST_SUM, HIGHEST_SUM = -(2**15), 2**15 - 1
SAFE_SUM = HIGHEST_SUM // LARGEST_ACTIVATION
"""Two weights of one sign that add up to no more than this can't saturate, whatever the activations."""


def as_pairs(rows: np.ndarray) -> np.ndarray:
    """Rows [channels, K] as pairs of neighbours [channels, ⌈K/2⌉, 2], the last filled up with a zero."""
    return np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)


def can_saturate(rows: np.ndarray) -> np.ndarray:
    """Which pairs of int8 weights [channels, K] some activations can drive out of 16 bits, bool [channels, ⌈K/2⌉]."""
    highest, lowest = _sums(as_pairs(rows).astype(np.int64))
    found: np.ndarray = (highest * LARGEST_ACTIVATION > HIGHEST_SUM) | (lowest * LARGEST_ACTIVATION < LOWEST_SUM)
    return found


def worst_pairs(rows: np.ndarray) -> np.ndarray:
    """Rows [channels, 4] in which the two largest weights of a row [channels, K] are neighbours, and the two lowest.

    Where these can't saturate the row can't in any order, for kernels whose order is not known.
    """
    filled = np.sort(np.pad(rows, ((0, 0), (0, 2))), axis=1)  # a row of one weight has it alone
    return np.concatenate([filled[:, -2:], filled[:, :2]], axis=1)


def safe_scales(rows: np.ndarray) -> np.ndarray:
    """A scale for each row of weights [channels, K], float64 [channels], with which no pair can saturate.

    The finest with which every weight is within ±127 and, rounding at its worst, the sum of two neighbours of one sign
    within 128. Of a row of zeros it is 1.
    """
    highest, lowest = _sums(as_pairs(rows.astype(np.float64)))
    sums = np.maximum(highest, -lowest).max(1)
    # Each of two weights is rounded up by half a step at most.
    scales = np.maximum(np.abs(rows).max(1) / LARGEST_WEIGHT, sums / (SAFE_SUM - 1))
    return np.where(scales > 0, scales, 1.0)


def _sums(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the lowest sums [channels, pairs] of what two weights may add up, by their signs."""
    return np.maximum(pairs, 0).sum(2), np.minimum(pairs, 0).sum(2)


def excess(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What saturation takes from the sums of one pair: activations int32 [N], twice, and weights [channels, 2] → [N,
    channels], to be subtracted from the exact sums.
    """
    sums = first[:, None] * weights[:, 0] + second[:, None] * weights[:, 1]
    over: np.ndarray = sums - np.clip(sums, LOWEST_SUM, HIGHEST_SUM)
    return over

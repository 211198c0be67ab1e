"""The algebra of saturation, against every sum that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from export.int8.pairs import (
    HIGHEST_SUM,
    LOWEST_SUM,
    can_saturate,
    excess,
    safe_scales,
    worst_pairs,
)

ACTIVATIONS = np.arange(256)


def leaves_16_bits(first: int, second: int) -> bool:
    """By trying all activations of each of the two."""
    sums = first * ACTIVATIONS[:, None] + second * ACTIVATIONS
    return bool(sums.max() > HIGHEST_SUM or sums.min() < LOWEST_SUM)


@pytest.mark.parametrize(
    "pair", [(127, 1), (127, 2), (64, 64), (65, 64), (-128, 0), (-127, -1), (-127, -2), (-128, 127), (0, 0), (-64, -65)]
)
def test_which_pairs_can_saturate(pair: tuple[int, int]) -> None:
    assert can_saturate(np.array([pair], np.int8))[0, 0] == leaves_16_bits(*pair)


def test_a_last_weight_without_a_neighbour() -> None:
    assert can_saturate(np.array([[100, 100, 127]], np.int8)).tolist() == [[True, False]]


def test_scales_with_which_no_pair_saturates() -> None:
    rng = np.random.default_rng(0)
    for width in (1, 2, 3, 9, 40):
        rows = rng.standard_normal((500, width)) * rng.choice([1e-3, 1, 50], (500, 1))
        rows[0] = 0
        scales = safe_scales(rows)
        whole = np.rint(rows / scales[:, None])
        assert np.abs(whole).max() <= 127
        assert not can_saturate(whole.astype(np.int8)).any()
        finer = np.rint(rows / (0.97 * scales[:, None]))
        too_large = (np.abs(finer) > 127).any(1)
        assert (too_large | can_saturate(finer.clip(-128, 127).astype(np.int8)).any(1) | (scales == 1)).mean() > 0.5


def test_rows_that_are_safe_in_any_order() -> None:
    rng = np.random.default_rng(1)
    for width in (1, 2, 3, 6):
        rows = rng.standard_normal((50, width))
        whole = np.rint(rows / safe_scales(worst_pairs(rows))[:, None]).astype(np.int8)
        for order in itertools.permutations(range(width)):
            assert not can_saturate(whole[:, order]).any()
    assert can_saturate(worst_pairs(np.array([[100, -1, 100]], np.int8))).any()
    assert not can_saturate(np.array([[100, -1, 100]], np.int8)).any()


def test_what_saturation_takes() -> None:
    first, second = np.array([255, 10, 255], np.int32), np.array([255, 10, 0], np.int32)
    weights = np.array([[127, 127], [-128, -128], [1, 1]], np.int32)
    lost = excess(first, second, weights)
    assert lost.tolist() == [
        [255 * 254 - HIGHEST_SUM, -255 * 256 - LOWEST_SUM, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]

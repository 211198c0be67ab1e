"""How far right logits may be off: the bound of top-1 against published figures, and what a manifest states."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binom

from export.bundle import Tolerances
from export.bundle.limits import RmsLimit, explained_flips, spread, top1_loss_bound

TOLERANCES = Tolerances(float32_rms_error=1e-6)


def test_the_bound_of_top1_is_tangos() -> None:
    """Fagerland, Lydersen & Laake (Stat. Med. 33, 2014) give -0.517 to -0.026 for 1 and 7 of 21, two-sided 95 %."""
    assert top1_loss_bound(1, 7, 21, z=1.959964) == pytest.approx(-0.026, abs=5e-4)
    assert -top1_loss_bound(7, 1, 21, z=1.959964) == pytest.approx(-0.517, abs=5e-4)


@pytest.mark.parametrize("images", [20, 200, 10_000])
def test_the_bound_without_any_change_is_in_closed_form(images: int) -> None:
    z2 = 1.6448536**2
    assert top1_loss_bound(0, 0, images) == pytest.approx(z2 / (images + z2), rel=1e-6)
    assert top1_loss_bound(images, 0, images) == pytest.approx(1)
    assert -1 <= top1_loss_bound(0, images, images) < -0.7


def test_the_bound_covers() -> None:
    """Of files that lose 1 % of 1,000 images and gain nothing, at most about 5 % are given a bound below 1 %."""
    missed = sum(binom.pmf(lost, 1000, 0.01) for lost in range(40) if top1_loss_bound(lost, 0, 1000) < 0.01)
    assert 0.01 < missed < 0.07


def test_the_bound_grows_with_what_is_lost_and_falls_with_the_images() -> None:
    bounds = [top1_loss_bound(lost, 3, 500) for lost in range(30)]
    assert bounds == sorted(bounds)
    assert top1_loss_bound(10, 3, 5000) < top1_loss_bound(10, 3, 500)
    assert top1_loss_bound(3, 60, 1000) < 0


def test_flips_are_explained_by_normal_errors() -> None:
    """Against a simulation: two scores are exact, for more the sum over the pairs is an upper bound."""
    rng = np.random.default_rng(0)
    for classes, slack in ((2, 1.1), (10, 2.0)):
        truth = rng.standard_normal((20_000, classes))
        flips = np.mean((truth + 0.1 * rng.standard_normal(truth.shape)).argmax(1) != truth.argmax(1))
        assert 0.9 * flips < explained_flips(truth, 0.1) / 20_000 < slack * flips
    assert explained_flips(np.array([[1.0, 0.0]]), 0.5) == pytest.approx(0.5 * math.erfc(1.0))


def test_what_moves_no_prediction_is_not_in_the_spread() -> None:
    logits = np.random.default_rng(0).standard_normal((100, 10))
    offset = 1000 * np.random.default_rng(1).standard_normal((100, 1))
    assert spread(logits + offset) == pytest.approx(spread(logits))
    assert spread(logits[:, :1] + 1000) == pytest.approx(np.std(logits[:, :1]))


def test_few_images_are_allowed_more_but_not_as_much_as_they_say() -> None:
    truth = np.random.default_rng(0).standard_normal((400, 10))
    limit = RmsLimit.of(truth, Tolerances(float32_rms_error=1e-7), "int8", tf32=False)
    assert limit.value == pytest.approx(0.2 * spread(truth))
    shares = [limit.on(truth[:count]) / limit.value for count in (1, 100, 400)]
    assert 2 <= shares[0] < 4  # and not 5, with which zeros would pass
    assert shares[1:] == pytest.approx([1.4, 1.2])
    strict = RmsLimit.of(truth, TOLERANCES, "float32", tf32=False)
    assert strict.value == pytest.approx(4e-6)
    assert strict.on(truth[:1]) == pytest.approx(5 * 4e-6)
    assert (limit.on_each(truth) <= np.maximum(2 * limit.value, limit.spread * 1.5)).all()
    assert np.allclose([limit.on(truth[place : place + 1]) for place in range(9)], limit.on_each(truth)[:9])


OLD = {
    "strict_rms_factor": 4.0,
    "strict_flip_margin": 0.0001,
    "fast_top1_points": 0.05,
    "fast_flips_percent": 0.1,
    "int8_top1_points": 0.1,
    "int8_p_value": 0.01,
    "int8_flips_percent_without_labels": 1.0,
    "float32_rms_error": 1e-6,
}


def test_a_manifest_of_before_still_reads() -> None:
    assert Tolerances.model_validate(OLD) == TOLERANCES
    assert Tolerances.model_validate(OLD | {"strict_rms_factor": 3.0}).strict_rms_factor == 3
    assert Tolerances.model_validate_json(TOLERANCES.model_dump_json()) == TOLERANCES


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields | {"float17": 1.0},
        lambda fields: fields | {"strict_rms_factor": math.nan},
        lambda fields: fields | {"float32_rms_error": math.inf},
        lambda fields: fields | {"int8": {"rms_percent": -1.0, "top1_loss_points": 0.5}},
        lambda fields: 4.0,
    ],
)
def test_limits_that_are_none_are_refused(change: Callable[[dict[str, float]], object]) -> None:
    with pytest.raises(ValidationError):
        Tolerances.model_validate(change(OLD))

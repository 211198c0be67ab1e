"""The verdict on several outputs: each by its own kind, and none overlooked."""

from __future__ import annotations

import numpy as np
import pytest

from export.bundle import Oracle, Output, Tolerances
from export.bundle.verdict import all_at_batch, judge_all

N = 64
DRAW = np.random.default_rng(0)
SCORES, MAP = DRAW.standard_normal((N, 10)), DRAW.standard_normal((N, 5, 6, 7))
VALUES, CHOICES = DRAW.standard_normal((N, 3)), DRAW.integers(0, 9, (N, 4, 4))
SPECS = (
    Output(name="logits", dtype="float32", shape=("batch", 10)),
    Output(name="map", dtype="float32", shape=("batch", 5, 6, 7), kind="scores"),
    Output(name="values", dtype="float32", shape=("batch", 3), kind="values"),
    Output(name="choices", dtype="int64", shape=("batch", 4, 4)),
)
TRUTH = (SCORES, MAP, VALUES, CHOICES)
ORACLE = Oracle(np.zeros((N, 1)), SCORES.argmax(1), SCORES, (), (MAP, VALUES, CHOICES))
TOLERANCES = Tolerances(float32_rms_error=1e-7, more_float32_rms_errors=(1e-7, 1e-7, 0.0))


def outputs(**changes: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(changes.get(spec.name, truth) for spec, truth in zip(SPECS, TRUTH, strict=True))


def test_what_is_right_passes_and_says_what_it_is_of_each() -> None:
    verdict = judge_all(outputs(), ORACLE, SPECS, TOLERANCES)
    assert verdict.passed
    assert verdict.top1_percent == 100
    assert [each.name for each in verdict.further] == ["map", "values", "choices"]
    of_map, of_values, of_choices = (each.verdict for each in verdict.further)
    assert of_map.changed_percent == of_choices.changed_percent == 0
    assert of_map.flips is None
    assert of_values.changed_percent is None
    assert of_map.top1_percent is None, "labels are the first output's"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits", 0.01 * SCORES),
        ("map", MAP + 1),
        ("map", MAP[:, ::-1]),
        ("values", VALUES[::-1]),
        ("values", np.full_like(VALUES, np.nan)),
        ("choices", (CHOICES + 1) % 9),
        ("choices", CHOICES[:, :2]),
    ],
)
def test_a_wrong_output_is_named(name: str, wrong: np.ndarray) -> None:
    verdict = judge_all(outputs(**{name: wrong}), ORACLE, SPECS, TOLERANCES)
    assert not verdict.passed
    assert all(failure.startswith(f"{name}: ") for failure in verdict.failures)
    said = all_at_batch(outputs(**{name: wrong}), ORACLE, SPECS, TOLERANCES)
    assert said is not None
    assert said.endswith(f"({name})")


def test_whole_numbers_may_differ_here_and_there() -> None:
    """One of 1,024 may be a tie that rounding decides."""
    one = CHOICES.copy()
    one[0, 0, 0] += 1
    assert judge_all(outputs(choices=one), ORACLE, SPECS, TOLERANCES).passed
    many = CHOICES.copy()
    many[:2] += 1
    assert "32 of 1024 whole numbers" in judge_all(outputs(choices=many), ORACLE, SPECS, TOLERANCES).failures[0]


def test_places_of_a_map_flip_where_it_is_decided() -> None:
    """A map that is right but for one place of clear margin: too little for the RMS of int8."""
    wrong = MAP.copy()
    at = tuple(np.argwhere(MAP.max(1) - np.median(MAP, 1) > 1.5)[0])
    wrong[at[0], :, at[1], at[2]] = -MAP[at[0], :, at[1], at[2]]
    noisy = wrong + 1e-3 * DRAW.standard_normal(MAP.shape)
    failures = judge_all(outputs(map=noisy), ORACLE, SPECS, TOLERANCES, "float16").failures
    assert any("predictions flipped although their margin" in failure for failure in failures)


def test_an_output_that_is_missing_is_wrong() -> None:
    assert not judge_all(outputs()[:3], ORACLE, SPECS, TOLERANCES).passed
    assert all_at_batch(outputs()[:3], ORACLE, SPECS, TOLERANCES) is not None

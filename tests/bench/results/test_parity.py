"""The verdict: its limits, its test of the predictions, and the files as they were exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.backends.contract import Options, Profile, Session
from bench.backends.registry import find_backend
from bench.results.parity import judge, worst_images
from export.bundle import Bundle, Oracle, Tolerances
from export.bundle.verdict import ROUNDING

E32 = 1e-6
TOLERANCES = Tolerances(float32_rms_error=E32)


def oracle_of(logits: np.ndarray, labels: np.ndarray | None = None) -> Oracle:
    return Oracle(np.zeros((len(logits), 1), np.uint8), labels, logits.astype(np.float64))


@pytest.fixture
def scores() -> np.ndarray:
    """2,000 rows of 10 scores, each with a margin of at least 0.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 10))
    logits[np.arange(2000), logits.argmax(1)] += 0.5
    return logits


def flipped(logits: np.ndarray, count: int) -> np.ndarray:
    changed = logits.copy()
    changed[:count] = np.roll(changed[:count], 1, axis=1)
    return changed


def test_strict_limits_the_rms_error(scores: np.ndarray) -> None:
    for factor, passes in ((3.9, True), (4.1, False)):
        verdict = judge(scores + factor * E32, oracle_of(scores), TOLERANCES, Profile.STRICT)
        assert verdict.passed is passes
        assert verdict.rms_error == pytest.approx(factor * E32)
        assert verdict.rms_error_in_float32_errors == pytest.approx(factor)
        assert verdict.max_abs_error == pytest.approx(factor * E32, rel=1e-3)


@pytest.mark.parametrize(("margin", "passes"), [(0.9e-4, True), (1.1e-4, False)])
def test_strict_forgives_a_flip_of_a_tie_only(margin: float, passes: bool, scores: np.ndarray) -> None:
    scores[7] = 0
    scores[7, 3], scores[7, 4] = 1 + margin, 1
    found = scores.copy()
    found[7, 4] = 1 + 2 * margin
    verdict = judge(found, oracle_of(scores), Tolerances(float32_rms_error=1.0), Profile.STRICT)
    assert verdict.passed is passes
    assert verdict.flips is not None
    (flip,) = verdict.flips
    assert (flip.image_index, flip.oracle_prediction, flip.prediction, flip.label) == (7, 3, 4, None)
    assert flip.margin == pytest.approx(margin)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(("flips", "passes"), [(2, True), (3, False)])
def test_half_precisions_are_held_to_the_fast_row_whatever_the_profile(
    precision: str, flips: int, passes: bool, scores: np.ndarray
) -> None:
    found = flipped(scores, flips) + 1e-3
    assert judge(found, oracle_of(scores), TOLERANCES, Profile.STRICT, precision).passed is passes
    assert not judge(found, oracle_of(scores), TOLERANCES, Profile.STRICT).passed


@pytest.mark.parametrize(
    ("lost", "won", "failure"),
    [(2, 0, None), (3, 0, "further apart than 0.1 points"), (2, 2, None), (13, 11, None), (14, 2, "exact McNemar")],
)
def test_int8_may_flip_but_neither_lose_nor_lean_to_one_side(
    lost: int, won: int, failure: str | None, scores: np.ndarray
) -> None:
    labels = scores.argmax(1)
    labels[100 : 100 + won] = np.roll(scores, 1, axis=1).argmax(1)[100 : 100 + won]
    found = scores.copy()
    for changed in (slice(0, lost), slice(100, 100 + won)):
        found[changed] = np.roll(found[changed], 1, axis=1)
    verdict = judge(found, oracle_of(scores, labels), TOLERANCES, Profile.STRICT, "int8")
    assert verdict.flips is not None
    assert len(verdict.flips) == lost + won
    assert verdict.mcnemar is not None
    assert (verdict.mcnemar.b, verdict.mcnemar.c) == (lost, won)
    assert verdict.passed is (failure is None)
    assert failure is None or any(failure in said for said in verdict.failures)


@pytest.mark.parametrize(("flips", "passes"), [(20, True), (21, False)])
def test_int8_without_labels_may_flip_one_percent(flips: int, passes: bool, scores: np.ndarray) -> None:
    verdict = judge(flipped(scores, flips), oracle_of(scores), TOLERANCES, Profile.STRICT, "int8")
    assert verdict.passed is passes


def test_the_errors_of_the_images_are_counted_by_size(scores: np.ndarray) -> None:
    found = scores.copy()
    found[0, 3] += 2e-4
    found[1, 5] = np.inf
    errors = judge(found, oracle_of(scores), TOLERANCES, Profile.STRICT).errors
    assert errors is not None
    place = int((np.log10(2e-4) - errors.log10_from) / errors.log10_step)
    assert (errors.counts[0], errors.counts[place], errors.counts[-1]) == (1998, 1, 1)
    assert sum(errors.counts) == 2000


@pytest.mark.parametrize(("flips", "passes"), [(2, True), (3, False)])
def test_fast_limits_the_share_of_flips(flips: int, passes: bool, scores: np.ndarray) -> None:
    verdict = judge(flipped(scores, flips), oracle_of(scores), TOLERANCES, Profile.FAST)
    assert verdict.flips is not None
    assert len(verdict.flips) == flips
    assert verdict.passed is passes


def test_fast_limits_the_top1(scores: np.ndarray) -> None:
    """Two flips of 2,000 are within 0.1 %, but 0.1 points of top-1 are not within 0.05."""
    oracle = oracle_of(scores, scores.argmax(1))
    verdict = judge(flipped(scores, 2), oracle, TOLERANCES, Profile.FAST)
    assert not verdict.passed
    assert verdict.top1_percent == pytest.approx(99.9)
    assert verdict.oracle_top1_percent == 100
    assert judge(flipped(scores, 1), oracle, TOLERANCES, Profile.FAST).passed


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_none_fails(profile: Profile, value: float, scores: np.ndarray) -> None:
    found = scores.copy()
    found[3, 2] = value
    verdict = judge(found, oracle_of(scores), TOLERANCES, profile)
    assert not verdict.passed
    assert verdict.non_finite == 1
    assert verdict.rms_error is None


def test_another_shape_fails(scores: np.ndarray) -> None:
    verdict = judge(scores[:, :9], oracle_of(scores), TOLERANCES, Profile.STRICT)
    assert not verdict.passed
    assert "[2000, 9]" in verdict.failures[0]


@pytest.mark.parametrize("shape", [(50, 1), (50, 4, 4), (50,)])
def test_outputs_that_are_no_class_scores_have_no_flips(shape: tuple[int, ...]) -> None:
    oracle = oracle_of(np.random.default_rng(0).normal(size=shape))
    off = oracle.logits + 5 * E32
    strict = judge(off, oracle, TOLERANCES, Profile.STRICT)
    assert strict.flips is None
    assert strict.top1_percent is None
    assert not strict.passed
    assert judge(off, oracle, TOLERANCES, Profile.FAST).passed
    assert not judge(oracle.logits + 4.1 * ROUNDING["float32"] * E32, oracle, TOLERANCES, Profile.FAST).passed


@pytest.mark.parametrize(
    ("oracle_wrong", "wrong", "b", "c", "p_value"),
    [
        (range(0), range(0), 0, 0, 1.0),
        (range(10, 30), range(10, 30), 0, 0, 1.0),  # both err on the same images
        (range(0, 5), range(5, 10), 5, 5, 1.0),
        (range(0), range(0, 1), 1, 0, 1.0),
        (range(0), range(0, 6), 6, 0, 2 / 2**6),
        (range(0, 2), range(2, 12), 10, 2, 2 * (1 + 12 + 66) / 2**12),  # the tails of a binomial with 12 draws
        (range(2, 12), range(0, 2), 2, 10, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemar_is_exact(
    oracle_wrong: range, wrong: range, b: int, c: int, p_value: float, scores: np.ndarray
) -> None:
    """`wrong` are the images on which the backend errs; the labels are what the scores say but for `oracle_wrong`."""
    found = scores.copy()
    labels = scores.argmax(1)
    labels[list(oracle_wrong)] = (labels[list(oracle_wrong)] + 1) % 10
    for image in range(40):
        found[image] = 0
        found[image, labels[image] if image not in wrong else (labels[image] + 2) % 10] = 1
    verdict = judge(found, oracle_of(scores, labels), TOLERANCES, Profile.FAST)
    assert verdict.mcnemar is not None
    assert (verdict.mcnemar.b, verdict.mcnemar.c) == (b, c)
    assert verdict.mcnemar.p_value == pytest.approx(p_value)


def test_without_labels_there_is_no_mcnemar(scores: np.ndarray) -> None:
    assert judge(scores, oracle_of(scores), TOLERANCES, Profile.STRICT).mcnemar is None


def test_the_worst_images_come_first(scores: np.ndarray) -> None:
    found = scores.copy()
    found[5, 3] += 0.2
    found[900, 1] -= 0.3
    found[77, 2] = np.nan
    assert worst_images(found, oracle_of(scores), 3) == (77, 900, 5)
    assert len(worst_images(found, oracle_of(scores), 5000)) == len(scores)
    assert worst_images(found[:, :9], oracle_of(scores), 2) == (0, 1)


@pytest.mark.parametrize("backend", ["torch-cpu", "torchscript-cpu", "onnx-cpu"])
def test_the_files_as_exported_pass(backend: str, small_bundle: Path) -> None:
    """Those that don't are in test_faults."""
    bundle = Bundle.open(small_bundle)
    oracle = bundle.oracle()
    session: Session = find_backend(backend).load(bundle, Options(threads=1, folded=backend != "torch-cpu"))
    logits = session.fetch(session.run(session.prepare(oracle.raw.copy())))
    session.close()
    verdict = judge(logits, oracle, bundle.manifest.tolerances, Profile.STRICT)
    assert verdict.passed, verdict.failures
    assert verdict.flips == ()

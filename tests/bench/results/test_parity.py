"""The verdict: what it lets pass in each precision and at each batch size, and the files as they were exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from verdicts import at_batch, judge

from bench.backends.contract import Options, Profile, Session
from bench.backends.registry import find_backend
from bench.results.parity import ParityVerdict, worst_images
from export.bundle import Bundle, Oracle, Precision, Tolerances
from export.bundle.limits import TF32_COARSER, spread

E32 = 1e-6
TOLERANCES = Tolerances(float32_rms_error=E32)


# What is held to a limit coarser than float32's own: (profile, precision), and what a right file is off, in percent of
# the spread: the most that was measured with the article's files.
COARSE: dict[tuple[Profile, Precision], float] = {
    (Profile.FAST, "float32"): 0.08,
    (Profile.STRICT, "float16"): 0.08,
    (Profile.STRICT, "bfloat16"): 0.33,
    (Profile.STRICT, "int8"): 3.7,
}
coarse = pytest.mark.parametrize(("profile", "precision"), COARSE, ids=["fast", "float16", "bfloat16", "int8"])


def oracle_of(logits: np.ndarray, labels: np.ndarray | None = None) -> Oracle:
    return Oracle(np.zeros((len(logits), 1), np.uint8), labels, logits.astype(np.float64))


@pytest.fixture
def scores() -> np.ndarray:
    """2,000 rows of 10 scores, each with a margin of at least 0.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 10))
    logits[np.arange(2000), logits.argmax(1)] += 0.5
    return logits


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


def test_the_errors_of_the_images_are_counted_by_size(scores: np.ndarray) -> None:
    found = scores.copy()
    found[0, 3] += 2e-4
    found[1, 5] = np.inf
    errors = judge(found, oracle_of(scores), TOLERANCES, Profile.STRICT).errors
    assert errors is not None
    place = int((np.log10(2e-4) - errors.log10_from) / errors.log10_step)
    assert (errors.counts[0], errors.counts[place], errors.counts[-1]) == (1998, 1, 1)
    assert sum(errors.counts) == 2000


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
    assert not judge(oracle.logits + 4.1 * TF32_COARSER * E32, oracle, TOLERANCES, Profile.FAST).passed


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
    logits = session.fetch(session.run(session.prepare(oracle.raw.copy())))[0]
    session.close()
    verdict = judge(logits, oracle, bundle.manifest.tolerances, Profile.STRICT)
    assert verdict.passed, verdict.failures
    assert verdict.flips == ()


# -- coarser than float32: right and wrong files ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(small_bundle: Path) -> Oracle:
    """The float64 logits of 300 test images."""
    return Bundle.open(small_bundle).oracle()


def rounded(truth: np.ndarray, profile: Profile, precision: Precision, seed: int = 0) -> np.ndarray:
    """The logits as far off as a right file of that precision, some images three times as far as others."""
    rng = np.random.default_rng(seed)
    each = rng.uniform(0.5, 1.5, (len(truth), *[1] * (truth.ndim - 1)))
    return truth + COARSE[profile, precision] / 100 * spread(truth) * each / 1.04 * rng.standard_normal(truth.shape)


def swapped_tops(logits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The logits with the two highest scores of these images exchanged, the smallest change that flips them."""
    changed = logits.copy()
    second, first = np.argsort(logits[places], axis=1)[:, -2:].T
    changed[places, first], changed[places, second] = logits[places, second], logits[places, first]
    return changed


def failures(found: np.ndarray, oracle: Oracle, profile: Profile, precision: Precision) -> str:
    verdict = judge(found, oracle, TOLERANCES, profile, precision)
    assert verdict.passed == (not verdict.failures)
    return "; ".join(verdict.failures)


@coarse
def test_what_is_off_by_the_precisions_rounding_passes(profile: Profile, precision: Precision, real: Oracle) -> None:
    for images in (1, 2, 20, 200, 300):
        few = Oracle(real.raw[:images], real.labels[:images], real.logits[:images])  # type: ignore[index]
        for seed in range(20):
            assert not failures(rounded(few.logits, profile, precision, seed), few, profile, precision)


@coarse
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda z: z * 0.01, "RMS error"),
        (lambda z: z + 1000, "RMS error"),
        (lambda z: np.eye(z.shape[1])[z.argmax(1)], "RMS error"),
        (np.zeros_like, "RMS error"),
        (lambda z: np.broadcast_to(z.mean(0), z.shape), "RMS error"),
        (lambda z: z * 1.5, "RMS error"),
        (lambda z: np.roll(z, 1, axis=0), "RMS error"),
        (lambda z: np.concatenate([z[:-1], -z[-1:]]), ""),
    ],
    ids=[
        "scaled",
        "shifted",
        "one-hot",
        "zeros",
        "the same for all",
        "too large",
        "other images'",
        "one image negated",
    ],
)
def test_logits_that_are_wrong_fail_although_their_argmax_may_be_right(
    profile: Profile, precision: Precision, wrong: object, says: str, real: Oracle
) -> None:
    assert callable(wrong)
    found = failures(wrong(real.logits), real, profile, precision)
    assert found
    assert says in found
    unlabelled = Oracle(real.raw, None, real.logits)
    assert failures(wrong(rounded(real.logits, profile, precision)), unlabelled, profile, precision)


@coarse
def test_45_percent_flips_fail_at_equal_accuracy(profile: Profile, precision: Precision, real: Oracle) -> None:
    right = rounded(real.logits, profile, precision)
    ties = right.argmax(1) != real.logits.argmax(1)
    right[ties] = real.logits[ties]
    places = np.random.default_rng(1).permutation(300)[:134]  # nearly 45 %, as many lost as gained
    found = swapped_tops(right, places)
    labels = real.logits.argmax(1)
    labels[places[::2]] = found.argmax(1)[places[::2]]
    verdict = judge(found, Oracle(real.raw, labels, real.logits), TOLERANCES, profile, precision)
    assert verdict.mcnemar is not None
    assert verdict.mcnemar.b == verdict.mcnemar.c == 67
    assert not verdict.passed
    assert failures(found, Oracle(real.raw, None, real.logits), profile, precision)


def test_45_percent_flips_fail_where_the_rms_error_alone_would_pass() -> None:
    """Margins of a fifth of the spread: an int8 file could flip any of them, but hardly half of them."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1000, 10)) * 3
    top = logits.argmax(1)
    logits[np.arange(1000), top] = np.sort(logits, axis=1)[:, -2] + 0.2 * 3
    found = rounded(swapped_tops(logits, np.arange(450)), Profile.STRICT, "int8")
    said = failures(found, oracle_of(logits), Profile.STRICT, "int8")
    assert "of 1000 predictions flipped, an RMS error of" in said
    assert "exceed" not in said


@coarse
@pytest.mark.parametrize("images", [200, 1900])
def test_one_flip_of_a_tie_passes(images: int, profile: Profile, precision: Precision, scores: np.ndarray) -> None:
    """Nothing else is off: 0.5 and 0.05 % of the predictions, and the label is the oracle's."""
    truth = scores[:images]
    truth[7] = np.eye(10)[3]
    truth[7, 4] = 1 - 1e-6
    found = swapped_tops(truth, np.array([7]))
    assert not failures(found, oracle_of(truth, truth.argmax(1)), profile, precision)


@coarse
@pytest.mark.parametrize(("margin", "passes"), [(3, True), (50, False)])
def test_a_flip_is_judged_by_its_margin(
    margin: float, passes: bool, profile: Profile, precision: Precision, scores: np.ndarray
) -> None:
    """In errors of a right file. For int8 50 of them are almost two spreads, and the image as such is wrong."""
    truth = scores[:200]
    error = COARSE[profile, precision] / 100 * spread(truth)
    truth[7] = -np.arange(10.0)
    truth[7, 1] = -margin * error
    found = rounded(truth, profile, precision)
    found[7] = swapped_tops(truth, np.array([7]))[7]
    said = failures(found, oracle_of(truth), profile, precision)
    assert (not said) is passes
    assert passes or "flipped" in said or "images are wrong" in said


def near_ties(images: int, ties: int) -> np.ndarray:
    """Scores of which the first `ties` images are near-ties and the others are decided."""
    logits = np.random.default_rng(0).standard_normal((images, 10))
    logits[np.arange(images), logits.argmax(1)] += 1
    top = logits[:ties].argmax(1)
    logits[np.arange(ties), top] = np.sort(logits[:ties], axis=1)[:, -2] + 1e-5
    return logits


def changed_top1(lost: int, gained: int, images: int) -> tuple[np.ndarray, Oracle]:
    """Logits that flip near-ties alone, and the oracle whose labels say so many of them are lost and gained."""
    truth = near_ties(images, 4 * (lost + gained))
    found = swapped_tops(truth, np.arange(lost + gained))
    labels = truth.argmax(1)
    labels[lost : lost + gained] = found.argmax(1)[lost : lost + gained]
    return found, oracle_of(truth, labels)


@pytest.mark.parametrize("images", [2000, 10_000])
def test_int8_that_is_better_than_the_oracle_passes(images: int) -> None:
    """By three times what it may be worse, and significantly so."""
    gained = images * 15 // 1000
    found, oracle = changed_top1(gained // 10, gained, images)
    verdict = judge(found, oracle, TOLERANCES, Profile.STRICT, "int8")
    assert verdict.mcnemar is not None
    assert verdict.mcnemar.p_value < 1e-4
    assert verdict.top1_percent is not None
    assert verdict.oracle_top1_percent is not None
    assert verdict.top1_percent - verdict.oracle_top1_percent > 1
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize(
    ("precision", "images", "lost", "gained", "passes"),
    [
        # Bounds by hand are in tests/export/test_limits.py; here that the right limit is applied to them.
        ("float16", 200, 4, 0, True),
        ("float16", 200, 5, 0, False),
        ("float16", 10_000, 4, 0, True),
        ("float16", 10_000, 5, 0, False),
        ("float16", 10_000, 15, 15, True),
        ("bfloat16", 10_000, 16, 0, True),
        ("bfloat16", 10_000, 17, 0, False),
        ("int8", 200, 4, 0, True),
        ("int8", 200, 5, 0, False),
        ("int8", 10_000, 38, 0, True),
        ("int8", 10_000, 41, 0, False),
        ("int8", 10_000, 100, 100, True),
        ("int8", 10_000, 100, 70, False),
        ("float32", 10_000, 4, 0, True),
        ("float32", 10_000, 5, 0, False),
    ],
)
def test_top1_is_not_inferior(precision: Precision, images: int, lost: int, gained: int, passes: bool) -> None:
    found, oracle = changed_top1(lost, gained, images)
    verdict = judge(found, oracle, TOLERANCES, Profile.FAST, precision)
    assert verdict.passed is passes, verdict.failures
    assert passes or "with 95 % confidence up to" in " ".join(verdict.failures)


# -- outputs that are no logits ---------------------------------------------------------------------------------------


def as_int8(outputs: np.ndarray) -> np.ndarray:
    step = (outputs.max() - outputs.min()) / 255 or 1.0
    return np.round(outputs / step) * step


def as_bfloat16(outputs: np.ndarray) -> np.ndarray:
    """Rounded to eight bits of a significand."""
    significand, exponent = np.frexp(outputs)
    return np.ldexp(np.round(significand * 256) / 256, exponent)


STORED = {
    "float16": lambda outputs: outputs.astype(np.float16).astype(np.float32),
    "bfloat16": as_bfloat16,
    "int8": as_int8,
}
OUTPUTS = {
    "probabilities": lambda rng, z: np.exp(z) / np.exp(z).sum(1, keepdims=True),
    "one value": lambda rng, z: rng.standard_normal((300, 1)),
    "one value far from zero": lambda rng, z: 40 + 10 * rng.standard_normal((300, 1)),
    "no dimension": lambda rng, z: rng.standard_normal(300),
    "feature maps": lambda rng, z: np.maximum(rng.standard_normal((300, 4, 5, 5)), 0),
    "scores far from zero": lambda rng, z: z + 500,
}


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind: str, precision: Precision, real: Oracle) -> None:
    """What the precision merely stores passes; zeros, the mean of all, other images' and a tenth of the size don't."""
    truth = OUTPUTS[kind](np.random.default_rng(0), real.logits)
    oracle = oracle_of(truth)
    stored = STORED[precision](truth)
    assert not failures(stored, oracle, Profile.STRICT, precision)
    for batch in (1, 2, 300, 601):
        assert at_batch(np.resize(stored, (batch, *truth.shape[1:])), oracle, TOLERANCES, *coarsely(precision)) is None
    mean = np.broadcast_to(truth.mean(0), truth.shape)
    for wrong in (np.zeros_like(truth), mean, np.roll(truth, 1, axis=0), truth / 10):
        assert failures(wrong, oracle, Profile.STRICT, precision)


def coarsely(precision: Precision) -> tuple[Profile, Precision]:
    return Profile.STRICT, precision


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 + 2.0**-20, -700.3])
@pytest.mark.parametrize("shape", [(50, 1), (50, 10), (50, 2, 3, 3)])
def test_constant_outputs_are_held_to_the_rounding(shape: tuple[int, ...], value: float, precision: Precision) -> None:
    truth = np.full(shape, value)
    exact = Tolerances(float32_rms_error=0.0)  # float32 has what its weights are
    for tolerances in (exact, TOLERANCES):
        found = STORED[precision](truth) if precision != "int8" else truth * (1 + 2.0**-9)
        verdict = judge(found, oracle_of(truth), tolerances, Profile.STRICT, precision)
        assert verdict.passed, verdict.failures
        assert verdict.rms_error_percent is None
        wrong = judge(truth + abs(value) / 20 + 0.3, oracle_of(truth), tolerances, Profile.STRICT, precision)
        assert not wrong.passed


def test_rounding_that_hides_the_images_is_all_that_can_be_told() -> None:
    """Images that move the outputs by less than float16 rounds them: the rounding is no fault, more than it is one."""
    truth = 3 + 1e-5 * np.random.default_rng(0).standard_normal((100, 1))
    assert not failures(truth.astype(np.float16), oracle_of(truth), Profile.STRICT, "float16")
    assert failures(truth + 0.05, oracle_of(truth), Profile.STRICT, "float16")


# -- tolerances that a bundle states ----------------------------------------------------------------------------------


def test_what_is_laxer_than_the_projects_own_is_said(scores: np.ndarray) -> None:
    def verdict(**stated: object) -> ParityVerdict:
        tolerances = Tolerances.model_validate({"float32_rms_error": E32, **stated})
        return judge(scores, oracle_of(scores), tolerances, Profile.STRICT)

    assert verdict().laxer == ()
    assert verdict(strict_rms_factor=3.0, int8={"rms_percent": 1, "top1_loss_points": 0}).laxer == ()
    lax = verdict(strict_rms_factor=40.0, int8={"rms_percent": 30, "top1_loss_points": 0.5}, float32_rms_error=0.1)
    factor, rms_percent, unit = lax.laxer
    assert factor == "strict_rms_factor is 40, the project's 4"
    assert rms_percent == "int8.rms_percent is 30, the project's 20"
    assert unit.startswith("float32_rms_error is 0.1, the project's 0.0001")
    assert judge(scores[:5], oracle_of(scores), Tolerances(float32_rms_error=1.0), Profile.FAST).laxer


def test_a_manifest_whose_float32_error_is_huge_does_not_let_zeros_pass(scores: np.ndarray) -> None:
    lax = Tolerances(float32_rms_error=1e3)
    for profile, precision in ((Profile.STRICT, "float32"), *COARSE):
        assert not judge(scores * 0, oracle_of(scores), lax, profile, precision).passed
        assert at_batch(scores[:64] * 0, oracle_of(scores), lax, profile, precision) is not None


# -- every batch size -------------------------------------------------------------------------------------------------

ALL = ((Profile.STRICT, "float32"), *COARSE)
BATCHES = (1, 2, 7, 64, 300, 301, 1000, 4096)
every = pytest.mark.parametrize(("profile", "precision"), ALL, ids=["strict", "fast", "float16", "bfloat16", "int8"])


def computed(oracle: Oracle, batch: int, profile: Profile, precision: Precision, seed: int = 0) -> np.ndarray:
    """What a right backend computes: the same for an image wherever it stands."""
    if (profile, precision) in COARSE:
        return np.resize(rounded(oracle.logits, profile, precision, seed), (batch, 10))
    off = np.random.default_rng(seed).standard_normal(oracle.logits.shape)
    return np.resize(oracle.logits + 1.4 * E32 * off, (batch, 10))


@every
@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_right_is_right_at_every_batch_size(
    batch: int, profile: Profile, precision: Precision, real: Oracle
) -> None:
    for seed in range(100 if batch < 100 else 5):
        found = computed(real, batch, profile, precision, seed).astype(np.float32)
        assert at_batch(found, real, TOLERANCES, profile, precision) is None


@every
@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_wrong_is_seen_at_every_batch_size(
    batch: int, profile: Profile, precision: Precision, real: Oracle
) -> None:
    found = computed(real, batch, profile, precision)
    wrongs = {
        "zeros": np.zeros_like(found),
        "another scale": found * 0.01,
        "shifted": found + 1000,
        "one-hot": np.eye(10)[found.argmax(1)],
        "NaN": np.where(np.arange(found.size).reshape(found.shape) == found.size - 1, np.nan, found),
        "a wrong algorithm": found * np.linspace(-1, 1, 10),
        "the last image is zero": np.concatenate([found[:-1], found[-1:] * 0]),
    }
    if batch > 1:
        wrongs["permuted"] = np.roll(found, 1, axis=0)
        wrongs["reversed"] = found[::-1]
        wrongs["the first image for all"] = np.broadcast_to(found[:1], found.shape)
    for fault, wrong in wrongs.items():
        said = at_batch(wrong, real, TOLERANCES, profile, precision)
        assert said is not None, fault
        assert said.startswith(f"batch {batch}: ")


@coarse
@pytest.mark.parametrize("batch", [64, 4096])
def test_a_flip_in_a_batch_is_judged_by_its_margin(
    batch: int, profile: Profile, precision: Precision, real: Oracle
) -> None:
    """The image's error is within what one image may be off, its margin is not within ten errors of the others."""
    limit = {"int8": 20.0, "bfloat16": 8.0}.get(precision, 1.0)
    error = max(COARSE[profile, precision], limit / 10) / 100 * spread(real.logits)
    truth = real.logits.copy()
    for errors, passes in ((3, True), (17, False)):
        truth[7] = np.where(np.arange(10) < 2, 5, -5)
        truth[7, 1] -= errors * error
        found = computed(oracle_of(truth), batch, profile, precision)
        found[7] = swapped_tops(truth, np.array([7]))[7]
        said = at_batch(found, oracle_of(truth), TOLERANCES, profile, precision)
        assert (said is None) is passes
        assert passes or "although their margin exceeds" in str(said)


@every
def test_what_is_repeated_comes_out_the_same(profile: Profile, precision: Precision, real: Oracle) -> None:
    """Twice as far off as at the first place is within every limit, but not the same computation."""
    found = computed(real, 600, profile, precision)
    again = real.logits + 0.9 * computed(real, 300, profile, precision, seed=1) - 0.9 * real.logits
    assert at_batch(np.concatenate([found[:300], again]), real, TOLERANCES, profile, precision) is None
    off = {"float32": 2.5, "bfloat16": 8.0}.get(precision if profile is Profile.STRICT else "", 4.0)
    worse = real.logits + off * (again - real.logits)
    said = at_batch(np.concatenate([found[:300], worse]), real, TOLERANCES, profile, precision)
    assert said is not None
    assert "repeated images differ" in said


def test_another_shape_or_none_at_all_is_not_right(real: Oracle) -> None:
    for wrong in (real.logits[:4, :9], real.logits[:0], real.logits[:4].reshape(4, 10, 1)):
        assert "expected" in str(at_batch(wrong, real, TOLERANCES, Profile.STRICT))

"""Whether logits are right: the one verdict, by which a file is published and a backend judged.

Owns the comparison with the oracle (float64 logits of the unfolded model) and the limits of each precision. Knows
neither files nor runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.bundle.manifest import COARSER, FLOAT32, Oracle, Precision, Tolerances

# How much coarser than float32 a rounding may be where an output is not class scores, so that there are no flips to
# count. The fast profile lets float32 be computed in TF32, whose significand is float16's.
ROUNDING = COARSER | {"float32": COARSER["float16"]}
# From what float64 tells apart to what no logit is off by, four to a power of ten.
HISTOGRAM_FROM, HISTOGRAM_STEP, HISTOGRAM_RANGES = -9.0, 0.25, 44


@dataclass(frozen=True)
class Flip:
    """An image for which a backend predicts another class than the oracle.

    `margin` is the oracle's logit of its prediction less its second largest: how far the decision was from a tie.
    `label` is None where the bundle has no labels.
    """

    image_index: int
    label: int | None
    oracle_prediction: int
    prediction: int
    margin: float


@dataclass(frozen=True)
class McNemar:
    """Whether a backend is right more or less often than the oracle, by the images on which only one of them is right.

    `b` counts the images that the oracle has right and the backend wrong, `c` those the other way round. `p_value` is
    that of the exact test, two-sided: how likely so uneven a split of b + c is where both err equally often (McNemar
    1947, with the binomial distribution itself instead of its approximation).
    """

    b: int
    c: int
    p_value: float


@dataclass(frozen=True)
class ErrorHistogram:
    """How many images have a largest absolute logit error in each range: range k goes from 10^(from + k · step) to
    10^(from + (k + 1) · step); the first takes whatever is less, and the last whatever is more or not finite.
    """

    log10_from: float
    log10_step: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict and everything it rests on.

    Attributes:
        passed: True where no limit is broken.
        failures: each limit that is broken, in words; empty where `passed`.
        images: how many inputs were compared.
        top1_percent: share of right predictions, in percent; None without labels or where the output is not class
        scores. oracle_top1_percent: the same for the oracle.
        flips: every changed prediction, or None where the output is not class scores.
        max_abs_error: largest absolute difference of a logit from the oracle's; None if a logit is not finite.
        rms_error: root of the mean squared difference over all logits; None if a logit is not finite.
        rms_error_in_float32_errors: `rms_error` as a multiple of what float32 torch on the CPU makes of the same model.
        non_finite: how many logits are NaN or infinite.
        mcnemar: the test of these predictions against the oracle's; None without labels or where the output is
            not class scores.
        precision: the file's, which decides the limits together with what a runtime may do to float32.
        errors: the distribution over the images.
    """

    passed: bool
    failures: tuple[str, ...]
    images: int
    top1_percent: float | None = None
    oracle_top1_percent: float | None = None
    flips: tuple[Flip, ...] | None = None
    max_abs_error: float | None = None
    rms_error: float | None = None
    rms_error_in_float32_errors: float | None = None
    non_finite: int = 0
    mcnemar: McNemar | None = None
    precision: str = "float32"
    errors: ErrorHistogram | None = None


def judge(
    logits: np.ndarray, oracle: Oracle, tolerances: Tolerances, precision: Precision = FLOAT32, *, tf32: bool = False
) -> Verdict:
    """Compare logits with the oracle's, both [N, …] in the same order of images.

    `precision` is the file's. `tf32`: float32 may be computed in TF32; to the other precisions that is all the same.
    """
    images = len(oracle.logits)
    if logits.shape != oracle.logits.shape:
        wrong = f"logits of shape {list(logits.shape)}, the oracle has {list(oracle.logits.shape)}"
        return Verdict(passed=False, failures=(wrong,), images=images, precision=precision)

    failures: list[str] = []
    maximum = rms = multiple = None
    non_finite = int(np.count_nonzero(~np.isfinite(logits)))
    if non_finite:
        failures.append(f"{non_finite} of {logits.size} logits are NaN or infinite")
    else:
        maximum = float(np.abs(logits.astype(np.float64) - oracle.logits).max())
        rms = rms_error(logits, oracle.logits)
        if tolerances.float32_rms_error > 0:
            multiple = rms / tolerances.float32_rms_error

    flips = top1 = oracle_top1 = test = None
    if _are_class_scores(oracle.logits):
        predictions, truth = logits.argmax(1), oracle.logits.argmax(1)
        flips = _flips(predictions, truth, oracle)
        if oracle.labels is not None:
            top1 = 100 * float(np.mean(predictions == oracle.labels))
            oracle_top1 = 100 * float(np.mean(truth == oracle.labels))
            test = _mcnemar(predictions == oracle.labels, truth == oracle.labels)

    if precision == "int8" and flips is not None:
        failures += _int8_failures(images, flips, top1, oracle_top1, test, tolerances)
    elif precision == "float32" and not tf32:
        failures += _strict_failures(rms, flips, tolerances)
    elif flips is not None:
        failures += _fast_failures(images, flips, top1, oracle_top1, tolerances)
    elif rms is not None:
        factor = tolerances.strict_rms_factor * ROUNDING[precision]
        failures += _rms_failures(rms, factor, tolerances)
    return Verdict(
        passed=not failures,
        failures=tuple(failures),
        images=images,
        top1_percent=top1,
        oracle_top1_percent=oracle_top1,
        flips=flips,
        max_abs_error=maximum,
        rms_error=rms,
        rms_error_in_float32_errors=multiple,
        non_finite=non_finite,
        mcnemar=test,
        precision=precision,
        errors=_histogram(logits, oracle.logits),
    )


def rms_error(logits: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean square difference over all logits; NaN and infinity count as infinite."""
    error = float(np.sqrt(np.mean((logits.astype(np.float64) - truth) ** 2)))
    return error if np.isfinite(error) else float("inf")


def departure(few: np.ndarray, logits: np.ndarray, oracle: Oracle) -> str | None:
    """Why a file that gives `few` for the first inputs of `logits`, at another batch size, is not right, or None.

    Another kernel may round otherwise, but not by more than the file is off anyway.
    """
    same = logits[: len(few)]
    if few.shape != same.shape:
        return f"its output has shape {list(few.shape)} at another batch size, expected {list(same.shape)}"
    allowed, apart = rms_error(logits, oracle.logits), rms_error(few, same.astype(np.float64))
    return None if apart <= allowed else f"another batch size changes its logits by {apart:.2e} (RMS)"


def _are_class_scores(logits: np.ndarray) -> bool:
    """One row of at least two scores for each image. Anything else has no prediction that could flip."""
    return logits.ndim == 2 and logits.shape[1] >= 2


def _flips(predictions: np.ndarray, truth: np.ndarray, oracle: Oracle) -> tuple[Flip, ...]:
    changed = np.flatnonzero(predictions != truth)
    second, first = np.sort(oracle.logits[changed], axis=1)[:, -2:].T
    return tuple(
        Flip(
            image_index=int(index),
            label=None if oracle.labels is None else int(oracle.labels[index]),
            oracle_prediction=int(truth[index]),
            prediction=int(predictions[index]),
            margin=float(margin),
        )
        for index, margin in zip(changed, first - second, strict=True)
    )


def _histogram(logits: np.ndarray, truth: np.ndarray) -> ErrorHistogram:
    error = np.abs(logits.astype(np.float64) - truth).reshape(len(truth), -1).max(1)
    with np.errstate(divide="ignore"):  # no error at all belongs to the first range
        place = (np.log10(np.where(np.isfinite(error), error, np.inf)) - HISTOGRAM_FROM) / HISTOGRAM_STEP
    ranges = np.clip(np.floor(place), 0, HISTOGRAM_RANGES - 1).astype(int)
    counts = np.bincount(ranges, minlength=HISTOGRAM_RANGES)
    return ErrorHistogram(HISTOGRAM_FROM, HISTOGRAM_STEP, tuple(int(count) for count in counts))


def _mcnemar(right: np.ndarray, oracle_right: np.ndarray) -> McNemar:
    """The test on two arrays of truth values, bool [N]. Images on which both are right or both wrong say nothing."""
    b, c = int(np.sum(oracle_right & ~right)), int(np.sum(right & ~oracle_right))
    if not b + c:
        return McNemar(0, 0, 1.0)
    from scipy.stats import binomtest  # here: the workers import this module and need no scipy

    return McNemar(b, c, float(binomtest(b, b + c).pvalue))


def _strict_failures(rms: float | None, flips: tuple[Flip, ...] | None, tolerances: Tolerances) -> list[str]:
    failures = [] if rms is None else _rms_failures(rms, tolerances.strict_rms_factor, tolerances)
    decided = [flip for flip in flips or () if flip.margin > tolerances.strict_flip_margin]
    if decided:
        widest = max(flip.margin for flip in decided)
        failures.append(
            f"{len(decided)} predictions flipped although their margin exceeds {tolerances.strict_flip_margin:g} "
            f"(the widest: {widest:.3g})"
        )
    return failures


def _rms_failures(rms: float, factor: float, tolerances: Tolerances) -> list[str]:
    limit = factor * tolerances.float32_rms_error
    if rms <= limit:
        return []
    return [f"RMS error {rms:.3g} exceeds {limit:.3g}, {factor:g} times that of float32 torch on the CPU"]


def _fast_failures(
    images: int, flips: tuple[Flip, ...], top1: float | None, oracle_top1: float | None, tolerances: Tolerances
) -> list[str]:
    failures = _flips_failures(images, flips, tolerances.fast_flips_percent)
    return failures + _top1_failures(top1, oracle_top1, tolerances.fast_top1_points)


def _int8_failures(
    images: int,
    flips: tuple[Flip, ...],
    top1: float | None,
    oracle_top1: float | None,
    test: McNemar | None,
    tolerances: Tolerances,
) -> list[str]:
    if top1 is None:
        return _flips_failures(images, flips, tolerances.int8_flips_percent_without_labels)
    failures = _top1_failures(top1, oracle_top1, tolerances.int8_top1_points)
    if test is not None and test.p_value <= tolerances.int8_p_value:
        failures.append(
            f"right and wrong are split unevenly: {test.b} images only the oracle has right, {test.c} only this one "
            f"(exact McNemar p = {test.p_value:.2g}, must exceed {tolerances.int8_p_value:g})"
        )
    return failures


def _flips_failures(images: int, flips: tuple[Flip, ...], limit_percent: float) -> list[str]:
    share = 100 * len(flips) / images
    if share <= limit_percent:
        return []
    return [f"{len(flips)} of {images} predictions flipped ({share:.2f} %, limit {limit_percent} %)"]


def _top1_failures(top1: float | None, oracle_top1: float | None, points: float) -> list[str]:
    if top1 is None or oracle_top1 is None or abs(top1 - oracle_top1) <= points + 1e-9:
        return []
    return [f"top-1 is {top1:.2f} %, the oracle's {oracle_top1:.2f} %: further apart than {points} points"]

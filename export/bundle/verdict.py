"""Whether logits are right: the one verdict, by which a file is published and a backend judged.

Owns the comparison with the oracle (float64 logits of the unfolded model); how far off is right, and why, says
`export.bundle.limits`. Knows neither files nor runtimes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.bundle.detections import Found, judge_boxes
from export.bundle.limits import (
    FLIP_ERRORS,
    LEAST_ERROR,
    RmsLimit,
    by_class,
    explained_flips,
    kind_of,
    laxer,
    limits_of,
    most_choices,
    most_flips,
    rms,
    rms_of_each,
    top1_loss_bound,
    top1_margin,
)
from export.bundle.manifest import BOX_KINDS, FLOAT32, Arrays, Limits, Oracle, Output, OutputKind, Precision, Tolerances

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
        rms_error_percent: `rms_error` in percent of the spread of the oracle's logits (`export.bundle.limits.spread`);
            None if a logit is not finite or the oracle's are constant.
        rms_error_in_float32_errors: `rms_error` as a multiple of what float32 torch on the CPU makes of the same model.
        non_finite: how many logits are NaN or infinite.
        mcnemar: the test of these predictions against the oracle's; None without labels or where the output is
            not class scores.
        precision: the file's, which decides the limits together with what a runtime may do to float32.
        errors: the distribution over the images.
        laxer: in words, each limit that the bundle states and that lets more pass than the project's own; else empty.
        changed_percent: of an output whose predictions are no list, one for each image: of scores [N, C, …] the share
            of places where another class is the largest, of whole numbers the share that differs.
        further: the verdicts on the model's other outputs. `passed` and `failures` are of all of them together, all
            else is of the first.
    """

    passed: bool
    failures: tuple[str, ...]
    images: int
    top1_percent: float | None = None
    oracle_top1_percent: float | None = None
    flips: tuple[Flip, ...] | None = None
    max_abs_error: float | None = None
    rms_error: float | None = None
    rms_error_percent: float | None = None
    rms_error_in_float32_errors: float | None = None
    non_finite: int = 0
    mcnemar: McNemar | None = None
    precision: str = "float32"
    errors: ErrorHistogram | None = None
    laxer: tuple[str, ...] = ()
    changed_percent: float | None = None
    further: tuple[OutputVerdict, ...] = ()


@dataclass(frozen=True)
class OutputVerdict:
    """The verdict on one of several outputs, by its name."""

    name: str
    verdict: Verdict


def judge_all(
    outputs: Arrays,
    oracle: Oracle,
    specs: Sequence[Output],
    tolerances: Tolerances,
    precision: Precision = FLOAT32,
    *,
    tf32: bool = False,
) -> Verdict:
    """`judge` of each output, which `specs` name, in one verdict."""
    if len(outputs) != len(specs):
        wrong = f"{len(outputs)} outputs, the oracle has {len(specs)}"
        return Verdict(passed=False, failures=(wrong,), images=len(oracle.logits), precision=precision)
    of_each = [
        OutputVerdict(
            spec.name,
            _judge_listed(spec, outputs, oracle, specs, precision, tf32=tf32)
            if spec.kind in BOX_KINDS
            else judge(output, alone, limits, precision, tf32=tf32, kind=spec.kind),
        )
        for spec, output, (alone, limits) in zip(specs, outputs, _alone(oracle, tolerances), strict=True)
    ]
    first = of_each[0].verdict
    if len(of_each) == 1:
        return first
    failures = tuple(f"{each.name}: {failure}" for each in of_each for failure in each.verdict.failures)
    return replace(first, passed=not failures, failures=failures, further=tuple(of_each[1:]))


def judge(
    logits: np.ndarray,
    oracle: Oracle,
    tolerances: Tolerances,
    precision: Precision = FLOAT32,
    *,
    tf32: bool = False,
    kind: OutputKind | None = None,
) -> Verdict:
    """Compare the model's first output with the oracle's, both [N, …] in the same order of images.

    `precision` is the file's. `tf32`: float32 may be computed in TF32; to the other precisions that is all the same.
    `kind` is the output's, where somebody said it.
    """
    truth, images = oracle.logits, len(oracle.logits)
    kind = kind or kind_of(truth)
    more_allowed = laxer(tolerances, truth)
    if logits.shape != truth.shape:
        wrong = f"logits of shape {list(logits.shape)}, the oracle has {list(truth.shape)}"
        return Verdict(passed=False, failures=(wrong,), images=images, precision=precision, laxer=more_allowed)
    if kind == "choices":
        verdict = Verdict(passed=True, failures=(), images=images, precision=precision, laxer=more_allowed)
        return _judge_choices(logits, truth, verdict, most_choices(truth.size, tolerances, precision, tf32=tf32))

    limit = RmsLimit.of(truth, tolerances, precision, tf32=tf32, kind=kind)
    failures = _not_finite(logits)
    maximum = error = percent = multiple = None
    if not failures:
        maximum = float(np.abs(logits.astype(np.float64) - truth).max())
        error = rms_error(logits, truth)
        if limit.spread > 0:
            percent = 100 * error / limit.spread
        if tolerances.float32_rms_error > 0:
            multiple = error / tolerances.float32_rms_error
        failures += _rms_failures(logits, truth, limit.value, limit)
        if kind == "scores":
            failures += _flip_failures(by_class(logits), by_class(truth), limit, tolerances)

    flips = top1 = oracle_top1 = test = changed = None
    if kind == "scores" and truth.ndim > 2:
        changed = 100 * float(np.mean(logits.argmax(1) != truth.argmax(1)))
    elif kind == "scores":
        predictions, right = logits.argmax(1), truth.argmax(1)
        flips = _flips(predictions, right, oracle)
        if oracle.labels is not None:
            top1 = 100 * float(np.mean(predictions == oracle.labels))
            oracle_top1 = 100 * float(np.mean(right == oracle.labels))
            test = _mcnemar(predictions == oracle.labels, right == oracle.labels)
            if not limit.strict:
                failures += _top1_failures(top1, oracle_top1, test, images, limits_of(tolerances, precision))
    return Verdict(
        passed=not failures,
        failures=tuple(failures),
        images=images,
        top1_percent=top1,
        oracle_top1_percent=oracle_top1,
        flips=flips,
        max_abs_error=maximum,
        rms_error=error,
        rms_error_percent=percent,
        rms_error_in_float32_errors=multiple,
        non_finite=int(np.count_nonzero(~np.isfinite(logits))),
        mcnemar=test,
        precision=precision,
        errors=_histogram(logits, truth),
        laxer=more_allowed,
        changed_percent=changed,
    )


def _alone(oracle: Oracle, tolerances: Tolerances) -> list[tuple[Oracle, Tolerances]]:
    """The oracle of each output by itself, with the error that float32 makes of it. Labels are the first's."""
    errors = tolerances.more_float32_rms_errors
    further = [
        (Oracle(oracle.raw, None, output), tolerances.model_copy(update={"float32_rms_error": error}))
        for output, error in zip(oracle.more_outputs, errors, strict=True)
    ]
    return [(Oracle(oracle.raw, oracle.labels, oracle.logits), tolerances), *further]


def _judge_listed(
    spec: Output, outputs: Arrays, oracle: Oracle, specs: Sequence[Output], precision: Precision, *, tf32: bool
) -> Verdict:
    """The verdict on an output that is a part of lists of boxes: on the boxes it is that of whole lists."""
    images = len(oracle.logits)
    found, truth = Found.of(outputs, specs), Found.of(oracle.outputs, specs)
    verdict = Verdict(passed=True, failures=(), images=images, precision=precision)
    if found is None or truth is None or len(found.corners) != images:
        failures = (f"{spec.name} belongs to boxes, and there are none, or not of as many images",)
        return replace(verdict, passed=False, failures=failures)
    if spec.kind != "boxes":
        return verdict
    compared = judge_boxes(found, truth, precision, tf32=tf32)
    return replace(
        verdict,
        passed=not compared.failures,
        failures=compared.failures,
        rms_error=compared.scores_rms,
        changed_percent=100 * compared.alone / max(1, compared.boxes),
    )


def _judge_choices(found: np.ndarray, truth: np.ndarray, verdict: Verdict, most: int) -> Verdict:
    """The verdict on whole numbers of which at most so many may differ."""
    changed = int((found != truth).sum())
    words = f"{changed} of {truth.size} whole numbers differ from the oracle's, the limit is {most}"
    return replace(
        verdict,
        passed=changed <= most,
        failures=(words,) if changed > most else (),
        changed_percent=100 * changed / max(1, truth.size),
    )


def rms_error(logits: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean square difference over all logits; NaN and infinity count as infinite."""
    return rms(logits.astype(np.float64) - truth)


def all_at_batch(
    outputs: Arrays,
    oracle: Oracle,
    specs: Sequence[Output],
    tolerances: Tolerances,
    precision: Precision = FLOAT32,
    *,
    tf32: bool = False,
) -> str | None:
    """`at_batch` of each output, which `specs` name: the first that is not right, in words."""
    if len(outputs) != len(specs):
        return f"{len(outputs)} outputs, expected {len(specs)}"
    for spec, output, (alone, limits) in zip(specs, outputs, _alone(oracle, tolerances), strict=True):
        if spec.kind in BOX_KINDS:
            listed = _judge_listed(spec, outputs, oracle.first(len(output)), specs, precision, tf32=tf32)
            problem = "; ".join(listed.failures) or None
        else:
            problem = at_batch(output, alone, limits, precision, tf32=tf32, kind=spec.kind)
        if problem is not None:
            return problem if len(specs) == 1 else f"{problem} ({spec.name})"
    return None


def at_batch(
    logits: np.ndarray,
    oracle: Oracle,
    tolerances: Tolerances,
    precision: Precision = FLOAT32,
    *,
    tf32: bool = False,
    kind: OutputKind | None = None,
) -> str | None:
    """Why logits [batch, …] of the oracle's first inputs, computed as one batch, are not right, in words; else None.

    Where the batch has more images than the oracle they begin again; what is repeated has to come out the same but for
    rounding. The limits are those of `judge`, from the whole oracle, with an allowance for few images; there is no
    judging of top-1, which takes as many images as there are.
    """
    batch, images = len(logits), len(oracle.logits)
    if not batch or logits.shape[1:] != oracle.logits.shape[1:]:
        expected = [batch or "batch", *oracle.logits.shape[1:]]
        return f"batch {batch}: logits of shape {list(logits.shape)}, expected {expected}"
    kind = kind or kind_of(oracle.logits)
    if kind == "choices":
        truth = oracle.logits[np.arange(batch) % images]
        differing, most = int((logits != truth).sum()), most_choices(truth.size, tolerances, precision, tf32=tf32)
        return f"batch {batch}: {differing} whole numbers differ, the limit is {most}" if differing > most else None
    limit = RmsLimit.of(oracle.logits, tolerances, precision, tf32=tf32, kind=kind)
    failures = _not_finite(logits)
    for start in range(0, 0 if failures else batch, images):
        part, truth = logits[start : start + images], oracle.logits[: batch - start]
        failures += _rms_failures(part, truth, limit.on(truth), limit)
        if kind == "scores":
            failures += _flip_failures(by_class(part), by_class(truth), limit, tolerances)
        if start:
            failures += _repeat_failures(logits[:images], part, oracle.logits, limit)
        if failures:
            break
    return f"batch {batch}: {'; '.join(failures)}" if failures else None


def departure(few: Arrays, outputs: Arrays, oracle: Oracle) -> str | None:
    """Why a file that gives `few` for the first inputs of `outputs`, at another batch size, is not right, or None.

    Another kernel may round otherwise, but not by more than the file is off anyway.
    """
    for less, output, truth in zip(few, outputs, oracle.outputs, strict=True):
        if truth.dtype.kind != "f":
            continue  # held to its limit, which is all that can be said of what names something
        same = output[: len(less)]
        if less.shape != same.shape:
            return f"its output has shape {list(less.shape)} at another batch size, expected {list(same.shape)}"
        allowed, apart = rms_error(output, truth), rms_error(less, same.astype(np.float64))
        if apart > allowed:
            return f"another batch size changes its logits by {apart:.2e} (RMS)"
    return None


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


def _not_finite(logits: np.ndarray) -> list[str]:
    count = int(np.count_nonzero(~np.isfinite(logits)))
    return [f"{count} of {logits.size} logits are NaN or infinite"] if count else []


def _rms_failures(logits: np.ndarray, truth: np.ndarray, largest: float, limit: RmsLimit) -> list[str]:
    """The error of all images against `largest`; where float32's own error is not the limit, that of each image too.

    A single wrong image among thousands hardly adds to what a coarse precision is allowed.
    """
    error = rms_error(logits, truth)
    if error > largest:
        return [f"RMS error {error:.3g} exceeds {limit.in_words(largest)}"]
    if limit.strict:
        return []
    errors, allowed = rms_of_each(logits.astype(np.float64) - truth), limit.on_each(truth)
    wrong = np.flatnonzero(errors > allowed)
    if not len(wrong):
        return []
    worst = wrong[errors[wrong].argmax()]
    return [
        f"{len(wrong)} of {len(truth)} images are wrong: the RMS error {errors[worst]:.3g} of image {worst} exceeds "
        f"{limit.in_words(float(allowed[worst]))}"
    ]


def _flip_failures(logits: np.ndarray, truth: np.ndarray, limit: RmsLimit, tolerances: Tolerances) -> list[str]:
    """Flips of predictions, by scores [n, C], that the errors don't explain: of too wide a margin, or too many."""
    flipped = logits.argmax(1) != truth.argmax(1)
    count = int(flipped.sum())
    if not count:
        return []
    second, first = np.sort(truth[flipped], axis=1)[:, -2:].T
    margins = first - second
    widest = tolerances.strict_flip_margin
    error = 0.0
    if not limit.strict:
        error = LEAST_ERROR * limit.value
        if count < len(truth):
            error = max(error, rms_error(logits[~flipped], truth[~flipped]))
        widest = FLIP_ERRORS * error
    failures = []
    if decided := int((margins > widest).sum()):
        why = "" if limit.strict else f", {FLIP_ERRORS:g} times the RMS error {error:.3g}"
        failures.append(
            f"{decided} predictions flipped although their margin exceeds {widest:.3g}{why} "
            f"(the widest: {margins.max():.3g})"
        )
    if error > 0 and count > (most := most_flips(explained_flips(truth, error))):
        failures.append(f"{count} of {len(truth)} predictions flipped, an RMS error of {error:.3g} explains {most}")
    return failures


def _repeat_failures(first: np.ndarray, again: np.ndarray, truth: np.ndarray, limit: RmsLimit) -> list[str]:
    """Whether the same images came out the same at two places of a batch.

    Another place may be another kernel's, with an error of its own, but of no other size: twice is beyond their √2.
    """
    count = len(again)
    error = max(rms_error(first, truth), LEAST_ERROR * limit.value)
    allowed, apart = 2 * error * (1 + 4 / np.sqrt(count)), rms_error(again, first[:count].astype(np.float64))
    if apart <= allowed:
        return []
    return [f"{count} repeated images differ by {apart:.3g} (RMS) from their first time, the limit is {allowed:.3g}"]


def _top1_failures(top1: float, oracle_top1: float, test: McNemar, images: int, limits: Limits) -> list[str]:
    loss, margin = top1_loss_bound(test.b, test.c, images), top1_margin(limits, images)
    if loss <= margin:
        return []
    return [
        f"top-1 is {top1:.2f} %, the oracle's {oracle_top1:.2f} %: with 95 % confidence up to "
        f"{100 * loss:.2f} points lower, the limit is {100 * margin:.2f}"
    ]

"""How far right logits may be from the oracle's: the RMS error, the flips that it explains, the top-1 that it may cost.

**RMS error.** Its unit is the *spread* of the oracle's outputs. Of class scores that is the RMS after each image's mean
is subtracted: what is added to all scores of an image moves neither a prediction nor a probability, so it must not
widen the limit; the error itself is taken as it is. Of other outputs it is the standard deviation over all values.

The limits lie above what right files are off, and far below what a wrong one is: zeros, shuffled images and another
scale are off by about the whole spread. Measured in percent of the spread (onnxruntime, OpenVINO, torch):

| network, images | float16 | bfloat16 | int8 |
|---|---|---|---|
| the article's, 10,000 test images | 0.05 to 0.08 | 0.33 | 1.5 to 2.3; 3.1 to 7.1 by the libraries alone |
| ResNet-18, random weights, 300 | 0.14 to 0.21 | 1.6 | 8.1; 26 where its ranges cut 18 images off: it fails |
| MobileNetV2, random weights, 300 | 0.04 to 0.05 | 0.41 | 1.3 to 1.5 |

TF32 on an H100 was off by 420 to 460 float32 errors, the article's float16 files by 1,700 to 4,100. Roundings one after
another add up like a random walk (Higham & Mary 2019), so a network of 400 of them is off by 20 unit roundoffs: of
2^-11 that is 1 %, for float16 and TF32, of 2^-8 it is 8 %, for bfloat16. int8 makes an error of step/√12 wherever it
quantises (Bennett 1948), which is 1 % of a tensor whose largest value is four times its RMS; 400 of them make 20 %.

A network that amplifies the rounding of float32 amplifies that of any precision: nothing is held to less than
`strict_rms_factor` times what float32 torch was off, times how much coarser the precision is. But a file that gives
every image the same is wrong, whatever its outputs are made of: where the images move the outputs by more than
`strict_rms_factor` roundings of the outputs themselves, the error may be at most half of what they move them. Where
they don't, the inputs can't tell more than that.

**Few images.** The error of one image scatters about that of all: at most 6.1 times as large in the article's int8
files, and 2.9 in float32's. Squared errors of images have a standard deviation of 0.5 to 2.3 times their mean, so a
mean of n of them scatters by 2.3/√n, and 1 + 4/√n times the RMS is three standard deviations away for every n. No more
than 1 + 1/√n is allowed where that would reach half of what these images differ from the mean of all, so that zeros are
seen in a batch of one. The article's files need at most 0.27 of it, at every place and batch size from 1 to 256.

**Flips.** To flip a prediction of margin m, the errors of two scores must differ by m. The errors' size is taken from
the images that did not flip, since a wrong flip is an error too, and at least from a tenth of the limit, which a right
file may make. Two rules: no flip has a margin beyond ten such errors (measured: 4.7), and there are not more flips than
such errors explain. With errors of standard deviation e, image i flips with a probability of at most
p_i = Σ_j Φ(−(z_top − z_j) / (√2 e)); the number of flips is Poisson's with mean Σ p_i. Right files had up to 2.6 times
the mean where it was small (8 for 3.1) and 1.5 where it was not (36 for 24), so twice the mean is granted.

Where the scores are a map, [N, C, …], each of its places is a prediction.

**Whole numbers** that name something, such as the places of maxima, tell no margin. A share of them may differ,
Poisson's bound of it where there are few.

**Top-1** may be lower by a margin, never "not significantly different": the upper one-sided 95 % bound of its loss has
to be within the margin. Better is never wrong. MLPerf asks of a quantised ResNet-50 99 % of the reference's accuracy,
and 99.9 % where it is strict; int8 may lose half a point, float16 and TF32 a tenth. Of N images with no change at all
the bound is about 3/N, and 9/N where four were lost: the margin is never below ten images. So 200 images show no more
than that top-1 is not five points lower, and it is the errors and the flips that say the rest; likewise without labels.

Sources: Bennett, Spectra of quantized signals, Bell Syst. Tech. J. 27 (1948) · Higham & Mary, A new approach to
probabilistic rounding error analysis, SIAM J. Sci. Comput. 41 (2019) · Tango, Equivalence test and confidence interval
for the difference in proportions for the paired-sample design, Stat. Med. 17 (1998) · Reddi et al., MLPerf inference
benchmark, ISCA 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from export.bundle.manifest import COARSER, FLOAT32, Limits, OutputKind, Precision, Tolerances

# The fast profile lets float32 be computed in TF32, whose significand is float16's.
TF32_COARSER = COARSER["float16"]
FLOAT32_ROUNDOFF = 2.0**-24
NO_SPREAD = 1e-12
"""Of the outputs' RMS: what float64 makes of taking the mean of a constant."""
FLIP_ERRORS = 10.0
"""The widest margin that may flip, in RMS errors of the images that did not."""
LEAST_ERROR = 0.1
"""Of the limit: an error that a precision may make even where a file happens to be closer."""
FLIPS_GRANTED, FLIPS_P = 2.0, 1e-4
"""How many times the expected flips are granted, and how seldom a file with that many on average fails."""
TOP1_Z = 1.6448536269514722
"""Of the normal distribution, one-sided 95 %."""
TOP1_IMAGES = 10
"""The fewest images that the margin of top-1 amounts to."""
ROWS = 100_000
"""Predictions looked at in one go: a map of them for each image is many."""
CHOICES_SHARE = 1e-3
FLOAT32_SHARE = 1e-4
"""Of the outputs' RMS: float32 that is further off than that is no unit for anything. The article's is off by 2e-7."""


def are_class_scores(outputs: np.ndarray) -> bool:
    """One row of at least two scores for each image. Anything else has no prediction that could flip, unless somebody
    says so."""
    return kind_of(outputs) == "scores"


def kind_of(outputs: np.ndarray) -> OutputKind:
    """What outputs [N, …] of which nobody said it are made of."""
    if outputs.dtype.kind != "f":
        return "choices"
    return "scores" if outputs.ndim == 2 and outputs.shape[1] >= 2 else "values"


def by_class(scores: np.ndarray) -> np.ndarray:
    """Scores [N, C, …] as rows [N · …, C], one for each prediction."""
    return scores if scores.ndim == 2 else np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])


def rms(values: np.ndarray) -> float:
    """Root of the mean square of an array of any shape; infinite where a value is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        root = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    return root if math.isfinite(root) else math.inf


def rms_of_each(values: np.ndarray) -> np.ndarray:
    """Root of the mean square of each image's values, [N, …] to [N]."""
    each: np.ndarray = np.sqrt(np.square(values).reshape(len(values), -1).mean(1))
    return each


def spread(truth: np.ndarray, kind: OutputKind | None = None) -> float:
    """The unit of the RMS error: the RMS of class scores [N, C ≥ 2, …] less their mean, of others less the mean of all.

    0 where that is no more than float64's own rounding.
    """
    scores = (kind or kind_of(truth)) == "scores"
    found = rms(truth - (truth.mean(1, keepdims=True) if scores else truth.mean()))
    return found if found > NO_SPREAD * rms(truth) else 0.0


@dataclass(frozen=True)
class RmsLimit:
    """The largest RMS error of right logits.

    Attributes:
        value: on all of the oracle's inputs, in units of the outputs.
        float32: what float32 torch on the CPU is off, at least float32's own rounding of the outputs.
        spread: of the oracle's outputs; 0 where they are constant.
        centre: the mean output of the oracle's images, [1, …]; None where there is one image only.
        strict: whether this is float32 without TF32, which is held to `float32`.
    """

    value: float
    float32: float
    spread: float
    centre: np.ndarray | None
    strict: bool

    @classmethod
    def of(
        cls,
        truth: np.ndarray,
        tolerances: Tolerances,
        precision: Precision,
        *,
        tf32: bool,
        kind: OutputKind | None = None,
    ) -> RmsLimit:
        """The limit for a file of that precision, from the oracle's logits, float64 [N, …]."""
        strict = precision == FLOAT32 and not tf32
        coarser = TF32_COARSER if precision == FLOAT32 and tf32 else COARSER[precision]
        # Outputs that float32 happens to hold exactly, a constant for example, are rounded by other precisions.
        once = FLOAT32_ROUNDOFF * rms(truth)
        float32 = max(tolerances.float32_rms_error, once)
        rounding = tolerances.strict_rms_factor * coarser * float32
        unit = spread(truth, kind)
        value = rounding if strict else max(limits_of(tolerances, precision).rms_percent / 100 * unit, rounding)
        centre = truth.mean(0, keepdims=True) if len(truth) > 1 else None
        moved = 0.0 if centre is None else rms(truth - centre)
        tells = moved > tolerances.strict_rms_factor * coarser * once
        return cls(min(value, moved / 2) if tells else value, float32, unit, centre, strict)

    def on(self, truth: np.ndarray) -> float:
        """The limit on some of the images, whose oracle's logits are `truth`, float64 [n, …]."""
        own = 0.0 if self.centre is None else rms(truth - self.centre)
        return float(self._few(np.asarray(own), len(truth)))

    def on_each(self, truth: np.ndarray) -> np.ndarray:
        """The limit on each of these images alone, [n]."""
        return self._few(np.zeros(len(truth)) if self.centre is None else rms_of_each(truth - self.centre), 1)

    def _few(self, own: np.ndarray, count: int) -> np.ndarray:
        root = math.sqrt(count)
        return np.maximum(self.value * (1 + 1 / root), np.minimum(self.value * (1 + 4 / root), own / 2))

    def in_words(self, largest: float) -> str:
        """A limit of this kind, with its unit."""
        if self.strict and self.float32 > 0:
            return f"{largest:.3g}, {largest / self.float32:.3g} times that of float32 torch on the CPU"
        if self.spread > 0:
            return f"{largest:.3g}, {100 * largest / self.spread:.3g} % of the spread of the oracle's outputs"
        return f"{largest:.3g}, the precision's rounding of outputs that are constant"


def limits_of(tolerances: Tolerances, precision: Precision) -> Limits:
    """The limits of a precision; of float32 those of the fast profile."""
    return {
        "float32": tolerances.fast,
        "float16": tolerances.float16,
        "bfloat16": tolerances.bfloat16,
        "int8": tolerances.int8,
    }[precision]


def explained_flips(truth: np.ndarray, error: float) -> float:
    """How many predictions flip on average, at most, where scores [N, C] have independent normal errors of that RMS."""
    from scipy.special import ndtr  # here: the workers import this module and need no scipy

    total = 0.0
    for start in range(0, len(truth), ROWS):
        part = truth[start : start + ROWS]
        behind = part.max(1, keepdims=True) - part
        each = ndtr(-behind / (math.sqrt(2) * error)).sum(1) - 0.5  # the top itself is not behind
        total += float(np.minimum(each, 1).sum())
    return total


def most_choices(count: int, tolerances: Tolerances, precision: Precision, *, tf32: bool) -> int:
    """Of `count` whole numbers that name something, how many may be others than the oracle's.

    Nobody knows how near to a tie each was, so that a share of them is granted: of float32 a thousandth, of coarser
    precisions what their RMS error may be.
    """
    strict = precision == FLOAT32 and not tf32
    share = CHOICES_SHARE if strict else limits_of(tolerances, precision).rms_percent / 100
    return most_flips(share * count / FLIPS_GRANTED)


def most_flips(expected: float) -> int:
    """The most flips that a right file may have where `expected` are explained."""
    from scipy.stats import poisson

    return int(poisson.isf(FLIPS_P, FLIPS_GRANTED * expected))


def top1_loss_bound(lost: int, gained: int, images: int, z: float = TOP1_Z) -> float:
    """By how much a share of right predictions may be lower than another's on the same images: an upper bound.

    `lost` images only the other has right, `gained` only this one. Negative where this one is surely better.
    Tango's (1998) score bound, which also holds where nothing was lost: the largest loss d for which the score test of
    "the loss is d" stays above −z.
    """

    def score(d: float) -> float:
        b, c = -(lost + gained) + (2 * images - lost + gained) * d, -gained * d * (1 - d)
        share = (math.sqrt(max(b * b - 8 * images * c, 0.0)) - b) / (4 * images)  # gained, where the loss is d
        variance = images * max(2 * share + d * (1 - d), 0.0)
        off = lost - gained - images * d
        return off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off)

    low, high = (lost - gained) / images, 1.0
    for _ in range(60):  # as good as float64 tells
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) >= -z else (low, middle)
    return high


def top1_margin(limits: Limits, images: int) -> float:
    """By how much the share of right predictions may be lower, in [0, 1]."""
    return max(limits.top1_loss_points / 100, TOP1_IMAGES / images)


def laxer(tolerances: Tolerances, truth: np.ndarray) -> tuple[str, ...]:
    """In words, each limit of a bundle that lets more pass than the project's own does; `truth` its oracle's logits."""

    def flat(values: dict[str, object], prefix: str = "") -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, tuple):
                continue  # of other outputs
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: float(str(value))}
        return found

    own = flat(Tolerances(float32_rms_error=FLOAT32_SHARE * rms(truth)).model_dump())
    stated = flat(tolerances.model_dump())
    return tuple(
        f"{name} is {stated[name]:.3g}, the project's {own[name]:.3g}" for name in own if stated[name] > own[name]
    )

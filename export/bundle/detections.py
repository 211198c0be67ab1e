"""What detectors find: lists of boxes, of another length for each image, and whether such lists are right.

Owns how lists are kept in one array, and when two lists say the same. A detector sorts, cuts off at a score and drops
boxes that overlap better ones: where two numbers are nearly the same, rounding decides, and a box is there or isn't. So
lists are compared as sets. A box of one list is found in the other where that has one of the same class that covers the
same area, as intersection over union; of two that could both be it, the better one is taken first. Then a share of the
boxes may be in one list alone, and the scores of the others may be off by so much.

| precision | intersection over union | in one list alone | scores, RMS |
|---|---|---|---|
| float32 | 0.99 | 1 % | 0.001 |
| TF32, float16 | 0.95 | 2 % | 0.01 |
| bfloat16 | 0.9 | 5 % | 0.08 |
| int8 | 0.8 | 10 % | 0.2 |

The scores' limits are those of other outputs, `export.bundle.limits`, for scores between 0 and 1. Measured with
torchvision's Faster R-CNN (MobileNetV3, 320 pixels) with random weights, in float32 by torch: of 800 boxes none was in
one list alone, and scores were off by 1e-7 to 1e-5. Where all scores are nearly the same, as an untrained detector's
are, float32 and float64 choose other boxes: of 1,600 a quarter were in one list alone. Nothing can be held to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.bundle.limits import FLIPS_GRANTED, most_flips
from export.bundle.manifest import BOX_KINDS, FLOAT32, Arrays, Output, Precision

PADDING = -1
"""What fills the classes of an array where an image has fewer boxes than another; NaN fills boxes and scores."""


@dataclass(frozen=True)
class BoxLimits:
    """The least intersection over union, the largest share of boxes in one list alone, the largest RMS of scores."""

    overlap: float
    alone: float
    scores_rms: float


STRICT = BoxLimits(0.99, 0.01, 0.001)
COARSE: dict[Precision, BoxLimits] = {
    "float32": BoxLimits(0.95, 0.02, 0.01),
    "float16": BoxLimits(0.95, 0.02, 0.01),
    "bfloat16": BoxLimits(0.9, 0.05, 0.08),
    "int8": BoxLimits(0.8, 0.1, 0.2),
}


def joined(parts: Sequence[Arrays], specs: Sequence[Output]) -> Arrays:
    """The outputs of several calls as one array for each output, [N, …].

    A list of boxes, [D, …], is what one call gives for one image; they become [N, largest D, …], padded.
    """
    return tuple(
        padded([part[place] for part in parts])
        if spec.kind in BOX_KINDS
        else np.concatenate([part[place] for part in parts])
        for place, spec in enumerate(specs)
    )


def padded(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [D, …] of several lengths as one, [N, largest D, …]."""
    first = lists[0]
    shape = (len(lists), max(map(len, lists)), *first.shape[1:])
    whole = np.full(shape, np.nan if first.dtype.kind == "f" else PADDING, first.dtype)
    for place, rows in enumerate(lists):
        whole[place, : len(rows)] = rows
    return whole


@dataclass(frozen=True)
class Found:
    """The boxes of some images: `corners` [N, D, 4], `scores` [N, D] and `classes` [N, D] or None, padded."""

    corners: np.ndarray
    scores: np.ndarray | None
    classes: np.ndarray | None

    @classmethod
    def of(cls, outputs: Arrays, specs: Sequence[Output]) -> Found | None:
        """Those among a model's outputs; None where it has no boxes."""
        by_kind = {spec.kind: output for spec, output in zip(specs, outputs, strict=True)}
        if "boxes" not in by_kind:
            return None
        return cls(by_kind["boxes"], by_kind.get("box_scores"), by_kind.get("box_classes"))

    def image(self, place: int) -> Found:
        """The boxes of one image, the best first, without what is padded."""
        there = np.isfinite(self.corners[place]).all(-1)
        order = np.flatnonzero(there)
        if self.scores is not None:
            order = order[np.argsort(-self.scores[place][order], kind="stable")]
        return Found(
            self.corners[place][order].astype(np.float64),
            None if self.scores is None else self.scores[place][order].astype(np.float64),
            None if self.classes is None else self.classes[place][order],
        )


@dataclass(frozen=True)
class BoxVerdict:
    """What came of two lists: `failures` in words, and what they rest on. `scores_rms` is None without scores."""

    failures: tuple[str, ...]
    boxes: int
    alone: int
    scores_rms: float | None


def judge_boxes(found: Found, truth: Found, precision: Precision, *, tf32: bool) -> BoxVerdict:
    """Whether two lists for each of the same images say the same."""
    limits = STRICT if precision == FLOAT32 and not tf32 else COARSE[precision]
    boxes = alone = 0
    off: list[float] = []
    for place in range(len(truth.corners)):
        ours, theirs = found.image(place), truth.image(place)
        pairs = _pairs(ours, theirs, limits.overlap)
        boxes += len(theirs.corners)
        alone += len(ours.corners) + len(theirs.corners) - 2 * len(pairs)
        if ours.scores is not None and theirs.scores is not None:
            off += [ours.scores[i] - theirs.scores[j] for i, j in pairs]
    most = most_flips(2 * limits.alone * max(boxes, 1) / FLIPS_GRANTED)
    rms = float(np.sqrt(np.mean(np.square(off)))) if off else None
    failures = []
    if alone > most:
        failures.append(f"{alone} boxes are in one list alone, of {boxes} of the oracle's; the limit is {most}")
    if rms is not None and rms > limits.scores_rms:
        failures.append(f"scores of the same boxes are off by {rms:.3g} (RMS), the limit is {limits.scores_rms}")
    return BoxVerdict(tuple(failures), boxes, alone, rms)


def _pairs(ours: Found, theirs: Found, least: float) -> list[tuple[int, int]]:
    """Which of our boxes is which of theirs."""
    overlap = overlaps(ours.corners, theirs.corners)
    if ours.classes is not None and theirs.classes is not None:
        overlap = np.where(ours.classes[:, None] == theirs.classes[None], overlap, 0)
    pairs = []
    for place in range(len(ours.corners)):
        best = int(overlap[place].argmax()) if overlap.shape[1] else 0
        if overlap.shape[1] and overlap[place, best] >= least:
            pairs.append((place, best))
            overlap[:, best] = 0
    return pairs


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [A, 4] with boxes [B, 4], [A, B]; of two without an area, 1 where they are the
    same.
    """
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (ours, theirs)]
    union = areas[0][:, None] + areas[1][None] - common
    same = np.isclose(ours[:, None], theirs[None]).all(-1)
    found: np.ndarray = np.where(union > 0, common / np.where(union > 0, union, 1), same.astype(float))
    return found

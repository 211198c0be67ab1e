"""Lists of boxes: kept in one array, compared as sets."""

from __future__ import annotations

import numpy as np
import pytest

from export.bundle import Oracle, Output, Tolerances
from export.bundle.detections import joined, overlaps, padded
from export.bundle.verdict import Verdict, judge_all

SPECS = (
    Output(name="boxes", dtype="float32", shape=("found", 4), kind="boxes"),
    Output(name="labels", dtype="int64", shape=("found",), kind="box_classes"),
    Output(name="scores", dtype="float32", shape=("found",), kind="box_scores"),
)
COUNTS = (7, 0, 100, 31, 12)
Lists = list[tuple[np.ndarray, ...]]


def lists(seed: int = 0) -> Lists:
    draw = np.random.default_rng(seed)
    made = []
    for count in COUNTS:
        corner = draw.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corner, corner + draw.uniform(5, 100, (count, 2))], 1)
        made.append((boxes, draw.integers(1, 91, count), np.sort(draw.uniform(0.05, 1, count))[::-1]))
    return made


def verdict(found: Lists, truth: Lists | None = None, precision: str = "float32") -> Verdict:
    boxes, labels, scores = joined(truth or lists(), SPECS)
    oracle = Oracle(np.zeros((len(boxes), 1)), None, boxes, (), (labels, scores))
    tolerances = Tolerances(float32_rms_error=0.0, more_float32_rms_errors=(0.0, 0.0))
    return judge_all(joined(found, SPECS), oracle, SPECS, tolerances, precision)  # type: ignore[arg-type]


def changed(**how: object) -> Lists:
    """The lists with one thing wrong in each."""
    result = []
    for boxes, labels, scores in lists():
        parts = {"boxes": boxes, "labels": labels, "scores": scores}
        for name, change in how.items():
            parts[name] = change(parts[name])  # type: ignore[operator]
        result.append(tuple(parts.values()))
    return result


def test_lists_are_padded() -> None:
    whole = padded([np.ones((2, 4)), np.ones((0, 4)), np.ones((3, 4))])
    assert whole.shape == (3, 3, 4)
    assert np.isfinite(whole).all(-1).sum(1).tolist() == [2, 0, 3]
    assert padded([np.array([4]), np.array([], np.int64)]).tolist() == [[4], [-1]]


def test_the_same_lists_are_right_in_any_order() -> None:
    assert verdict(lists()).passed
    shuffled = []
    for boxes, labels, scores in lists():
        order = np.random.default_rng(1).permutation(len(boxes))
        shuffled.append((boxes[order], labels[order], scores[order]))
    assert verdict(shuffled).passed


def test_rounding_is_right() -> None:
    assert verdict(changed(boxes=np.float32, scores=lambda s: (s + 1e-6).astype(np.float32))).passed


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"scores": lambda s: 0.01 * s}, "scores of the same boxes"),
        ({"scores": lambda s: s + 0.01}, "scores of the same boxes"),
        ({"labels": lambda n: n % 90 + 1}, "in one list alone"),
        ({"boxes": lambda b: b[:, [1, 0, 3, 2]]}, "in one list alone"),
        ({"boxes": lambda b: b + 3}, "in one list alone"),
        ({"boxes": lambda b: 1.05 * b}, "in one list alone"),
    ],
)
def test_what_is_wrong_fails(how: dict[str, object], says: str) -> None:
    (failure,) = verdict(changed(**how)).failures
    assert failure.startswith("boxes: ")
    assert says in failure


@pytest.mark.parametrize("keep", [0, 0.9])
def test_boxes_that_are_missing_or_too_many_fail(keep: float) -> None:
    fewer = [tuple(part[: int(keep * len(part))] for part in parts) for parts in lists()]
    assert "in one list alone" in verdict(fewer).failures[0]
    assert "in one list alone" in verdict(lists(), fewer).failures[0]


def test_a_box_of_rounding_more_is_right() -> None:
    boxes, labels, scores = lists()[2]
    others = [*lists()[:2], (boxes[:-1], labels[:-1], scores[:-1]), *lists()[3:]]
    found = verdict(others)
    assert found.passed
    assert found.changed_percent == pytest.approx(100 / sum(COUNTS))


def test_coarser_precisions_may_be_off_by_more() -> None:
    off = changed(boxes=lambda b: b + 0.3, scores=lambda s: s + 0.05)
    assert not verdict(off).passed
    assert verdict(off, precision="int8").passed


def test_no_list_at_all_is_wrong() -> None:
    oracle = Oracle(np.zeros((1, 1)), None, np.zeros((1, 2, 4)), (), (np.zeros((1, 2), np.int64), np.zeros((1, 2))))
    tolerances = Tolerances(float32_rms_error=0.0, more_float32_rms_errors=(0.0, 0.0))
    assert not judge_all((np.zeros((1, 2, 4)),), oracle, SPECS, tolerances).passed


def test_overlap_is_intersection_over_union() -> None:
    one = np.array([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    other = np.array([[1.0, 0, 3, 2], [0, 0, 2, 2], [5, 5, 5, 5]])
    np.testing.assert_allclose(overlaps(one, other), [[1 / 3, 1, 0], [0, 0, 1]])

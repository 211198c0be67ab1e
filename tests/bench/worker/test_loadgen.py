"""The real LoadGen against callables whose answers are known."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.results.terms import Scenario
from bench.worker.loadgen import Load, drive, read_outputs, read_summary, read_version
from export.bundle import Output
from export.bundle.detections import joined

# A number that neither 8 nor 16 divides: multi-stream fills its last query up, the last call of offline is short.
RAW = np.random.default_rng(0).integers(0, 256, (37, 1, 4, 4), dtype=np.uint8)
IMAGES_PER_CALL = {"single-stream": 1, "multi-stream": 8, "offline": 16, "server": 1}


def answer(raw: np.ndarray) -> np.ndarray:
    """Three numbers that tell every image of `RAW` apart."""
    flat = raw.reshape(len(raw), -1).astype(np.float32)
    return np.stack([flat.sum(1), flat[:, 0] - flat[:, 1], flat @ np.arange(16, dtype=np.float32)], axis=1)


def answers(raw: np.ndarray) -> tuple[np.ndarray, ...]:
    """A model of two outputs, one of them whole numbers."""
    return answer(raw), raw.reshape(len(raw), 4, 4).astype(np.int64)


TWO = (
    Output(name="numbers", dtype="float32", shape=("batch", 3)),
    Output(name="picture", dtype="int64", shape=("batch", 4, 4)),
)


def load(scenario: Scenario, **changes: object) -> Load:
    fields: dict[str, object] = {
        "scenario": scenario,
        "accuracy": False,
        "min_duration_s": 0.05,
        "images_per_call": IMAGES_PER_CALL[scenario],
        "queries_per_s": 5_000.0,
        "latency_bound_s": 1.0 if scenario is Scenario.SERVER else None,
    }
    return Load(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("scenario", Scenario)
def test_accuracy_mode_brings_every_image_its_own_output(scenario: Scenario, tmp_path: Path) -> None:
    before = RAW.copy()
    drive(answers, (RAW,), load(scenario, accuracy=True), tmp_path / "log")
    for found, wanted in zip(read_outputs(tmp_path / "log", answers(RAW), TWO), answers(RAW), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(RAW, before)
    assert read_version(tmp_path / "log")[0].isdigit()


@pytest.mark.parametrize("scenario", Scenario)
def test_performance_mode_measures_calls_of_the_asked_size(scenario: Scenario, tmp_path: Path) -> None:
    sizes: list[int] = []

    def call(raw: np.ndarray) -> tuple[np.ndarray, ...]:
        assert raw.flags.c_contiguous
        assert raw.flags.writeable
        sizes.append(len(raw))
        time.sleep(2e-4)
        return answers(raw)

    # Offline makes what 100,000 images a second need; 16 in 0.2 ms are fewer, so that it takes long enough.
    rate = {Scenario.OFFLINE: 100_000.0, Scenario.SERVER: 2_000.0}.get(scenario, 5_000.0)
    driven = drive(call, (RAW,), load(scenario, queries_per_s=rate), tmp_path / "log")
    summary = read_summary(tmp_path / "log")
    assert summary.valid, summary
    assert summary.unmet == ()
    assert set(sizes) <= {IMAGES_PER_CALL[scenario], driven.images % IMAGES_PER_CALL[scenario]}
    assert sum(sizes) == driven.images
    assert set(summary.latency_ns) == {50, 90, 95, 97, 99, 99.9}
    assert summary.latency_ns[50] >= 2e5
    if scenario is Scenario.OFFLINE:
        assert driven.queries == 1
        assert summary.images_per_s == pytest.approx(driven.images / driven.seconds, rel=0.5)
    else:
        assert driven.queries == len(sizes)
    if scenario in (Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM):
        assert summary.images_per_s is None


def test_a_bound_that_does_not_hold_is_invalid(tmp_path: Path) -> None:
    """And a run that falls far behind its schedule is given up: at this rate it would take 6.6 s."""

    def call(raw: np.ndarray) -> tuple[np.ndarray, ...]:
        time.sleep(0.01)
        return answers(raw)

    driven = drive(call, (RAW,), load(Scenario.SERVER, latency_bound_s=0.02), tmp_path / "log")
    summary = read_summary(tmp_path / "log")
    assert not summary.valid
    assert "Performance constraints" in summary.unmet
    assert driven.seconds < 3


def test_a_run_that_ends_too_early_is_invalid(tmp_path: Path) -> None:
    drive(answers, (RAW,), load(Scenario.OFFLINE, queries_per_s=1.0, min_duration_s=1.0), tmp_path / "log")
    summary = read_summary(tmp_path / "log")
    assert not summary.valid
    assert summary.unmet == ("Min duration",)


@pytest.mark.parametrize("scenario", Scenario)
def test_what_a_call_raises_is_raised_when_loadgen_has_ended(scenario: Scenario, tmp_path: Path) -> None:
    """An exception that passes through LoadGen leaves its threads behind, and the process dies of that."""
    calls = 0

    def call(raw: np.ndarray) -> tuple[np.ndarray, ...]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no kernel for this operator")
        return answers(raw)

    for accuracy in (True, False):
        calls = 0
        with pytest.raises(RuntimeError, match="no kernel"):
            drive(call, (RAW,), load(scenario, accuracy=accuracy), tmp_path / f"log-{accuracy}")
        assert calls == 3


def test_lists_of_any_length_come_back(tmp_path: Path) -> None:
    """What a detector finds in an image is a list, empty for some; LoadGen takes bytes."""
    specs = (
        Output(name="boxes", dtype="float32", shape=("boxes", 4), kind="boxes"),
        Output(name="classes", dtype="int64", shape=("boxes",), kind="box_classes"),
        Output(name="whole", dtype="float32", shape=("batch", 2)),
    )

    def listed(raw: np.ndarray) -> tuple[np.ndarray, ...]:
        count = int(raw[0, 0, 0, 0]) % 4
        boxes = np.arange(4 * count, dtype=np.float32).reshape(1, count, 4) + raw[0, 0, 0, 1]
        return boxes, np.arange(count)[None], raw[:, 0, 0, :2].astype(np.float32)

    singles = [listed(RAW[place : place + 1]) for place in range(len(RAW))]
    wanted = joined([(boxes[0], classes[0], whole) for boxes, classes, whole in singles], specs)
    drive(listed, (RAW,), load(Scenario.SINGLE_STREAM, accuracy=True), tmp_path / "log")
    for found, each in zip(read_outputs(tmp_path / "log", wanted, specs), wanted, strict=True):
        np.testing.assert_array_equal(found, each)


def test_a_summary_without_a_verdict_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlperf_log_summary.txt").write_text("\nNo errors encountered during test.\n")
    with pytest.raises(ValueError, match="no verdict"):
        read_summary(tmp_path)


def test_outputs_that_are_missing_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlperf_log_accuracy.json").write_text('[{ "seq_id" : 0, "qsl_idx" : 1, "data" : "0000803f" }]')
    with pytest.raises(ValueError, match="of 1 of 2 images"):
        read_outputs(tmp_path, (np.zeros((2, 1), np.float32),), TWO[:1])

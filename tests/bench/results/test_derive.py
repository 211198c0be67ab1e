"""Which samples make which row and ratio."""

from __future__ import annotations

import pytest

from bench.backends.contract import Device
from bench.results.derive import CONFIRMED_ROUNDS, decided, ratios, rows, slower
from bench.results.schema import Sample, SubjectResult
from bench.results.terms import LETTER_SIGN, Timing


def sample(subject: str, round_: int, milliseconds: list[float], timing: Timing, batch_size: int = 4) -> Sample:
    return Sample(
        subject=subject,
        batch_size=batch_size,
        round=round_,
        position=0,
        timing=timing,
        started_at_unix_s=0.0,
        started_at_monotonic_ns=0,
        durations_ns=tuple(int(duration * 1e6) for duration in milliseconds),
        energy_j={},
        quiet_after_s=0.0,
    )


def both(subject: str, round_: int, device_ms: list[float], whole_ms: list[float]) -> list[Sample]:
    return [sample(subject, round_, device_ms, "device_resident"), sample(subject, round_, whole_ms, "end_to_end")]


def subject(label: str, device: Device, letter: str | None = None) -> SubjectResult:
    return SubjectResult(
        label=label,
        backend=label.partition(LETTER_SIGN)[0],
        letter=letter,
        device=device,
        file=None,
        placement=None,
        settings={},
        timer_overhead_ns=None,
        peak_memory_bytes=None,
        peak_gpu_memory_bytes=None,
        warm_ups=(),
        parity=None,
        failure=None,
    )


def test_a_row_keeps_the_two_timings_apart_and_pools_the_calls() -> None:
    samples = [
        *both("a", 0, [1.0, 3.0], [10.0] * 5),
        *both("a", 1, [1.0, 1.0], [20.0] * 5),
        *both("a", 2, [4.0], [30.0]),
    ]
    (row,) = rows(samples, [subject("a", "cpu")])
    assert row.device_resident_throughput_images_per_s.median == pytest.approx(4 / 0.002)
    assert row.end_to_end_throughput_images_per_s.median == pytest.approx(4 / 0.020)
    assert row.end_to_end_throughput_images_per_s.n == 3
    # Eleven calls: 10 ms five times, 20 ms five times, 30 ms once. The mean of the rounds' percentiles would not do.
    assert row.end_to_end_latency_ms.p50 == 20
    assert row.end_to_end_latency_ms.p90 == 20
    assert row.end_to_end_latency_ms.p99 is None
    assert row.device_resident_latency_ms.p50 == 1


def test_ratios_are_against_torch_on_the_same_device_and_against_the_control() -> None:
    labels: list[tuple[str, Device]] = [
        ("torch-cpu", "cpu"),
        ("onnx-cpu", "cpu"),
        ("onnx-cpu:unfolded", "cpu"),
        ("onnx-cuda", "cuda"),
        ("null", "none"),
    ]
    samples = [s for round_ in range(2) for label, _ in labels for s in both(label, round_, [2.0], [4.0])]
    found = ratios(samples, [subject(*label) for label in labels])
    assert {(ratio.against, ratio.numerator, ratio.denominator) for ratio in found} == {
        ("torch", "onnx-cpu", "torch-cpu"),
        ("torch", "onnx-cpu:unfolded", "torch-cpu"),
        ("control", "onnx-cpu", "onnx-cpu:unfolded"),
    }
    assert {ratio.timing for ratio in found} == {"device_resident", "end_to_end"}


def test_several_bundles_are_each_against_the_first_and_their_own_torch() -> None:
    labels = [f"{backend}@{letter}" for backend in ("torch-cpu", "onnx-cpu") for letter in "ABC"]
    subjects = [subject(label, "cpu", label[-1]) for label in labels]
    samples = [s for round_ in range(2) for label in labels for s in both(label, round_, [2.0], [4.0])]
    found = {(ratio.against, ratio.numerator, ratio.denominator) for ratio in ratios(samples, subjects)}
    assert found == {
        *(("torch", f"onnx-cpu@{letter}", f"torch-cpu@{letter}") for letter in "ABC"),
        *(("base", f"{name}@{letter}", f"{name}@A") for name in ("torch-cpu", "onnx-cpu") for letter in "BC"),
    }


def test_slower_is_what_lies_wholly_below_the_threshold() -> None:
    """A's calls take 10 ms; B's a little more or less in each round, C's 12 ms throughout."""
    samples = []
    for round_ in range(8):
        samples += both("x@A", round_, [10.0], [10.0])
        samples += both("x@B", round_, [9.5 + 0.2 * round_], [10.0])
        samples += both("x@C", round_, [12.0], [10.0])
    subjects = [subject(f"x@{letter}", "cpu", letter) for letter in "ABC"]
    found = ratios(samples, subjects)
    assert [(r.numerator, r.timing) for r in slower(found, 5)] == [("x@C", "device_resident")]
    assert not slower(found, 20), "10/12 is above 1 - 20 %"


@pytest.mark.parametrize(
    ("b_ms", "rounds", "want"),
    [
        (10.0, 6, True),  # as fast: known at once
        (12.0, 6, False),  # slower, but so is what a short disturbance makes of it
        (12.0, CONFIRMED_ROUNDS, True),
        (10.0, 5, False),  # no interval yet
    ],
)
def test_slower_is_only_decided_when_it_has_lasted(b_ms: float, rounds: int, want: bool) -> None:
    samples = [s for r in range(rounds) for s in (*both("x@A", r, [10.0], [10.0]), *both("x@B", r, [b_ms], [10.0]))]
    assert decided(samples, [subject(f"x@{letter}", "cpu", letter) for letter in "AB"], 0.95) is want


def test_energy_is_left_out_where_the_counter_is_too_coarse() -> None:
    long = [sample("a", r, [500.0], "device_resident").model_copy(update={"energy_j": {"gpu": 20.0}}) for r in range(4)]
    whole = [sample("a", r, [500.0], "end_to_end") for r in range(4)]
    (row,) = rows(long + whole, [subject("a", "cuda")])
    assert row.energy_per_image_j == {"gpu": 5.0}
    (row,) = rows(long[:3] + whole, [subject("a", "cuda")])
    assert row.energy_per_image_j == {}


def test_a_round_that_only_one_of_two_finished_is_left_out() -> None:
    """A faster backend means a ratio above 1, and rounds are matched by number, not by position."""
    samples = [
        *both("torch-cpu", 0, [8.0], [8.0]),
        *both("torch-cpu", 1, [16.0], [16.0]),
        *both("torch-cpu", 2, [32.0], [32.0]),
        *both("onnx-cpu", 1, [4.0], [8.0]),
        *both("onnx-cpu", 2, [8.0], [16.0]),
    ]
    device, whole = ratios(samples, [subject("torch-cpu", "cpu"), subject("onnx-cpu", "cpu")])
    assert (device.throughput_ratio.median, device.throughput_ratio.rounds) == (4.0, 2)
    assert whole.throughput_ratio.median == 2.0

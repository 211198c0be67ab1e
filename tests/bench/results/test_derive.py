"""Which samples make which row and ratio."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.backends.contract import Device
from bench.results.derive import decided, ratios, rows, stable, verdicts
from bench.results.schema import Result, Sample, SubjectResult
from bench.results.terms import LETTER_SIGN, Timing


def sample(
    subject: str, round_: int, milliseconds: list[float], timing: Timing, batch_size: int = 4, process: int = 0
) -> Sample:
    return Sample(
        subject=subject,
        batch_size=batch_size,
        process=process,
        round=round_,
        position=0,
        timing=timing,
        started_at_unix_s=0.0,
        started_at_monotonic_ns=0,
        durations_ns=tuple(int(duration * 1e6) for duration in milliseconds),
        energy_j={},
        quiet_after_s=0.0,
    )


def both(subject: str, round_: int, device_ms: list[float], whole_ms: list[float], process: int = 0) -> list[Sample]:
    return [
        sample(subject, round_, device_ms, "device_resident", process=process),
        sample(subject, round_, whole_ms, "end_to_end", process=process),
    ]


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


def compared(result: Result, b_ms: list[float], busy: float = 0.0) -> Result:
    """`result` with A's calls of 10 ms and B's of those, one round for each process; B's end to end are as A's."""
    samples = [
        one
        for process, ms in enumerate(b_ms)
        for one in (*both("x@A", 0, [10.0], [10.0], process), *both("x@B", 0, [ms], [10.0], process))
    ]
    subjects = tuple(subject(f"x@{letter}", "cpu", letter) for letter in "AB")
    machine = {"environment": replace(result.environment, cpu_busy_percent=busy), "cpu_busy_percents": (busy, busy)}
    return result.model_copy(update={"samples": samples, "ratios": ratios(samples, subjects), **machine})


@pytest.mark.parametrize(
    ("b_ms", "device"),
    [
        ([12.0, 12.1, 11.9], "slower"),
        ([10.0, 10.1, 9.9], "not slower"),
        ([8.0, 8.0, 8.0], "not slower"),
        ([11.4, 9.0, 13.0], "inconclusive"),  # a median of 0.88 with an interval up to 1.3 failed open
        ([12.0, 12.0], "inconclusive"),
    ],
)
def test_a_bundle_is_slower_or_not_or_nobody_knows(b_ms: list[float], device: str, result: Result) -> None:
    decisions = {ratio.timing: decision for ratio, decision in verdicts(compared(result, b_ms), 5)}
    assert decisions["device_resident"] == device
    assert decisions["end_to_end"] == ("not slower" if len(b_ms) > 2 else "inconclusive")
    assert device != "slower" or verdicts(compared(result, b_ms), 20)[0][1] == "not slower", "10/12 is above 1 - 20 %"


def test_a_busy_machine_raises_no_alarm(result: Result) -> None:
    """It was busy most of the times that somebody looked. What is not slower there isn't slower either."""
    decisions = [decision for _, decision in verdicts(compared(result, [12.0, 12.1, 11.9], busy=60.0), 5)]
    assert decisions == ["inconclusive", "not slower"]


@pytest.mark.parametrize(
    ("b_ms", "want"),
    [
        ([10.0] * 3, True),
        ([12.0] * 3, True),
        ([10.0] * 2, False),
        ([10.6, 10.7, 10.65], False),  # 0.94 and all alike: 95 % would be sure, and after many looks wrong
        ([10.9, 10.95, 10.92, 10.9, 10.93], True),
    ],
)
def test_a_look_decides_when_it_is_sure(b_ms: list[float], want: bool, result: Result) -> None:
    made = compared(result, b_ms)
    assert decided(made.samples, [subject(f"x@{letter}", "cpu", letter) for letter in "AB"], 0.95) is want


def test_rows_are_of_processes() -> None:
    """The median of the processes' medians, so that one with many rounds counts as one; the calls of all together."""
    samples = [one for r in range(5) for one in both("a", r, [4.0], [40.0])]
    samples += [*both("a", 0, [2.0], [20.0], process=1), *both("a", 0, [1.0], [10.0], process=2)]
    (row,) = rows(samples, [subject("a", "cpu")])
    device = row.device_resident_throughput_images_per_s
    assert (device.median, device.n, device.processes) == (pytest.approx(2000), 7, 3)
    assert device.low is not None
    assert row.device_resident_latency_ms.p50 == 4.0
    assert not stable(samples)
    assert stable([one for p in range(3) for one in both("a", 0, [4.0], [40.0], process=p)])
    assert not stable([one for r in range(9) for one in both("a", r, [4.0], [40.0])]), "one process is never enough"


def test_the_systems_share_is_of_the_end_to_end_blocks() -> None:
    used = [{"cpu_s": 1.0, "system_s": 0.5}, {"cpu_s": 3.0, "system_s": 0.3}]
    samples = [sample("a", r, [4.0], "end_to_end").model_copy(update=times) for r, times in enumerate(used)]
    samples += [sample("a", 0, [4.0], "device_resident").model_copy(update={"cpu_s": 1.0, "system_s": 1.0})]
    (row,) = rows(samples, [subject("a", "cpu")])
    assert row.system_share_percent == pytest.approx(20)
    (row,) = rows(both("a", 0, [4.0], [4.0]), [subject("a", "cpu")])
    assert row.system_share_percent is None


def test_energy_is_left_out_where_the_counter_is_too_coarse() -> None:
    joules = {"energy_j": {"gpu": 20.0}}
    long = sample("a", 0, [500.0] * 4, "device_resident").model_copy(update=joules)
    short = [sample("a", r, [500.0], "device_resident").model_copy(update=joules) for r in range(1, 9)]
    whole = sample("a", 0, [500.0], "end_to_end")
    (row,) = rows([long, *short, whole], [subject("a", "cuda")])
    assert row.energy_per_image_j == {"gpu": 20 / 16}, "of the long block alone"
    (row,) = rows([*short, whole], [subject("a", "cuda")])
    assert row.energy_per_image_j == {}, "so many short ones don't make a long one"


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

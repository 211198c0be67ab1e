"""What is counted, against sums done by hand; what is tried for a peak; and where a row is put."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import tamper
from pydantic import TypeAdapter
from report_pages import with_parity

from bench.backends.contract import Options, Profile
from bench.backends.torch_program import read_program
from bench.report import sentences
from bench.results.derive import roofline
from bench.results.roofline import Peak, Point, Rate, Survey, Work, place, place_row
from bench.results.schema import Result
from bench.worker import probes
from bench.worker.peaks import _peaks, count, survey
from bench.worker.probes import Best
from export.bundle import Bundle

WORK = Work(flops_per_image=2e6, activation_bytes_per_image=1e5, weight_bytes=1e6)
PEAK = Peak("cpu", flops_per_s=1e11, copy_bytes_per_s=1e10)


def test_the_articles_work_is_what_its_layers_say(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    work = count(bundle, read_program(bundle.locate(bundle.entry("pt2", folded=False))))
    planes = ((1, 5, 784), (5, 10, 784), (10, 20, 196), (20, 40, 196))  # channels in and out, pixels
    linears = ((1960, 200), (200, 500), (500, 10))
    products = sum(9 * i * o * pixels for i, o, pixels in planes) + sum(i * o for i, o in linears)
    assert work.flops_per_image == 2 * products
    weights = sum(9 * i * o + o for i, o, _ in planes) + sum(i * o + o for i, o in linears)
    assert work.weight_bytes == 4 * weights, "BatchNorms are not counted: they are elementwise"
    layers = sum(i * pixels + o * pixels for i, o, pixels in planes) + sum(i + o for i, o in linears)
    pools = (10 * 784 + 10 * 196) + (40 * 196 + 40 * 49)
    assert work.activation_bytes_per_image == 4 * (layers + pools)


def rate(on_device: float, batch_size: int = 100, precision: str = "float32", end_to_end: float = 1.0) -> Rate:
    return Rate("x", batch_size, "cpu", precision, on_device, end_to_end)


@pytest.mark.parametrize(
    ("batch_size", "on_device", "binds"),
    [
        (256, 30_000.0, "arithmetic"),
        (256, 25_000.0, "arithmetic"),
        (256, 24_000.0, "overheads"),
        (1, 8_000.0, "memory"),
        (1, 4_000.0, "overheads"),
    ],
)
def test_only_what_is_used_to_half_of_its_peak_binds(batch_size: int, on_device: float, binds: str) -> None:
    """At 48 % of the arithmetic it does not bind; and on the CPU what preparing the raw input takes is no copy."""
    point = place_row(rate(on_device, batch_size), replace(WORK, raw_bytes_per_image=784), PEAK)
    assert point.binds == binds
    assert point.copies_percent is None


def test_a_copy_binds_where_the_link_is_used() -> None:
    """Half of the throughput is lost end to end both times; only in the second by the copy of what is large."""
    linked = replace(PEAK, host_to_device_bytes_per_s=1e9)
    slow_end = rate(20_000.0, end_to_end=9_000.0)
    small = place_row(slow_end, replace(WORK, raw_bytes_per_image=784), linked)
    assert (small.binds, small.copies_percent) == ("overheads", pytest.approx(100 * 9_000 * 784 / 1e9))
    assert place_row(slow_end, replace(WORK, raw_bytes_per_image=1e5), linked).binds == "copies"


def test_shares_of_the_peaks() -> None:
    point = place_row(rate(10_000.0), WORK, PEAK)
    assert point.arithmetic_percent == pytest.approx(100 * 10_000 * 2e6 / 1e11)
    assert point.memory_percent == pytest.approx(100 * (100 * 1e5 + 1e6) / 1e10 / 0.01)
    assert point.accounted_percent == point.arithmetic_percent
    halved = place_row(rate(10_000.0, precision="float16"), WORK, PEAK)
    assert halved.memory_percent == pytest.approx(point.memory_percent / 2), "half as wide"


def test_a_row_that_is_faster_than_every_probe_is_the_peak() -> None:
    """In float32 for itself and for narrower files; in int8 for int8 alone."""
    narrow = replace(PEAK, precision="int8", flops_per_s=1.2e11)
    fast, slower, int8 = rate(75_000.0), rate(50_000.0, 50), rate(60_000.0, precision="int8")
    points = place([fast, slower, int8], Survey(WORK, (PEAK, narrow)))
    assert [point.arithmetic_percent for point in points] == pytest.approx([100, 200 / 3, 80])
    assert all(point.peak is not None and point.peak.flops_per_s == 1.5e11 for point in points)
    assert {point.peak and point.peak.flops_probe for point in points} == {
        "the row x at batch 100, faster than every probe"
    }
    (alone,) = place([rate(90_000.0, precision="int8")], Survey(WORK, (PEAK, narrow)))
    assert alone.arithmetic_percent == 100
    wide, _ = place([slower, rate(90_000.0, precision="int8")], Survey(WORK, (PEAK, narrow)))
    assert wide.arithmetic_percent == 100
    assert wide.peak == PEAK, "an int8 row says nothing of float32"


def test_rows_of_a_precision_without_a_peak_have_no_place() -> None:
    assert place([rate(1.0, precision="int8")], Survey(WORK, (PEAK,))) == ()


def test_a_wrong_row_sets_no_peak(result: Result) -> None:
    survey = Survey(replace(WORK, flops_per_image=1e15), (PEAK,))
    points = roofline(result.rows, result.subjects, survey)
    assert [(point.subject, point.batch_size) for point in points] == [
        (row.subject, row.batch_size) for row in result.rows if row.subject != "null"
    ]
    assert max(point.arithmetic_percent for point in points) == 100
    wrong = with_parity(with_parity(result, "onnx-cpu", passed=False), "onnx-cpu:unfolded", passed=False)
    assert roofline(wrong.rows, wrong.subjects, survey) == ()


def test_the_page_says_what_the_peak_is_from(result: Result) -> None:
    survey = Survey(WORK, (replace(PEAK, flops_probe="torch, a product"),))
    slow = replace(survey, work=replace(WORK, flops_per_image=1e15))
    probe, row = (
        "\n".join(sentences.peaks(surveyed, roofline(result.rows, result.subjects, surveyed), None))
        for surveyed in (survey, slow)
    )
    assert "the peak of cpu for float32 files" in probe
    assert "100 GFLOP/s (torch, a product)" in probe
    assert re.search(r"GFLOP/s \(the row onnx-cpu(:unfolded)? at batch \d, faster than every probe\)", row)


def test_a_survey_of_before_still_reads() -> None:
    old = {
        "work": {"flops_per_image": 1.0, "activation_bytes_per_image": 1.0, "weight_bytes": 1.0},
        "peaks": [{"device": "cpu", "flops_per_s": 1.0, "copy_bytes_per_s": 1.0, "host_to_device_bytes_per_s": None}],
    }
    (peak,) = TypeAdapter(Survey).validate_python(old).peaks
    assert (peak.precision, peak.flops_probe) == ("float32", "torch, one matrix product")
    point = {"subject": "x", "batch_size": 1, "arithmetic_percent": 1, "memory_percent": 1, "binds": "launches"}
    assert TypeAdapter(Point).validate_python(point).peak is None


def with_int8(fields: dict[str, Any]) -> None:
    (real,) = [entry for entry in fields["files"] if entry["path"] == "model.onnx"]
    fields["files"].append(real | {"precision": "int8"})


def test_peaks_are_measured_and_a_failure_is_none(small_bundle: Path, tmp_path: Path) -> None:
    """One for each precision of the bundle's files, of what won."""
    both = tamper(small_bundle, tmp_path / "both", manifest=with_int8)
    found = survey(both, ("cpu",), 1, Profile.STRICT, 120.0)
    assert found is not None
    assert found.work.raw_bytes_per_image == 784
    wide, narrow = found.peaks
    assert (wide.precision, narrow.precision) == ("float32", "int8")
    assert 1e9 < wide.flops_per_s < 1e13
    assert 1e8 < wide.copy_bytes_per_s < 1e12
    assert re.match(r"(torch|onnxruntime|openvino), a .* in float32", wide.flops_probe)
    assert re.match(r"(torch|NumPy), a copy of [\d.]+ MiB", wide.copy_probe)
    assert narrow.flops_per_s >= wide.flops_per_s, "float32 will do for int8 too"
    assert survey(small_bundle, ("cpu",), 1, Profile.STRICT, 0.01) is None, "too slow"


def test_the_best_probe_wins_and_what_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def arithmetic(device: str, precision: str, options: Options) -> Iterator[Best]:
        speeds = {"float32": (1, 3, 2), "int8": (9, 10), "bfloat16": (0.5, 100), "float16": (2, 2.5)}[precision]
        for number, speed in enumerate(speeds):
            tried.append(precision)
            yield Best(speed, f"{precision} {number}")

    monkeypatch.setattr(probes, "arithmetic", arithmetic)
    monkeypatch.setattr(probes, "copies", lambda device: iter([Best(5, "small"), Best(4, "large")]))
    precisions = ("float32", "int8", "bfloat16", "float16")
    peaks = list(_peaks("cpu", precisions, Options(1)))
    assert [(peak.flops_per_s, peak.flops_probe) for peak in peaks] == [
        (3, "float32 1"),
        (10, "int8 1"),
        (3, "float32 1"),
        (3, "float32 1"),
    ]
    assert {(peak.copy_bytes_per_s, peak.copy_probe) for peak in peaks} == {(5, "small")}
    assert tried.count("bfloat16") == 1, "its first product is so slow that it is emulated"
    fast = list(_peaks("cpu", ("float32",), Options(1, Profile.FAST)))
    assert fast[0].flops_probe == "float32 1"
    assert tried[-1] == "bfloat16", "OpenVINO takes it for float32 files"
    assert list(probes._tried("x", 1, lambda: 1 / 0, "cpu")) == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_runtimes_own_kernels_are_tried(runtime: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(runtime)
    monkeypatch.setattr(probes, "PROBE_S", 0.001)
    found = [best.words.partition(", a ")[0] for best in probes.arithmetic("cpu", precision, Options(1))]
    assert found.count(runtime) == 2, "a product and a convolution"
    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    left = list(probes.arithmetic("cpu", precision, Options(1)))
    assert all(best.words.startswith("torch") for best in left)

"""What is counted, against sums done by hand, and where a row is put."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.backends.contract import Profile
from bench.backends.torch_program import read_program
from bench.results.roofline import Peak, Work, launch_seconds, place_row
from bench.worker.peaks import count, survey
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


@pytest.mark.parametrize(
    ("batch_size", "device", "whole", "launches", "binds"),
    [
        (256, 30_000.0, 29_000.0, 1e-4, "arithmetic"),
        (256, 3_000.0, 2_900.0, 1e-4, "arithmetic"),
        (1, 8_000.0, 7_000.0, 1e-5, "memory"),
        (1, 500.0, 490.0, 1.9e-3, "launches"),
        (256, 30_000.0, 14_000.0, 1e-4, "copies"),
    ],
)
def test_what_binds(batch_size: int, device: float, whole: float, launches: float, binds: str) -> None:
    assert place_row("x", batch_size, device, whole, launches, WORK, PEAK).binds == binds


def test_launches_are_what_the_smallest_batch_takes_beyond_the_ideal() -> None:
    assert launch_seconds(1, 500.0, WORK, PEAK) == pytest.approx(0.002 - 1.1e6 / 1e10)
    assert launch_seconds(1, 1e9, WORK, PEAK) == 0


def test_shares_of_the_peaks() -> None:
    point = place_row("x", 100, 10_000.0, 10_000.0, 0.0, WORK, PEAK)
    assert point.arithmetic_percent == pytest.approx(100 * 10_000 * 2e6 / 1e11)
    assert point.memory_percent == pytest.approx(100 * (100 * 1e5 + 1e6) / 1e10 / 0.01)


def test_peaks_are_measured_and_a_failure_is_none(small_bundle: Path, tmp_path: Path) -> None:
    found = survey(small_bundle, ("cpu",), 1, Profile.STRICT, 120.0)
    assert found is not None
    (peak,) = found.peaks
    assert 1e9 < peak.flops_per_s < 1e13
    assert 1e8 < peak.copy_bytes_per_s < 1e12
    assert survey(small_bundle, ("cpu",), 1, Profile.STRICT, 0.01) is None, "too slow"

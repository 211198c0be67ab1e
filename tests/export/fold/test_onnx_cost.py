"""What folding an ONNX file may cost: bytes of the folded file, and what the command loads to find nothing to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from onnx_files import File, fold_and_compare, fold_onnx, is_folded, norms

ROOT = Path(__file__).parents[3]


def bordered(channels: int, size: int) -> File:
    """Twice Conv → ReLU → BatchNorm, then Conv: each BatchNorm in front of a border of zeros."""
    file = File()
    h = file.conv(file.input("x", "n", 3, size, size), 3, channels)
    for _ in range(2):
        h = file.norm(file.node("Relu", h), channels)
        h = file.conv(h, channels, channels)
    file.node("GlobalAveragePool", h, outputs=["y"])
    file.output("y", "n", channels, 1, 1)
    return file


def test_auto_does_not_blow_up_a_file(tmp_path: Path) -> None:
    """Two bias maps of 32 channels at 384² made 21.3 MB of 0.05 MB, and ran at 0.93 of the unfolded file."""
    source = bordered(32, 64).save(tmp_path)
    fold_and_compare(source, "auto")
    assert (tmp_path / "folded.onnx").stat().st_size <= 2 * source.stat().st_size


def test_all_folds_regardless_of_the_cost(tmp_path: Path) -> None:
    assert is_folded(bordered(16, 48).save(tmp_path), "all")


def test_a_bias_map_that_is_asked_for_may_be_large(tmp_path: Path) -> None:
    source = bordered(8, 48).save(tmp_path)
    result = fold_and_compare(source, "bias-map")
    assert [norm.method for norm in result.report.folded] == ["bias map"] * 2
    assert (tmp_path / "folded.onnx").stat().st_size > 5 * source.stat().st_size


def test_cheap_folds_are_taken_by_auto(tmp_path: Path) -> None:
    """A bias map of 8 × 8 costs little beside 64 channels' weights."""
    assert is_folded(bordered(64, 8).save(tmp_path), "auto")


def test_no_byte_is_added_where_a_fold_needs_none(tmp_path: Path) -> None:
    """Parameters go, and what a folded file holds is no more than before, however many weights stood behind nodes."""
    file = File()
    h = file.input("x", "n", 8, 6, 6)
    for _ in range(4):
        weight = file.node("Constant", value=numpy_helper.from_array(numpy_helper.to_array(_weight(file)), "w"))
        h = file.norm(file.node("Conv", h, weight, file.random(8), pads=[1] * 4), 8)
    file.node("Relu", h, outputs=["y"])
    file.output("y", "n", 8, 6, 6)
    source = file.save(tmp_path)
    assert is_folded(source)
    assert (tmp_path / "folded.onnx").stat().st_size <= source.stat().st_size


def _weight(file: File) -> onnx.TensorProto:
    """A weight that is no initializer."""
    file.random(8, 8, 3, 3)
    return file.weights.pop()


def without_batchnorm(folder: Path) -> Path:
    file = File()
    file.node("Relu", file.conv(file.input("x", "n", 4, 8, 8), 4, 6), outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    return file.save(folder)


@pytest.mark.parametrize("command", ["fold", "explain"])
def test_nothing_to_fold_needs_no_torch(command: str, tmp_path: Path) -> None:
    """A file of 225 kB without a BatchNorm took 22 s and 0.77 GB. Here every import is listed."""
    source, target = without_batchnorm(tmp_path), tmp_path / "folded.onnx"
    arguments = [command, str(source), *(["-o", str(target)] if command == "fold" else [])]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "export", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "0 BatchNorms folded, 0 kept" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "onnx" in imported
    assert not {"torch", "torchvision", "onnxscript"} & imported


def test_nothing_to_fold_changes_nothing(tmp_path: Path) -> None:
    source = without_batchnorm(tmp_path)
    fold_onnx(source, tmp_path / "folded.onnx")
    before, after = onnx.load(source), onnx.load(tmp_path / "folded.onnx")
    assert not norms(after)
    assert before.graph.node == after.graph.node
    assert before.graph.initializer == after.graph.initializer

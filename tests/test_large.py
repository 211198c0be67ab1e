"""A model of the size that people deploy: exported and measured in reasonable time, with what was left out said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from watched import watch

from export.bundle import Bundle

pytestmark = pytest.mark.slow
IMAGES = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images for resnet18 at 128 × 128, with labels."""
    path = tmp_path_factory.mktemp("large") / "images.npz"
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 256, (IMAGES, 3, 128, 128), np.uint8)
    np.savez(path, inputs=inputs, labels=generator.integers(0, 1_000, IMAGES))
    return path


def test_lean_from_export_to_bench_run(data: Path, tmp_path: Path) -> None:
    place, result = tmp_path / "lean", tmp_path / "result.json"
    model = ("--model", "torchvision:resnet18", "--input", "3x128x128", "--data", data)
    exported = watch("export", *model, "--samples", "60", "--files", "lean", "--check-batches", "8,3", "--out", place)
    text = "\n".join(line for _, line in exported.lines)
    assert exported.exit_code == 0, text
    assert "checking each file with optimisations off, on" in text
    assert "at batch 8 and 9 at batch 3" in text
    bundle = Bundle.open(place)
    bundle.verify()
    manifest = bundle.manifest
    assert {entry.path for entry in manifest.files} == {"model.onnx", "model.ts", "model.unfolded.pt2"}
    assert manifest.checkpoint is None
    assert manifest.proof is not None
    assert (manifest.proof.inputs, manifest.proof.batch_sizes) == (60, (8, 3))
    assert "--files full" in manifest.left_out[0].reason
    weights = next(entry.bytes for entry in manifest.files if entry.path == "model.onnx")
    assert sum(file.stat().st_size for file in place.iterdir()) <= 4 * weights

    measured = watch("bench", "run", "--bundle", place, "--json", result)
    said = "\n".join(line for _, line in measured.lines)
    assert measured.exit_code == 0, said
    first_row = measured.first_s("so far:")
    assert first_row is not None
    assert first_row < 120, said
    assert measured.seconds < 300, said
    left_out = json.loads(result.read_text())["settings"]["left_out"]
    assert any("--batch-size 256 measures them" in line for line in left_out), left_out
    for line in left_out:
        assert f"left out for lack of time: {line}" in said

    refused = watch("bench", "run", "--bundle", place, "--backend", "compile-cpu", "--batch-size", "1")
    told = "\n".join(line for _, line in refused.lines)
    assert refused.exit_code == 4, told
    assert "--files full" in told

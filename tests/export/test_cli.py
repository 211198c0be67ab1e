"""`python -m export` as a user runs it: what it publishes, and what it refuses."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from export.bundle import Bundle
from trainer import checkpoint

ROOT = Path(__file__).parents[2]


def export(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def one_paragraph(text: str) -> bool:
    return text.startswith("error: ") and len(text.strip().splitlines()) == 1 and "Traceback" not in text


def test_nothing_changed_is_said_at_once(bundle_dir: Path, training_dir: Path, data_dir: Path) -> None:
    before = (bundle_dir / "bundle.json").stat().st_mtime_ns
    done = export("--checkpoint", training_dir / "checkpoint.safetensors", "--out", bundle_dir, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    assert "nothing changed" in done.stdout
    assert (bundle_dir / "bundle.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["missing", "garbage", "truncated", "nan", "another network", "not ours"])
def test_a_checkpoint_that_is_no_good(
    what: str, bundle_dir: Path, training_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Exit code 4, one paragraph, and the bundle published before is whole."""
    from safetensors.torch import save_file

    path = tmp_path / "checkpoint.safetensors"
    good = training_dir / "checkpoint.safetensors"
    weights, facts = checkpoint.load(good)
    if what == "garbage":
        path.write_bytes(b"these are no weights" * 100)
    elif what == "truncated":
        path.write_bytes(good.read_bytes()[:-100])
    elif what == "nan":
        weights["features.6.weight"][0, 0, 0, 0] = torch.nan
        checkpoint.save(path, weights, facts)
    elif what == "another network":
        del weights["classifier.5.bias"]
        checkpoint.save(path, weights, facts)
    elif what == "not ours":
        save_file(weights, path)
    target = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    done = export("--checkpoint", path, "--out", target, "--data-dir", data_dir)
    assert done.returncode == 4, done.stderr
    assert one_paragraph(done.stderr), done.stderr
    assert str(path) in done.stderr
    assert Bundle.open(target).digest == Bundle.open(bundle_dir).digest
    Bundle.open(target).verify()


def test_somebody_elses_folder(training_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    done = export("--checkpoint", training_dir / "checkpoint.safetensors", "--out", tmp_path, "--data-dir", data_dir)
    assert done.returncode == 4
    assert one_paragraph(done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--variant", "float8"], "int8-raw"), (["--calibration", "c.npz"], "--model")],
    ids=["unknown variant", "calibration without a model"],
)
def test_variants_that_are_a_usage_error(arguments: list[str], says: str, training_dir: Path, tmp_path: Path) -> None:
    done = export("--checkpoint", training_dir / "checkpoint.safetensors", "--out", tmp_path / "b", *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_unknown_strategy_is_a_usage_error() -> None:
    done = export("--strategy", "magic")
    assert done.returncode == 2
    assert "bias-map" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupted(
    number: signal.Signals, code: int, bundle_dir: Path, training_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    (target / "model.onnx").write_bytes(b"")  # altered, so that there is something to do
    command = [sys.executable, "-m", "export", "--checkpoint", str(training_dir / "checkpoint.safetensors")]
    command += ["--out", str(target), "--data-dir", str(data_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("writing"):
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / "model.onnx").read_bytes() == b""


@pytest.mark.slow
def test_the_strategies_give_different_files_for_one_function(
    training_dir: Path, bundle_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """`floor` folds all three too, and its logits agree with the ones-channel file's."""
    import numpy as np

    from export.formats import onnx_file

    weights = training_dir / "checkpoint.safetensors"
    done = export("--checkpoint", weights, "--out", tmp_path / "b", "--data-dir", data_dir, "--strategy", "floor")
    assert done.returncode == 0, done.stderr
    floor, ones = Bundle.open(tmp_path / "b"), Bundle.open(bundle_dir)
    assert [norm.method for norm in floor.manifest.fold.folded] == ["floor", "floor", "into the layers after"]
    images = ones.manifest.preprocessing.apply(ones.oracle().raw[:50], ones.manifest.input.shape)
    results = [onnx_file.runner(b.locate(b.entry("onnx")))(images)[0] for b in (floor, ones)]
    assert not np.array_equal(*results)
    np.testing.assert_allclose(*results, atol=1e-4)

"""`bench run model.onnx` and `bench parity model.onnx`: a file in the place of a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_files import File

from bench.cli.onnx_file import Place, batch_sizes_for, opened_place
from bench.cli.options import DEFAULT_BUNDLE
from bench.errors import BenchError
from bench.results.load import read_result
from export.bundle import Bundle
from export.onnx_build import build
from export.sources.onnx_source import load
from export.sources.own import Own

ROOT = Path(__file__).parents[3]
SHORT = ["--backend", "onnx-cpu", "--rounds", "1", "--processes", "1", "--block-ms", "1", "--threads", "1"]


def saved(folder: Path, *sizes: int | str) -> Path:
    """A file with a BatchNorm, for inputs of these sizes."""
    file = File()
    x = file.node("Relu", file.norm(file.conv(file.input("image", *sizes), 3, 8), 8))
    x = file.node("Flatten", file.node("GlobalAveragePool", x))
    file.output(file.node("Gemm", x, file.random(8, 4)), sizes[0], 4)
    return file.save(folder)


def bench(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In the user's folder, which has an export.py of its own."""
    (folder / "export.py").write_text("raise SystemExit('the wrong one')\n")
    command = [sys.executable, "-P", "-m", "bench", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_file_is_measured_folded_and_as_it_is(tmp_path: Path) -> None:
    source = saved(tmp_path, "n", 3, 12, 12)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = bench(tmp_path, "run", "model.onnx", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "onnx-cpu:unfolded" in done.stdout
    assert "folding" in done.stderr, "what export says is progress"
    assert "folding" not in done.stdout
    result = read_result(tmp_path / "artifacts" / "results" / "model.json")
    assert [subject.label for subject in result.subjects] == ["onnx-cpu", "onnx-cpu:unfolded"]
    assert all(subject.parity is not None and subject.parity.passed for subject in result.subjects)
    assert result.bundles[0].path == str(source.resolve())
    assert result.bundles[0].name == "model"
    assert {row.batch_size for row in result.rows} == {1, 64, 256}
    assert sorted({path.name for path in tmp_path.iterdir()} - {"export.py"}) == sorted({*before, "artifacts"})
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["results"], "no bundle is left"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(["parity", "model.onnx", "--backend", "onnx-cpu"], 0, "pass", marks=pytest.mark.slow),
        pytest.param(
            ["parity", "model.onnx", "--backend", "torch-cpu"],
            4,
            "torch-cpu: it runs models of torch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["parity", "model.onnx", "--bisect"],
            2,
            "--bisect compares with the nodes of a torch graph",
            marks=pytest.mark.slow,
        ),
        (["run", "none.onnx"], 4, "there is no file none.onnx"),
        (["run", "text.onnx"], 4, "is no valid ONNX model"),
        (["run", "model.onnx", "--bundle", "other"], 2, "name one of them"),
        (["run", "model.onnx", "--input", "3x8"], 4, "takes inputs of 3x12x12 each, --input says 3x8"),
    ],
)
def test_what_a_command_says(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    saved(tmp_path, "n", 3, 12, 12)
    (tmp_path / "text.onnx").write_text("hello")
    done = bench(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_batch_size(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3, 12, 12)
    done = bench(tmp_path, "run", "model.onnx", *SHORT)
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "artifacts" / "results" / "model.json")
    assert {row.batch_size for row in result.rows} == {2}
    refused = bench(tmp_path, "run", "model.onnx", *SHORT, "--batch-size", "3")
    assert refused.returncode == 2
    assert "take 2 inputs at a time" in refused.stderr


def bundle_of(source: Path, **said: Any) -> Bundle:
    return build(
        load(Own(str(source), **said), print, source.parent), source.parent / "bundle", "auto", lambda what: None
    )


def test_no_batch_is_larger_than_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(0).standard_normal((40, 3, 12, 12)))
    bundle = bundle_of(saved(tmp_path, "n", 3, 12, 12), data=tmp_path / "data.npz")
    of_file, of_bundle = Place(bundle.path, tmp_path / "model.onnx"), Place(bundle.path)
    assert batch_sizes_for(of_file, None, (1, 64, 256)) == (1, 40)
    assert batch_sizes_for(of_file, [128], (1, 64, 256)) == (128,)
    assert batch_sizes_for(of_bundle, None, (1, 64, 256)) == (1, 64, 256)


def test_a_folder_is_a_bundle(tmp_path: Path) -> None:
    with opened_place(tmp_path, DEFAULT_BUNDLE, None) as where:
        assert where == Place(tmp_path)
        assert where.named == tmp_path
    with pytest.raises(BenchError, match="--input goes with an ONNX file"), opened_place(None, tmp_path, "3x8x8"):
        pass

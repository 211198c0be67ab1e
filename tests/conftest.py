"""What all tests share: real MNIST, and a real bundle of a shortly trained network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The repository's data folder with MNIST in it, fetched if it isn't there yet."""
    from trainer import mnist

    folder = ROOT / "data"
    mnist.load(folder)
    return folder


@pytest.fixture(scope="session")
def training_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder of a real, short training: 110 iterations reach well over 90 %."""
    folder = tmp_path_factory.mktemp("training") / "article"
    command = [
        sys.executable,
        "-m",
        "trainer",
        "--iterations",
        "110",
        "--out",
        str(folder),
        "--data-dir",
        str(data_dir),
    ]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def bundle_dir(training_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle, exported from `training_dir`."""
    folder = tmp_path_factory.mktemp("bundles") / "article"
    command = [sys.executable, "-m", "export", "--checkpoint", str(training_dir / "checkpoint.safetensors")]
    command += ["--out", str(folder), "--data-dir", str(data_dir)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder

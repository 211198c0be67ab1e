"""What all tests share: real MNIST, and a real bundle of a shortly trained network."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the tests in the background has told them to ignore Ctrl-C, and so would their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--bundle`: for who has one already, and time for nothing but the tests."""
    parser.addoption("--bundle", type=Path, help="the real bundle that tests use. Default: one of a short training")


def pytest_benchmark_generate_machine_info() -> dict[str, str]:
    """What pytest-benchmark stores with a run: by what `bench compare` knows a machine, and not its clock just now."""
    from bench.machine.environment import describe, fingerprint, usable_cpus

    return fingerprint(describe(), usable_cpus(), "strict")


def pytest_benchmark_compare_machine_info(machine_info: dict[str, str], compared_benchmark: dict[str, Any]) -> None:
    """Refuse to compare with another machine's run; pytest-benchmark alone would warn and compare."""
    stored = compared_benchmark["machine_info"]
    differences = [
        f"{name}: {stored.get(name)} against {here}" for name, here in machine_info.items() if stored.get(name) != here
    ]
    if differences:
        raise pytest.UsageError(
            f"the stored run was measured on another machine: {'; '.join(differences)}. Compare with a run of this "
            "one, or keep each machine's in a folder of its own with --benchmark-storage."
        )


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
def bundle_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle: the one that `--bundle` names, else exported from `training_dir`."""
    given: Path | None = request.config.getoption("--bundle")
    if given is not None:
        return given.resolve()
    training, data = request.getfixturevalue("training_dir"), request.getfixturevalue("data_dir")
    folder = tmp_path_factory.mktemp("bundles") / "article"
    command = [sys.executable, "-m", "export", "--checkpoint", str(training / "checkpoint.safetensors")]
    command += ["--out", str(folder), "--data-dir", str(data)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder

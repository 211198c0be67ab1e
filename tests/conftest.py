"""What all tests share: real MNIST, and a real bundle of a shortly trained network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# A shell that starts the tests in the background has told them to ignore Ctrl-C, and so would their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
# Of pytest-xdist: how many processes share this machine's CPUs.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # pools that wait for each other's threads by spinning take several times as long
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


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


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, which is made by the first test process that asks for it, while the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if WORKERS > 1 else base) / name
    with FileLock(folder.with_name(f".{name}.lock")):
        finished = folder.with_name(f".{name}.made")
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder


def run_quietly(*command: str | Path) -> None:
    """Run a module of this project. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's data folder with MNIST in it, fetched if it isn't there yet."""
    from trainer import mnist

    def fetch(_: Path) -> None:
        mnist.load(ROOT / "data")

    once(tmp_path_factory, "mnist", fetch)
    return ROOT / "data"


@pytest.fixture(scope="session")
def training_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder of a real, short training: 110 iterations reach well over 90 %."""

    def train(folder: Path) -> None:
        run_quietly("trainer", "--iterations", "110", "--out", folder / "article", "--data-dir", data_dir)

    return once(tmp_path_factory, "training", train) / "article"


@pytest.fixture(scope="session")
def bundle_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle: the one that `--bundle` names, else exported from `training_dir`."""
    given: Path | None = request.config.getoption("--bundle")
    if given is not None:
        return given.resolve()
    training, data = request.getfixturevalue("training_dir"), request.getfixturevalue("data_dir")

    def export(folder: Path) -> None:
        checkpoint = training / "checkpoint.safetensors"
        run_quietly("export", "--checkpoint", checkpoint, "--out", folder / "article", "--data-dir", data)

    return once(tmp_path_factory, "bundles", export) / "article"

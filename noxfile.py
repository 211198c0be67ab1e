"""The project's tasks: `nox -s train export bench`, `nox -s tests`, `nox -s lint`, `nox -s benchmark`, `nox -s gpu`.

All sessions share one virtual environment, `.nox/ninefold`: torch and its CUDA libraries are over 5 GB, too much to
install once for each session. It is made with venv and pip, and made anew when `pyproject.toml` changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()
ENVIRONMENT = ROOT / ".nox" / "ninefold"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
STAMP = ENVIRONMENT / "made-from"
PIPELINE = ("train", "export", "bench")
STORED = ROOT / ".benchmarks"
# Runs of the same code in one process after another were seen to differ by up to 9 % on a machine with other work.
SLOWER = "median:20%"

# Two processes, and not one for each CPU: their torch takes a gigabyte each. Benchmarks don't go with them.
IN_PARALLEL = ("--numprocesses", "2", "--dist", "worksteal", "--benchmark-disable")

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests"]
nox.options.stop_on_first_error = True  # exporting after a training that failed would export an older one
nox.options.default_venv_backend = "none"


def environment(session: nox.Session) -> None:
    """Make the shared environment unless it was made from this very `pyproject.toml`."""
    recipe = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest() + f" Python {sys.version_info[:2]}"
    if STAMP.exists() and STAMP.read_text() == recipe:
        return
    session.log(f"making the environment {ENVIRONMENT} (torch with its CUDA libraries: over 5 GB, some minutes)")
    if ENVIRONMENT.exists():
        shutil.rmtree(ENVIRONMENT)
    session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    python = str(BIN / "python")
    # Older pips know no dependency groups.
    session.run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1", external=True)
    session.run(python, "-m", "pip", "install", "--quiet", "--editable", str(ROOT), "--group", "dev", external=True)
    STAMP.write_text(recipe)


def run(session: nox.Session, *command: str) -> None:
    """Run a program of the shared environment.

    After Ctrl-C it has 15 seconds to save what it has before nox ends it.
    """
    environment(session)
    session.run(str(BIN / "python"), *command, external=True, interrupt_timeout=15, terminate_timeout=5)


def pipeline(session: nox.Session, *command: str) -> None:
    """Run a step of the main job, with the arguments after `--`."""
    if session.posargs:
        own = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
        named = [name for name in PIPELINE if name in own]
        if len(named) > 1:
            session.error(
                f"the arguments after -- would go to each of {', '.join(named)}, which take different ones. "
                f"Name one session with them, for example: nox -s {session.name} -- {' '.join(session.posargs)}"
            )
    run(session, *command, *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """Train the article's network on MNIST; arguments go to `python -m trainer`."""
    pipeline(session, "-m", "trainer")


@nox.session
def export(session: nox.Session) -> None:
    """Export the trained network, every BatchNorm folded; arguments go to `python -m export`."""
    pipeline(session, "-m", "export")


@nox.session
def bench(session: nox.Session) -> None:
    """Compare accuracy and throughput over all backends; arguments go to `bench run`."""
    pipeline(session, "-m", "bench", "run")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests in two processes, those that time something after them; arguments go to pytest instead."""
    if session.posargs:
        run(session, "-m", "pytest", *session.posargs)
        return
    run(session, "-m", "pytest", *IN_PARALLEL, "-m", "not slow and not serial")
    run(session, "-m", "pytest", "-m", "serial and not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style with ruff and types with mypy."""
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")
    run(session, "-m", "mypy")


@nox.session
def benchmark(session: nox.Session) -> None:
    """Time every backend, keep the run, and fail where one is slower than in the last run kept, or in the best.

    Arguments go to pytest instead, and nothing is kept: a run of some of the benchmarks is nothing to compare with.
    """
    if session.posargs:
        run(session, "-m", "pytest", "--benchmark-only", *session.posargs)
        return
    kept = set(STORED.glob("*/[0-9]*.json"))
    comparison = []
    if kept:
        last = max(kept, key=lambda path: path.stat().st_mtime)
        comparison = [f"--benchmark-compare={last}", f"--benchmark-compare-fail={SLOWER}"]
    place = ["--benchmark-autosave", f"--benchmark-storage=file://{STORED}"]
    try:
        run(session, "-m", "pytest", "--benchmark-only", *place, *comparison, "tests/benchmarks/test_throughput.py")
        (new,) = set(STORED.glob("*/[0-9]*.json")) - kept
        run(session, "tests/benchmarks/kept.py", str(new), *map(str, kept))
    except BaseException:  # Ctrl-C too
        # pytest-benchmark keeps a run that failed; the next one would be held to what should not have passed.
        for path in set(STORED.glob("*/[0-9]*.json")) - kept:
            path.rename(path.with_name(f"failed-{path.name}"))
        raise


@nox.session
def gpu(session: nox.Session) -> None:
    """Train, export, measure and test on the best device there is; arguments go to `tests/gpu.py`."""
    run(session, "tests/gpu.py", *session.posargs)

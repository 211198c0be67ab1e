"""What the tests of `bench` share: backends that misbehave, and bundles that were tampered with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from bundles import shorten, tamper
from plans import small_plan

from bench.backends.registry import BACKENDS
from bench.results.schema import Result
from bench.run.plan import Plan
from bench.run.rounds import run

TamperedBundle = Callable[..., Path]


@pytest.fixture
def faulty_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the misbehaving backends under their names in lower case; worker processes find them too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    faults = (
        "crashing",
        "hanging",
        "hungry",
        "raising",
        "transposed",
        "eight",
        "unavailable",
        "unloadable",
        "dying",
        "lying",
        "fatal",
    )
    for name in faults:
        monkeypatch.setitem(BACKENDS, name, f"faulty_backends:{name.upper()}")


@pytest.fixture(scope="session")
def small_bundle(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real bundle with the first 300 images of its oracle only, so that a test need not wait for 10,000."""
    return shorten(bundle_dir, tmp_path_factory.mktemp("small") / "bundle", images=300)


@pytest.fixture(scope="session")
def tampered_at(small_bundle: Path) -> TamperedBundle:
    """As `tampered`, for many: the first argument is where the copy goes."""
    return partial(tamper, small_bundle)


@pytest.fixture
def tampered(small_bundle: Path, tmp_path: Path) -> TamperedBundle:
    """Makes a copy of the small bundle with a file rewritten, or the manifest changed, and consistent hashes."""
    return partial(tamper, small_bundle, tmp_path / "tampered")


@pytest.fixture
def plan(small_bundle: Path) -> Callable[..., Plan]:
    """A small plan of the small bundle, see `plans.small_plan`. Keywords replace what it says."""
    return partial(small_plan, small_bundle)


@pytest.fixture(scope="session")
def result(small_bundle: Path) -> Result:
    """A real result: onnx-cpu with its control, and null, seven rounds of very short blocks."""
    return run(
        small_plan(
            small_bundle,
            backends=("onnx-cpu", "null"),
            control=("onnx-cpu",),
            batch_sizes=(1, 8),
            rounds=7,
            block_s=0.002,
        ),
        lambda what, done: None,
    )

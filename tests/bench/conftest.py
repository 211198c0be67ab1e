"""What the tests of `bench` share: backends that misbehave, and bundles that were tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.backend import BACKENDS, Profile
from bench.run import Plan

TemperedBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def bundle_dir() -> Path:
    return Path("/tmp/bw/bundle")


@pytest.fixture
def faulty_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the misbehaving backends under their names in lower case; worker processes find them too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    faults = ("crashing", "hanging", "raising", "transposed", "nan", "unavailable", "unloadable", "dying", "lying")
    for name in faults:
        monkeypatch.setitem(BACKENDS, name, f"faulty_backends:{name.upper()}")


@pytest.fixture
def tampered(bundle_dir: Path, tmp_path: Path) -> TemperedBundle:
    """Makes a copy of the bundle with a file rewritten, or the manifest changed, and consistent hashes."""

    def make(
        file: str | None = None,
        rewrite: Callable[[Path], None] | None = None,
        manifest: Callable[[dict[str, Any]], None] | None = None,
    ) -> Path:
        copy = tmp_path / "tampered"
        shutil.copytree(bundle_dir, copy)
        fields = json.loads((copy / "bundle.json").read_text())
        if file is not None and rewrite is not None:
            rewrite(copy / file)
            entries = [*fields["files"], fields["oracle"], fields["checkpoint"]]
            (entry,) = [entry for entry in entries if entry["path"] == file]
            content = (copy / file).read_bytes()
            entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        if manifest is not None:
            manifest(fields)
        (copy / "bundle.json").write_text(json.dumps(fields))
        return copy

    return make


@pytest.fixture
def plan(bundle_dir: Path) -> Callable[..., Plan]:
    """A small plan: two rounds of short blocks. Keywords replace what it says."""

    def make(**changes: Any) -> Plan:
        return Plan(
            **{
                "bundle": bundle_dir,
                "backends": ("onnx-cpu",),
                "control": False,
                "batch_sizes": (1,),
                "rounds": 2,
                "block_s": 0.005,
                "threads": 1,
                "profile": Profile.STRICT,
                "timeout_s": 60.0,
            }
            | changes
        )

    return make

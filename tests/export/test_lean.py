"""A lean bundle, and one that is held to fewer inputs than were given: what is in it, and what it says of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import build, effort
from export.bundle import Bundle, DataFile, Output, Preprocessing, Source, TensorSpec
from export.effort import Asked
from export.sources.material import Material

GIVEN = 40
SHAPE = ("batch", 3, 8, 8)


def material() -> Material:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)
    ).eval()
    inputs = np.random.default_rng(0).standard_normal((GIVEN, 3, 8, 8)).astype(np.float32)
    raw = TensorSpec(name="input", dtype="float32", shape=SHAPE)
    return Material(
        module,
        lambda: b"weights",
        Source(factory="net", checkpoint_sha256="0" * 64),
        raw,
        Output(name="output", dtype="float32", shape=("batch", 5)),
        Preprocessing(raw=raw, scale=1.0, mean=(0.0,), std=(1.0,)),
        inputs,
        np.arange(GIVEN),
        None,
    )


def test_a_lean_bundle_of_a_costly_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that an input takes 1.5 seconds in each precision: 20 of 40 fit, every second one."""
    monkeypatch.setattr(effort, "_seconds", lambda call: 3.0)
    monkeypatch.setattr(effort, "ORACLE_SHARE", 100.0)  # these weights are smaller than ten of its inputs
    said: list[str] = []
    given = material()
    bundle = build.build(given, tmp_path / "lean", "auto", said.append, asked=Asked(files="lean"))
    bundle.verify()
    manifest, oracle = bundle.manifest, bundle.oracle()
    assert {entry.path for entry in manifest.files} == {"model.onnx", "model.ts", "model.unfolded.pt2"}
    assert {path.name for path in bundle.path.iterdir()} == {
        "bundle.json",
        "model.onnx",
        "model.ts",
        "model.unfolded.pt2",
        "oracle.safetensors",
    }
    assert manifest.checkpoint is None
    (left_out,) = manifest.left_out
    assert left_out.what == "model.unfolded.onnx, model.pt2, model.unfolded.ts, checkpoint.safetensors"
    assert "--files full makes them" in left_out.reason
    assert oracle.labels is not None
    assert list(oracle.labels) == list(range(0, GIVEN, 2))
    np.testing.assert_array_equal(oracle.raw, np.asarray(given.raw)[::2])
    with torch.no_grad():
        wanted = given.module.double()(torch.from_numpy(oracle.raw).double()).numpy()
    np.testing.assert_allclose(oracle.logits, wanted, rtol=1e-12)
    proof = manifest.proof
    assert proof is not None
    assert (proof.given, proof.inputs, proof.checked, proof.compared) == (GIVEN, 20, 10, 2)
    assert len(proof.batch_sizes) == 2
    assert any("held to 20 of the 40 inputs" in line and f"--samples {GIVEN} takes all" in line for line in said)
    for name in ("writing model.onnx", "checking model.onnx", "checking model.ts", "folding for onnxruntime"):
        assert name in said


@pytest.mark.slow
def test_a_large_model_is_computed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process holds a large model; the oracle is the same."""
    from export import oracle

    apart = build.build(material(), tmp_path / "apart", "auto", lambda line: None)
    monkeypatch.setattr(build, "LARGE_BYTES", 1)

    def refused(self: object) -> None:
        raise AssertionError("a process for a large model")

    monkeypatch.setattr(oracle.Outputs64, "__init__", refused)
    here = build.build(material(), tmp_path / "here", "auto", lambda line: None)
    np.testing.assert_allclose(here.oracle().logits, apart.oracle().logits, rtol=1e-12)
    assert len(here.manifest.files) == len(apart.manifest.files) == 6, "how many files there are is another matter"
    assert here.manifest.checkpoint == DataFile.of(here.path / "checkpoint.safetensors")


def test_everything_by_default(tmp_path: Path) -> None:
    bundle = build.build(material(), tmp_path / "full", "auto", lambda line: None, asked=Asked(batches=(9, 4)))
    assert not bundle.manifest.left_out
    assert bundle.manifest.proof is not None
    assert bundle.manifest.proof.model_dump() == {
        "given": GIVEN,
        "inputs": GIVEN,
        "checked": GIVEN,
        "compared": GIVEN,
        "batch_sizes": (9, 4),
    }
    assert Bundle.open(bundle.path).manifest == bundle.manifest

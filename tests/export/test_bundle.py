"""The contract: what a bundle says, and what damage to one is called."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.bundle import Bundle, BundleError, Preprocessing, TensorSpec


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def test_a_bundle_can_be_carried_elsewhere(copy: Path) -> None:
    bundle = Bundle.open(copy)
    bundle.verify()
    kinds = {(f.format, f.folded) for f in bundle.manifest.files}
    assert kinds == set(itertools.product(("onnx", "torchscript", "pt2"), (True, False)))
    assert bundle.entry("onnx").path == "model.onnx"
    assert bundle.entry("onnx", folded=False).path == "model.unfolded.onnx"


def test_the_oracle_is_mnist_and_float64(bundle_dir: Path) -> None:
    oracle = Bundle.open(bundle_dir).oracle()
    assert oracle.raw.shape == (10_000, 28, 28)
    assert oracle.raw.dtype == np.uint8
    assert oracle.logits.shape == (10_000, 10)
    assert oracle.logits.dtype == np.float64
    assert oracle.labels is not None
    assert (oracle.logits.argmax(1) == oracle.labels).mean() > 0.9


def test_the_oracle_is_the_unfolded_model_in_float64(bundle_dir: Path, training_dir: Path) -> None:
    import torch

    from trainer import checkpoint
    from trainer.model import Net

    bundle = Bundle.open(bundle_dir)
    oracle = bundle.oracle()
    net = Net().eval().double()
    net.load_state_dict(checkpoint.load(training_dir / "checkpoint.safetensors")[0])
    inputs = bundle.manifest.preprocessing.apply(oracle.raw[:20], bundle.manifest.input.shape)
    with torch.no_grad():
        logits = net(torch.from_numpy(inputs).double()).numpy()
    np.testing.assert_allclose(logits, oracle.logits[:20], rtol=1e-12, atol=1e-12)


def test_everything_is_folded_and_reported(bundle_dir: Path) -> None:
    report = Bundle.open(bundle_dir).manifest.fold
    assert {norm.name: norm.method for norm in report.folded} == {
        "features.5": "ones channel",
        "features.8": "bias map",
        "features.12": "into the layers after",
    }
    assert not report.kept
    assert all(norm.error < 1e-12 for norm in report.folded)


def test_what_torch_runs_is_folded_its_own_way(bundle_dir: Path) -> None:
    """A maximum per channel costs torch what the ReLU did; onnxruntime loses its blocked layout to it."""
    report = Bundle.open(bundle_dir).manifest.fold_for_torch
    assert report is not None
    assert [norm.method for norm in report.folded] == ["floor", "floor", "into the layers after"]
    assert all(norm.error < 1e-12 for norm in report.folded)


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.ts", "model.unfolded.pt2", "oracle.safetensors", "checkpoint.safetensors"]
)
def test_one_altered_byte_is_found(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} was altered.*Export the bundle again"):
        Bundle.open(copy).verify()


def test_a_truncated_file_is_found(copy: Path) -> None:
    path = copy / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match="altered"):
        bundle.locate(bundle.entry("onnx"))


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "model.ts").unlink()
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"model\.ts can't be read"):
        bundle.locate(bundle.entry("torchscript"))


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="python -m export"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"schema_version": 2}, "schema_version 2"),
        (lambda m: {k: v for k, v in m.items() if k != "oracle"}, "oracle"),
        (lambda m: m | {"checkpoint": m["checkpoint"] | {"path": "../../etc/passwd"}}, "checkpoint.path"),
        (lambda m: m | {"surprise": 1}, "surprise"),
        (lambda m: [], "schema_version None"),
    ],
    ids=["other schema", "missing field", "path outside", "unknown field", "no object"],
)
def test_a_manifest_that_is_not_valid(copy: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    manifest = copy / "bundle.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_a_manifest_that_is_not_json(copy: Path) -> None:
    (copy / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        Bundle.open(copy)


def test_a_format_the_bundle_does_not_have(bundle_dir: Path) -> None:
    with pytest.raises(BundleError, match="no pt2/int8/folded file"):
        Bundle.open(bundle_dir).entry("pt2", "int8")


def test_the_digest_identifies_the_bundle(copy: Path) -> None:
    before = Bundle.open(copy).digest
    manifest = copy / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"name": "article"', '"name": "another"'))
    assert Bundle.open(copy).digest != before


def test_preprocessing_is_the_stated_expression() -> None:
    raw = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    spec = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 4, 5))
    one = Preprocessing(raw=spec, scale=1 / 255, mean=(0.5,), std=(0.25,))
    result = one.apply(raw, ("batch", 1, 4, 5))
    assert result.shape == (2, 1, 4, 5)
    assert result.dtype == np.float32
    expected = (raw.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.25)
    np.testing.assert_array_equal(result[:, 0], expected)
    colours = TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 2, 2))
    three = Preprocessing(raw=colours, scale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(three.apply(x, ("batch", 3, 2, 2))[:, 2], (x[:, 2] - 3) / 4)

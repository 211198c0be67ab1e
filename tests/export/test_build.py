"""The checks before publishing catch what they are there for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export import build
from export.build import ExportRefused
from export.sources import article
from export.sources.material import Material


@pytest.fixture
def material(training_dir: Path, data_dir: Path) -> Material:
    """The shortly trained network with 600 of the test images."""
    path = training_dir / "checkpoint.safetensors"
    whole = article.load(path, article.describe(path), data_dir)
    assert whole.labels is not None
    return replace(whole, raw=whole.raw[:600], labels=whole.labels[:600])


@pytest.fixture(autouse=True)
def _onnx_is_written_already(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle of the same weights has the ONNX files: copying them saves seconds, and they are checked as ever."""
    from export.formats import onnx_file

    def copy(program: object, path: Path, *names: str, optimize: bool) -> int:
        shutil.copyfile(bundle_dir / path.name, path)
        return onnx_file.OPSET

    monkeypatch.setattr(onnx_file, "write", copy)


def refuse(material: Material, tmp_path: Path) -> str:
    with pytest.raises(ExportRefused) as refused:
        build.build(material, tmp_path / "bundle", "auto", lambda line: None)
    assert refused.value.exit_code == 1
    assert "Nothing was published" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    return str(refused.value)


def spoiled(write: Callable[..., Any], alter: Callable[[torch.nn.Module], None]) -> Callable[..., Any]:
    """`write`, but of a module that was altered first."""

    def altered(module: torch.nn.Module, *rest: Any) -> Any:
        import copy

        module = copy.deepcopy(module)
        alter(module)
        return write(module, *rest)

    return altered


def test_one_wrong_weight_in_a_file(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.formats import torchscript

    def alter(module: torch.nn.Module) -> None:
        next(module.parameters()).data.view(-1)[0] += 1e-2

    monkeypatch.setattr(torchscript, "write", spoiled(torchscript.write, alter))
    message = refuse(material, tmp_path)
    assert "model.ts is not right" in message or "model.unfolded.ts is not right" in message


def test_a_file_made_for_one_batch_size(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced view that baked the batch in must not get out."""
    from export.formats import torchscript

    class Baked(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, batch: int) -> None:
            super().__init__()
            self.inner, self.batch = inner, batch

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x).view(self.batch, 10)
            return result

    real = torchscript.write
    monkeypatch.setattr(
        torchscript, "write", lambda module, examples, path: real(Baked(module, len(examples[0])), examples, path)
    )
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        build.build(material, tmp_path / "bundle", "auto", lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_batchnorm_left_in_a_folded_file(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.formats import torchscript

    real = torchscript.write
    monkeypatch.setattr(torchscript, "write", lambda module, example, path: real(material.module, example, path))
    assert "model.ts is not right: it holds 3 BatchNorms, the fold report keeps 0" in refuse(material, tmp_path)


def test_a_fold_that_is_wrong_at_the_border(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were both checks of the fold blind, the bundle's comparison in float64 would still see the border."""
    from export.fold import neighbours, search, whole

    monkeypatch.setattr(neighbours.Sink, "needs_border", False)
    monkeypatch.setattr(search, "relative", lambda found, wanted: 0.0)
    monkeypatch.setattr(whole, "relative", lambda found, wanted: 0.0)
    assert "differs from the unfolded one" in refuse(material, tmp_path)


def test_logits_that_are_not_finite_in_float32(material: Material, tmp_path: Path) -> None:
    last = material.module.classifier[5]  # type: ignore[index,union-attr]
    last.weight.data.fill_(1e38)  # type: ignore[union-attr,operator]
    material.module.classifier[3].weight.data.fill_(1e38)  # type: ignore[index,union-attr,operator]
    assert "it overflows" in refuse(material, tmp_path)


def test_a_torch_without_torchscript(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its makers have deprecated it: the day it is gone, the other files are made as before."""
    from export.formats import torchscript

    monkeypatch.setattr(torchscript, "available", lambda: False)
    said: list[str] = []
    bundle = build.build(material, tmp_path / "bundle", "auto", said.append)
    assert {file.format for file in bundle.manifest.files} == {"onnx", "pt2"}
    assert any("no TorchScript" in line for line in said)

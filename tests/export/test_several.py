"""Models with several inputs and outputs, and of sizes that vary: exported, every output judged, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.bundle import Bundle
from export.checks import runner

ROOT = Path(__file__).parents[2]
NETS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.words, self.last = nn.Embedding(2, 8), nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, image, words):
        x = self.norm(torch.relu(self.first(image)))
        x = torch.relu(self.second(x))
        features = x.mean((2, 3)) + self.words(words).mean(1)
        logits = self.last(features)
        return {"logits": logits, "map": x, "image": features, "top": logits.argmax(1)}


def two():
    torch.manual_seed(0)
    return Two().eval()


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 3 * 16 * 16)


class Listed(nn.Module):
    def forward(self, x):
        return [x, None]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("several")
    (made / "nets_of_several.py").write_text(NETS)
    return made


def export(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", *options]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, check=False
    )


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "250", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


INPUTS = ("--input", "image=3x16?x12?", "--input", "words=4:int64")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    draw = np.random.default_rng(0)
    image = draw.standard_normal((40, 3, 16, 12), dtype=np.float32)
    np.savez(folder / "data.npz", inputs=image, words=draw.integers(0, 2, (40, 4)), labels=draw.integers(0, 5, 40))
    options = ["--model", "nets_of_several:two", *INPUTS, "--output", "map:scores", "--data", "data.npz"]
    done = export(folder, *options, "--variant", "float16", "--out", "bundle")
    assert done.returncode == 0, done.stderr
    return Bundle.open(folder / "bundle")


def test_the_manifest_names_all(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.inputs] == [
        ("image", "float32", ("batch", 3, "height", "width")),
        ("words", "int64", ("batch", 4)),
    ]
    outputs = [(spec.name, spec.shape, spec.kind) for spec in manifest.outputs]
    assert outputs == [
        ("logits", ("batch", 5), None),
        ("map", ("batch", 8, "map_2", "map_3"), "scores"),
        ("image_out", ("batch", 8), None),
        ("top", ("batch",), None),
    ]
    assert len(manifest.fold.folded) == 1


def test_every_file_takes_and_gives_all_at_any_size(bundle: Bundle) -> None:
    draw = np.random.default_rng(1)
    image, words = draw.standard_normal((3, 3, 20, 9), dtype=np.float32), draw.integers(0, 2, (3, 4))
    found = {entry.path: runner(bundle.path, entry)(image, words) for entry in bundle.manifest.files}
    reference = found.pop("model.unfolded.pt2")
    assert [array.shape for array in reference] == [(3, 5), (3, 8, 20, 9), (3, 8), (3,)]
    for path, outputs in found.items():
        for output, wanted in zip(outputs, reference, strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-2 if "float16" in path else 1e-5, err_msg=path)


@pytest.mark.slow
def test_every_output_is_judged_on_every_runtime(bundle: Bundle, folder: Path) -> None:
    command = [sys.executable, "-m", "bench", "parity", "--bundle", str(bundle.path), "--variant", "float32"]
    command += ["--variant", "float16"]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("map", "image_out", "top"):
        assert name in done.stdout


def test_a_wrong_further_output_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from export import build
    from export.formats import torchscript
    from export.sources import own
    from export.sources.ends import Given

    monkeypatch.syspath_prepend(folder)
    inputs = (Given.parse("image=3x16x12"), Given.parse("words=4:int64"))
    material = own.load(own.Own("nets_of_several:two", inputs=inputs), lambda note: None, tmp_path)
    real = torchscript.write

    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
            made: dict[str, torch.Tensor] = self.inner(image, words)
            return {**made, "image": 1.01 * made["image"]}

    monkeypatch.setattr(torchscript, "write", lambda module, examples, path: real(Other(module), examples, path))
    with pytest.raises(build.ExportRefused, match="image_out: RMS error"):
        build.build(material, tmp_path / "bundle", "auto", lambda line: None)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--model", "nets_of_several:two", "--input", "3x16x12", "--input", "4:int64"], 2, "needs a name of its own"),
        (["--model", "nets_of_several:two", "--input", "words=4:int64", "--input", "image=3x8x8"], 2, "floats first"),
        (["--model", "nets_of_several:two", "--input", "image=3x8x8"], 4, "missing 1 required positional argument"),
        (["--model", "nets_of_several:two", *INPUTS, "--data", "data.npy"], 4, "data.npy"),
        (["--model", "nets_of_several:two", *INPUTS, "--data", "fewer.npz"], 4, "has nothing as 'words'"),
        (["--model", "nets_of_several:two", *INPUTS, "--output", "mask:scores"], 4, "no such output, but logits"),
        (["--model", "nets_of_several:two", *INPUTS, "--variant", "int8"], 4, "one input and one output"),
        (["--model", "nets_of_several:two", *INPUTS, "--variant", "float32-raw"], 4, "of one input alone"),
        (["--model", "nets_of_several:Listed", "--input", "3x8x8"], 4, "returns list of NoneType, Tensor"),
        (["--model", "nets_of_several:Fixed", "--input", "3x16?x16?"], 4, "does not take an input of shape"),
        (["--model", "nets_of_several:two", "--input", "image:3x8"], 2, "no shape of one input"),
    ],
)
def test_what_can_not_be_is_said(options: list[str], code: int, says: str, folder: Path) -> None:
    np.savez(folder / "fewer.npz", inputs=np.zeros((4, 3, 16, 12), np.float32))
    done = export(folder, *options, "--out", "never")
    assert done.returncode == code, done.stderr
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (folder / "never").exists()


def detector(folder: Path) -> tuple[str, ...]:
    """What makes torchvision's smallest detector with weights that tell places apart: an untrained one gives thousands
    of boxes the same score, and rounding chooses among them. The folder gets its weights, and images.
    """
    import safetensors.torch
    import torchvision

    name, arguments = "fasterrcnn_mobilenet_v3_large_320_fpn", {"weights_backbone": None, "num_classes": 5}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **arguments).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        model.backbone.train()(4 * torch.rand(4, 3, 320, 480) - 2)
        model.eval()
        model.rpn.head.cls_logits.weight *= 3
        model.roi_heads.box_predictor.cls_score.weight *= 10
    safetensors.torch.save_file(model.state_dict(), folder / "detector.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 96), dtype=np.uint8)
    np.savez(folder / "images.npz", inputs=images)
    given = ("--weights", "detector.safetensors", "--data", "images.npz", "--scale", str(1 / 255))
    return ("--model", f"torchvision:{name}", "--model-args", json.dumps(arguments), *given, "--input", "3x64x96")


@pytest.mark.slow
def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    done = export(tmp_path, *detector(tmp_path), "--out", "bundle")
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    assert [(spec.name, spec.kind) for spec in bundle.manifest.outputs] == [
        ("boxes", "boxes"),
        ("scores", "box_scores"),
        ("labels", "box_classes"),
    ]
    assert bundle.manifest.fixed_batch == 1
    assert len(bundle.manifest.fold.folded) > 40
    assert not bundle.manifest.fold.kept
    assert bundle.oracle().logits.shape[0] == 6
    command = [sys.executable, "-m", "bench", "run", "--bundle", "bundle", "--rounds", "2", "--processes", "1"]
    names = ("onnx-cpu", "openvino-cpu", "torchscript-cpu")
    done = subprocess.run(
        [*command, *(word for name in names for word in ("--backend", name))],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_segmentation_of_torchvision(name: str, tmp_path: Path) -> None:
    arguments = '{"num_classes": 5, "weights_backbone": null, "aux_loss": true}'
    np.save(tmp_path / "few.npy", np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32))
    options = ["--model", f"torchvision:{name}", "--model-args", arguments, "--input", "3x32x32", "--data", "few.npy"]
    done = export(tmp_path, *options, "--output", "out:scores", "--output", "aux:scores", "--out", "bundle")
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert [(spec.name, spec.shape) for spec in manifest.outputs] == [
        ("out", ("batch", 5, 32, 32)),
        ("aux", ("batch", 5, 32, 32)),
    ]
    assert manifest.fold.folded
    assert not manifest.fold.kept
    command = [sys.executable, "-m", "bench", "run", "--bundle", "bundle", "--batch-size", "2", "--rounds", "2"]
    command += ["--processes", "1", "--backend", "onnx-cpu", "--backend", "torchscript-cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

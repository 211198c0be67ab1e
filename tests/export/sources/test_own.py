"""What a user says of inputs, and what the model's library says, meet in a material; and the whole way to a bundle."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import picture
from PIL import Image
from torch import nn

from export.bundle import Bundle, Preprocessing
from export.sources.ends import Given
from export.sources.framing import Framing
from export.sources.own import Own, load
from trainer.errors import UserError

NOTES: list[str] = []
CLASSES = ("bird", "cat", "dog")


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_here")
    module.net = net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_here", module)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 of them, no two sizes alike, in three classes."""
    place = tmp_path / "photos"
    for index in range(24):
        name = f"{index}.{'jpg' if index % 2 else 'png'}"
        picture(place / CLASSES[index % 3] / name, 150 + 7 * index, 330 - 5 * index, index)
    return place


def loaded(folder: Path, model: str = "made_here:net", **more: Any) -> Any:
    NOTES.clear()
    more = {"inputs": (Given.parse("3x32x32"),), **more}
    return load(Own(model, **more), NOTES.append, folder)


def test_a_folder_gives_labels_and_class_names(photos: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path, data=photos, resize=(32, 32), samples=9)
    assert found.class_names == CLASSES
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.preprocessing.outside == Framing((32, 32)).steps(3)
    assert found.raw.shape == (9, 3, 32, 32)
    assert any("0 to 255" in note for note in NOTES)


def test_folders_that_are_not_the_models_classes_are_no_labels(photos: Path, tmp_path: Path) -> None:
    """Their numbers would be those of other classes, and top-1 nonsense."""
    found = loaded(tmp_path, data=photos, resize=(32, 32), arguments={"classes": 5})
    assert (found.labels, found.class_names) == (None, None)
    assert any("3 folders and the model's output is [5]" in note for note in NOTES)


def test_options_win_over_what_is_declared(photos: Path, tmp_path: Path) -> None:
    model = {"model": "timm:test_convnext", "arguments": {"num_classes": 3}, "data": photos, "samples": 2}
    found = loaded(tmp_path, **model, inputs=())
    assert found.preprocessing.outside.words == (
        "decoded as RGB, resized, the shorter side to 168 pixels (bicubic), the 160×160 pixels in the centre taken"
    )
    found = loaded(tmp_path, **model, inputs=(), interpolation="box")
    assert (found.preprocessing.outside.resize, found.preprocessing.outside.interpolation) == ((168,), "box")
    found = loaded(tmp_path, **model, inputs=(Given.parse("3x96x64"),), resize=(128,), crop=(96, 64))
    assert found.preprocessing.outside == Framing((128,), (96, 64), "bilinear").steps(3)
    assert found.preprocessing.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="comes to 160×160, the model takes 96×96"):
        loaded(tmp_path, **model, inputs=(Given.parse("3x96x96"),))


def test_a_manifest_without_what_is_done_to_images_is_read() -> None:
    old = {"raw": {"name": "x", "dtype": "uint8", "shape": ["batch", 3]}, "scale": 1.0, "mean": [0.0], "std": [1.0]}
    assert Preprocessing.model_validate(old).outside is None


def test_calibration_from_a_folder(photos: Path, tmp_path: Path) -> None:
    for index in range(6):
        picture(tmp_path / "more" / CLASSES[index % 3] / f"{index}.png", 60, 60, 100 + index)
    framing = {"resize": (32, 32)}
    found = loaded(tmp_path, data=photos, calibration=tmp_path / "more", calibration_samples=3, **framing)
    assert found.calibration.raw.shape == (3, 3, 32, 32)
    assert found.calibration.labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="24 of the 24 inputs of --calibration"):
        loaded(tmp_path, data=photos, calibration=photos, **framing)
    with pytest.raises(UserError, match=r"uint8 inputs.*float32"):
        loaded(tmp_path, calibration=photos, **framing)


def test_labels_of_calibration_are_classes_too(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "c.npz", inputs=inputs, labels=[0, 1, 2, -1])
    with pytest.raises(UserError, match=r"--calibration .*c\.npz: `labels` go from -1 to 2") as refused:
        loaded(tmp_path, calibration=tmp_path / "c.npz")
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("least", "largest", "said"), [(0, 255, True), (0, 1, True), (-2, 2.5, False), (-2, 255, True)]
)
def test_floats_that_look_like_pixels_are_remarked(least: float, largest: float, said: bool, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).uniform(least, largest, (2, 3, 160, 160)).astype(np.float32)
    np.save(tmp_path / "d.npy", inputs)
    model = {"model": "timm:test_convnext", "inputs": (), "data": tmp_path / "d.npy"}
    loaded(tmp_path, **model)
    assert any("don't look scaled" in note for note in NOTES) == said
    loaded(tmp_path, **model, scale=1.0)
    assert not NOTES


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"calibration_samples": 4}, "--calibration-samples goes with --calibration"),
        ({"resize": (4,)}, "go with a folder of images"),
        ({"interpolation": "box", "data": True}, "--interpolation goes with --resize"),
    ],
)
def test_options_without_what_they_are_for(said: dict[str, Any], says: str, photos: Path, tmp_path: Path) -> None:
    if "data" in said:
        said = {**said, "data": photos}
    with pytest.raises(UserError, match=says) as refused:
        loaded(tmp_path, **said)
    assert refused.value.exit_code == 2


# -- the command ------------------------------------------------------------------------------------------------------


def export(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "broken"], 4, "x.png is no image"),
        (["--data", "d.pth"], 4, "d.pth"),
        (["--data", "photos", "--resize", "0"], 2, "--resize"),
        (["--data", "photos", "--crop", "3x3x3"], 2, "--crop"),
        (["--data", "photos", "--interpolation", "best"], 2, "interpolation"),
        (["--data", "photos", "--samples", "1"], 2, "samples"),
    ],
)
def test_refused_commands_publish_nothing_and_leave_nothing(
    arguments: list[str],
    code: int,
    says: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from export.cli import app
    from trainer.errors import run_app

    picture(tmp_path / "broken" / "a.png", 32, 32)
    (tmp_path / "broken" / "x.png").write_text("none")
    (tmp_path / "d.pth").write_text("none")
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(sys, "argv", ["export", "--model", "made_here:net", "--input", "3x32x32", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_app(app, "python -m export")
    assert ended.value.code == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "artifacts").exists()
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_from_a_folder_of_photos_to_a_verdict(photos: Path, tmp_path: Path) -> None:
    """What the raw pixels in the bundle come to is what timm's own transform makes of each photo."""
    import timm
    import torch

    model = ["--model", "timm:resnet18", "--model-args", '{"num_classes": 3}']
    done = export(tmp_path, *model, "--data", photos, "--variant", "float32-raw", "--out", "b")
    assert done.returncode == 0, done.stderr
    assert "24 images in 3 classes (bird, cat, dog); each decoded as RGB, resized, the shorter side" in done.stdout
    bundle = Bundle.open(tmp_path / "b")
    bundle.verify()
    manifest, oracle = bundle.manifest, bundle.oracle()
    assert manifest.class_names == CLASSES
    assert oracle.labels is not None
    assert oracle.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert manifest.preprocessing.outside == Framing((235,), (224, 224), "bicubic").steps(3)
    assert {entry.variant for entry in manifest.files} == {"float32", "float32-raw"}

    config = timm.data.resolve_model_data_config(timm.create_model("resnet18"))
    transform = timm.data.create_transform(**config, is_training=False)
    ours = manifest.preprocessing.apply(np.asarray(oracle.raw), manifest.input.shape)
    paths = sorted(photos.rglob("*.*"), key=lambda path: (path.parent.name, path.name))
    wanted = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]).numpy()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)

    command = [sys.executable, "-m", "bench", "parity", "--bundle", "b", "--backend", "onnx-cpu"]
    command += ["--variant", "float32", "--variant", "float32-raw"]
    judged = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert judged.returncode == 0, judged.stdout + judged.stderr

"""Folders of images, and that their pixels are those of torchvision's and timm's own transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from export.bundle import Preprocessing
from export.sources import images
from export.sources.data import Data, Request, read_data
from export.sources.framing import Framing
from export.sources.making import make
from export.sources.own import PIXELS
from trainer.errors import UserError

SIZES = [(40, 60), (61, 37), (50, 50), (33, 90)]
NOTES: list[str] = []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, several kinds of files, one below a further folder, and one that is no image."""
    place = tmp_path / "photos"
    for index, (height, width) in enumerate(SIZES):
        picture(place / "b cats" / f"{index}.jpg", height, width, index)
        picture(place / "Dogs" / f"{index}.PNG", width, height, index, "RGBA" if index == 1 else "RGB")
    picture(place / "Dogs" / "more" / "0.webp", 48, 44)
    picture(place / "a" / "grey.bmp", 70, 45, 9, "L")
    (place / "a" / "notes.txt").write_text("none")
    (place / ".hidden").mkdir()
    (place / ".hidden" / "checkpoint.png").write_text("none")
    (place / "a" / "._grey.bmp").write_text("none")
    return place


def read(folder: Path, shape: tuple[int, ...] = (3, 32, 32), **more: Any) -> Data:
    NOTES.clear()
    more.setdefault("framing", Framing((32, 32)))
    return read_data(Request(folder, "--data", shape, folder.parent, **more), NOTES.append)


def test_images_and_classes_are_those_of_torchvisions_imagefolder(folder: Path) -> None:
    """But for what is hidden, which ImageFolder takes for a class."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, Resize

    found = read(folder)
    (folder / "a" / "._grey.bmp").unlink()
    (folder / ".hidden" / "checkpoint.png").unlink()
    (folder / ".hidden").rmdir()
    wanted = ImageFolder(str(folder), Compose([Resize((32, 32)), PILToTensor()]))
    assert found.class_names == tuple(wanted.classes) == ("Dogs", "a", "b cats")
    assert found.labels is not None
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == wanted.targets
    for row, (tensor, _) in zip(np.asarray(found.inputs), wanted, strict=True):
        np.testing.assert_array_equal(row, tensor.numpy())
    assert "10 images in 3 classes (Dogs, a, b cats); 2 other files ignored" in NOTES[0]
    assert "outside of every file" in NOTES[0]


def test_a_flat_folder_has_no_labels(folder: Path) -> None:
    found = read(folder / "b cats")
    assert (len(found.inputs), found.labels, found.class_names) == (4, None, None)


def test_a_class_without_images_keeps_its_number(folder: Path) -> None:
    (folder / "Cows").mkdir()
    found = read(folder)
    assert found.class_names == ("Cows", "Dogs", "a", "b cats")
    assert found.labels is not None
    assert set(found.labels) == {1, 2, 3}
    assert "none in Cows" in NOTES[0]


def test_samples_are_drawn_evenly(folder: Path) -> None:
    whole, found = read(folder), read(folder, samples=5)
    assert whole.labels is not None
    assert found.labels is not None
    assert found.labels.tolist() == whole.labels[::2].tolist()
    np.testing.assert_array_equal(found.inputs, np.asarray(whole.inputs)[::2])
    assert "5 images of 10" in NOTES[0]
    assert len(read(folder, samples=100).inputs) == 10


def test_one_channel_is_grey(folder: Path) -> None:
    found = np.asarray(read(folder, (1, 45, 70), framing=Framing((45, 70))).inputs)
    assert found.shape == (10, 1, 45, 70)
    with Image.open(folder / "Dogs" / "0.PNG") as image:
        wanted = image.convert("L").resize((70, 45), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found[0, 0], np.asarray(wanted))


def test_more_images_than_are_decoded_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.asarray(read(folder).inputs)
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 3)
    np.testing.assert_array_equal(read(folder).inputs, whole)


# -- the libraries' own transforms ------------------------------------------------------------------------------------


def floats(model: str, folder: Path) -> tuple[np.ndarray, list[Path]]:
    """What the model takes, by what is declared for it, float32, and the images in their order."""
    declared = make(model, {}, None, pretrained=False).declared
    assert declared is not None
    assert declared.framing is not None
    found = read(folder, declared.shape, framing=declared.framing)
    raw = {"name": "raw", "dtype": "uint8", "shape": ("batch", *declared.shape)}
    scaling = Preprocessing.model_validate({"raw": raw, "scale": PIXELS, "mean": declared.mean, "std": declared.std})
    return scaling.apply(np.asarray(found.inputs), ("batch", *declared.shape)), list(
        images.listing(folder, "--data").paths
    )


def transformed(transform: Any, paths: list[Path]) -> np.ndarray:
    tensors = []
    for path in paths:
        with Image.open(path) as image:
            tensors.append(transform(image.convert("RGB")))
    return torch.stack(tensors).numpy()


# Both resize PIL images, which rounds to whole levels; what is left is float32's rounding in (x / 255 - mean) / std.
ROUNDING = 1e-6


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0", "regnet_y_400mf"])
def test_pixels_are_those_of_torchvisions_transforms(name: str, folder: Path) -> None:
    """Bilinear and bicubic, several sizes, images smaller and larger than the crop."""
    import torchvision

    picture(folder / "a" / "large.jpg", 400, 300)
    found, paths = floats(f"torchvision:{name}", folder)
    wanted = transformed(torchvision.models.get_model_weights(name).DEFAULT.transforms(), paths)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "vit_tiny_patch16_224", "dm_nfnet_f0"])
def test_pixels_are_those_of_timms_transforms(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops of several shares of the image, means of 0.5, and squashed to a square."""
    import timm

    picture(folder / "a" / "large.jpg", 400, 300)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda module: config)
    found, paths = floats("timm:test_convnext", folder)
    wanted = transformed(timm.data.create_transform(**config, is_training=False), paths)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)


def test_a_crop_mode_that_is_not_known_is_no_framing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than another than timm's."""
    import timm

    config = timm.data.resolve_model_data_config(timm.create_model("test_convnext")) | {"crop_mode": "border"}
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda module: config)
    declared = make("timm:test_convnext", {}, None, pretrained=False).declared
    assert declared is not None
    assert declared.framing is None


@pytest.mark.parametrize(
    ("framing", "says"),
    [
        (Framing(), "decoded as RGB"),
        (
            Framing((256,), (224,), "bicubic"),
            "decoded as RGB, resized, the shorter side to 256 pixels (bicubic), the 224×224 pixels in the centre taken",
        ),
        (Framing((64, 32)), "decoded as RGB, resized, to 64×32 pixels (bilinear)"),
    ],
)
def test_what_is_done_in_words(framing: Framing, says: str) -> None:
    assert framing.steps(3).words == says
    assert framing.steps(1).colour == "L"


# -- refused ----------------------------------------------------------------------------------------------------------


def broken_jpeg(folder: Path) -> None:
    whole = (folder / "b cats" / "2.jpg").read_bytes()
    (folder / "b cats" / "2.jpg").write_bytes(whole[: len(whole) // 2])


def text_as_png(folder: Path) -> None:
    (folder / "a" / "x.png").write_text("no picture")


def only_text(folder: Path) -> None:
    for path in images.listing(folder, "--data").paths:
        path.rename(path.with_suffix(".txt"))


def one_image(folder: Path) -> None:
    for path in images.listing(folder, "--data").paths[1:]:
        path.rename(path.with_suffix(".txt"))


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (broken_jpeg, {}, "2.jpg is no image that can be decoded"),
        (text_as_png, {}, "x.png is no image that can be decoded"),
        (only_text, {}, "holds no images, and 12 other files"),
        (one_image, {}, "holds one image; expected 2"),
        (None, {"framing": Framing()}, "--resize 32x32"),
        (None, {"framing": Framing((32,))}, "the model takes 32×32"),
        (None, {"shape": (4, 32, 32)}, "1 channel or 3"),
        (None, {"shape": (12,)}, "1 channel or 3"),
    ],
    ids=["cut off", "no image", "none", "one", "sizes", "one side", "four channels", "no picture"],
)
def test_folders_that_are_no_good(spoil: Any, more: dict[str, Any], says: str, folder: Path) -> None:
    if spoil is not None:
        spoil(folder)
    with pytest.raises(UserError, match="--data") as refused:
        read(folder, **more)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 4

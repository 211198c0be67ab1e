"""A folder of images as a user's inputs: with a subfolder for each class, or flat.

Owns which files are images and which class each has, as torchvision's ImageFolder has it, and decoding them into an
array on the disk. Knows neither models nor what the pixels are scaled by.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle.rows import StoredRows
from export.sources.framing import COLOURS, Framing
from export.sources.scratch import store
from trainer.errors import UserError

DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class Listing:
    """The images of a folder in the order in which they are taken, and the place of the class of each in `class_names`,
    both None in a flat folder. `ignored` counts the files that are no images by their names.
    """

    paths: tuple[Path, ...]
    classes: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    ignored: int

    def drawn(self, chosen: list[int]) -> Listing:
        """A listing of those images alone."""
        classes = None if self.classes is None else tuple(self.classes[index] for index in chosen)
        return Listing(tuple(self.paths[index] for index in chosen), classes, self.class_names, self.ignored)


def listing(folder: Path, option: str) -> Listing:
    """What is in the folder; `option` is how the user named it. Names that begin with a dot are passed over.

    Raises UserError where it can't be read, or holds no image.
    """
    try:
        subfolders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        below = [_files(folder / name) for name in subfolders]
        above = [folder / name for name in sorted(os.listdir(folder)) if not (folder / name).is_dir()]
    except OSError as error:
        raise UserError(f"{option} {folder} can't be read ({error.strerror or error}).") from error
    images = [[path for path in files if _is_image(path)] for files in below]
    everything = sum(map(len, below)) + len(above)
    if any(images):
        paths = tuple(path for of_class in images for path in of_class)
        classes = tuple(index for index, of_class in enumerate(images) for _ in of_class)
        return Listing(paths, classes, tuple(subfolders), everything - len(paths))
    paths = tuple(path for path in above if _is_image(path))
    if not paths:
        raise UserError(
            f"{option} {folder} holds no images, and {everything} other files. Expected images "
            f"({', '.join(suffixes())}) in a subfolder for each class, or in the folder itself."
        )
    return Listing(paths, None, None, everything - len(paths))


def decode(found: Listing, shape: tuple[int, ...], framing: Framing, option: str, scratch: Path) -> StoredRows:
    """The images as uint8 [N, C, H, W], with `shape` C, H, W, in the folder `scratch`; a few at a time are in memory.

    Raises UserError, which names the image, where one can't be decoded or comes to another size.
    """

    def decoded() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(found.paths), DECODED_AT_ONCE):
                some = found.paths[start : start + DECODED_AT_ONCE]
                yield np.stack(list(pool.map(lambda path: _pixels(path, shape, framing, option), some)))

    return store(scratch, decoded())


def suffixes() -> tuple[str, ...]:
    """What the names of images end with, in small letters."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)


def _files(folder: Path) -> list[Path]:
    """All files below the folder, in ImageFolder's order."""
    return [
        Path(place) / name for place, _, names in sorted(os.walk(folder, followlinks=True)) for name in sorted(names)
    ]


def _is_image(path: Path) -> bool:
    return path.name[0] != "." and path.name.lower().endswith(suffixes())


def _pixels(path: Path, shape: tuple[int, ...], framing: Framing, option: str) -> np.ndarray:
    from PIL import Image

    channels, height, width = shape
    try:
        with path.open("rb") as file, Image.open(file) as image:
            decoded = image.convert(COLOURS[channels])
    except Exception as error:  # whatever the decoders make of bytes that are none of theirs
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{option}: {path} is no image that can be decoded ({reason}). Mend it or take it out of the folder."
        ) from error
    framed = framing.apply(decoded)
    if framed.size != (width, height):
        raise UserError(
            f"{option}: {path} of {decoded.height}×{decoded.width} pixels comes to {framed.height}×{framed.width}, "
            f"the model takes {height}×{width}. --resize and --crop say how images come to that size, for example "
            f"--resize {height}x{width}."
        )
    pixels = np.asarray(framed)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)

"""The images whose predictions changed, as pictures, where the bundle is still at hand.

Owns finding the raw inputs in the bundle that a result names, and turning them into PNGs. Knows no page.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.results.schema import BundleFacts
from export.bundle import Bundle, BundleError

# A picture is there to be recognised: of a larger one every so many pixels are left out.
LONGEST_SIDE = 64
GREY, RGB = 0, 2  # colour types of PNG


@dataclass(frozen=True)
class Inputs:
    """What a bundle's oracle was asked: `raw` [N, …], and the classes' names where there are any."""

    raw: np.ndarray
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Missing:
    """Why there are no pictures."""

    reason: str


def inputs_of(bundle: BundleFacts) -> Inputs | Missing:
    """The raw inputs of the very bundle that was measured."""
    return _inputs(bundle.path, bundle.digest)


@lru_cache(maxsize=4)
def _inputs(path: str, digest: str) -> Inputs | Missing:
    try:
        bundle = Bundle.open(Path(path))
        if bundle.digest != digest:
            return Missing(f"the bundle at `{path}` is another one by now")
        return Inputs(np.asarray(bundle.oracle().raw), bundle.manifest.class_names)
    except BundleError:
        return Missing(f"the bundle is not at `{path}`, or damaged")


def data_uri(image: np.ndarray) -> str | None:
    """A raw input as a PNG in a data URI; None for what is no picture: uint8 with one channel or three is one."""
    pixels = _pixels(image)
    if pixels is None:
        return None
    step = -(-max(pixels.shape[:2]) // LONGEST_SIDE)
    return "data:image/png;base64," + base64.b64encode(_png(pixels[::step, ::step])).decode()


def _pixels(image: np.ndarray) -> np.ndarray | None:
    """uint8 [height, width] or [height, width, 3]; None for another kind of input."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        return None
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return image if image.ndim == 2 or image.shape[-1] == 3 else None


def _png(pixels: np.ndarray) -> bytes:
    """The smallest PNG there is: one header, one block of rows without a filter (W3C PNG, second edition)."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, GREY if pixels.ndim == 2 else RGB, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

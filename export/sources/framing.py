"""What is done to an image before it is pixels for a model: resized, and its centre taken.

Owns doing it, exactly as torchvision and timm do, and saying it. Importing this imports nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from PIL.Image import Image

    from export.bundle import ImageSteps

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
COLOURS: dict[int, Literal["L", "RGB"]] = {1: "L", 3: "RGB"}
"""As what an image is decoded, by a model's number of channels."""


@dataclass(frozen=True)
class Framing:
    """`resize` and `crop` in pixels: two numbers are height and width, one is the shorter side, or both of the crop's;
    None: not done. An image that is smaller than the crop gets a black border, as torchvision has it.
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    interpolation: Interpolation = "bilinear"

    def apply(self, image: Image) -> Image:
        """What becomes of a decoded image. PIL resizes to whole levels of 0 to 255, so no rounding comes after it."""
        from torchvision.transforms import functional

        if self.resize is not None:
            how = functional.InterpolationMode(self.interpolation)
            image = functional.resize(image, list(self.resize), how, antialias=True)
        if self.crop is not None:
            image = functional.center_crop(image, list(self.crop))
        return image

    def steps(self, channels: int) -> ImageSteps:
        """The record of it for a manifest."""
        from export.bundle import ImageSteps

        colour = COLOURS[channels]
        crop = None if self.crop is None else (self.crop[0], self.crop[-1])
        words = ["decoded as grey" if colour == "L" else "decoded as RGB"]
        if self.resize is not None:
            to = f"the shorter side to {self.resize[0]}" if len(self.resize) == 1 else f"to {_by(self.resize)}"
            words.append(f"resized, {to} pixels ({self.interpolation})")
        if crop is not None:
            words.append(f"the {_by(crop)} pixels in the centre taken")
        return ImageSteps(
            colour=colour,
            resize=self.resize,
            crop=crop,
            interpolation=None if self.resize is None else self.interpolation,
            words=", ".join(words),
        )


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}×{size[1]}"

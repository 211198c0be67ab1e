"""Bending digits: each image of a batch by an affine and an elastic map of its own.

Owns how `trainer.recipes.Augmentation` is drawn and applied, for a whole batch at once and on its device. Knows nothing
of training. The random numbers come from torch's own stream of that device, so that whoever keeps its state keeps
these too.

Source: Simard, Steinkraus, Platt, Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis
(2003).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trainer.recipes import Augmentation

KERNEL_SIGMAS = 3
"""The Gaussian is cut off here: 99.7 % of its weight lie within."""


class Augment:
    """Images to bent ones, by a recipe's numbers: float32 [n, 1, size, size], background 0, to the same."""

    def __init__(self, numbers: Augmentation, device: torch.device) -> None:
        self.numbers = numbers
        self.kernel = _gaussian(numbers.elastic_sigma_pixels).to(device) if numbers.elastic_pixels else None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # Where each pixel of the result is taken from, in coordinates that go from -1 to 1 between the image's borders.
        per_pixel = 2 / images.shape[-1]
        source = F.affine_grid(self._affine(images, per_pixel), list(images.shape), align_corners=False)
        if self.kernel is not None:
            source = source + per_pixel * self._displacements(images, self.kernel)
        return F.grid_sample(images, source, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _affine(self, images: torch.Tensor, per_pixel: float) -> torch.Tensor:
        """A matrix [2, 3] for each image: scale × rotation × shear, and the shift in its last column."""
        numbers = self.numbers
        drawn = torch.rand(6, len(images), device=images.device) * 2 - 1
        angle = drawn[0] * math.radians(numbers.rotation_degrees)
        shear = drawn[1] * numbers.shear
        scale_x, scale_y = torch.exp(drawn[2:4] * numbers.scale)
        shift_x, shift_y = drawn[4:6] * (numbers.shift_pixels * per_pixel)
        cos, sin = torch.cos(angle), torch.sin(angle)
        row_x = torch.stack((scale_x * cos, scale_x * (shear * cos - sin), shift_x), 1)
        row_y = torch.stack((scale_y * sin, scale_y * (shear * sin + cos), shift_y), 1)
        return torch.stack((row_x, row_y), 1)

    def _displacements(self, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """A smooth random field for each image, in pixels: [n, size, size, 2], x and y."""
        count, _, size, _ = images.shape
        margin = len(kernel) // 2
        field = torch.rand(count * 2, 1, size, size, device=images.device) * 2 - 1
        field = F.conv2d(field, kernel.view(1, 1, -1, 1), padding=(margin, 0))
        field = F.conv2d(field, kernel.view(1, 1, 1, -1), padding=(0, margin))
        return field.view(count, 2, size, size).permute(0, 2, 3, 1) * self.numbers.elastic_pixels


def _gaussian(sigma: float) -> torch.Tensor:
    """A Gaussian over whole pixels, of sum 1."""
    reach = math.ceil(KERNEL_SIGMAS * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float32).square() / (2 * sigma**2))
    return weights / weights.sum()

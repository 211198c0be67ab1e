"""Detectors as torchvision has them: a list of images in, a dict for each image out.

Owns the form in which such a model is exported: one image, and what was found in it.
"""

from __future__ import annotations

import torch
from torch import nn

from export.bundle import OutputKind

KINDS: dict[str, OutputKind] = {"boxes": "boxes", "scores": "box_scores", "labels": "box_classes"}
"""What torchvision calls what a detector finds."""


class OneImage(nn.Module):
    """A detector for one image at a time, [1, C, H, W] with values from 0 to 1, with what `KINDS` names of it."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The boxes [D, 4] in pixels, their scores [D] and classes [D]."""
        found = self.detector([image[0]])[0]
        return {name: found[name] for name in KINDS}

"""The article's network.

Owns the layers and their order, and nothing else: not the data, not how it is trained. The order gives the names of
the `state_dict` (`features.0.weight` … `classifier.5.bias`), so that weights saved by the article's own class load
here, and the other way round.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

CLASSES = 10


class Net(nn.Module):
    """A CNN of 507,420 parameters for MNIST.

    Every BatchNorm stands *after* a ReLU: none can be folded into the convolution before it, only into the layer after.

    Source: the article's class `Net`, layer for layer.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 10, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.BatchNorm2d(10),
            nn.Conv2d(10, 20, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(20),
            nn.Conv2d(20, 40, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.BatchNorm2d(40),
        )
        self.classifier = nn.Sequential(
            nn.Linear(40 * 7 * 7, 200),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(200, 500),
            nn.ReLU(),
            nn.Linear(500, CLASSES),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images float32 [batch, 1, 28, 28] in [-1, 1] to logits float32 [batch, 10]."""
        # flatten, not view: it serves both memory formats, and a traced view would bake the batch size in.
        return cast(torch.Tensor, self.classifier(self.features(image).flatten(1)))

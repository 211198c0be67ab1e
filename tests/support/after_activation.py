"""Networks of known shape whose BatchNorms stand after the activation, as in the article and many Keras models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(
    i: int, o: int, *middle: nn.Module, k: int = 3, act: type[nn.Module] = nn.ReLU, **options: int
) -> list[nn.Module]:
    """Convolution, activation, whatever comes between, BatchNorm."""
    return [nn.Conv2d(i, o, k, **({"padding": k // 2} | options)), act(), *middle, nn.BatchNorm2d(o)]


class Article(nn.Module):
    """The article's order: pooling before or after the ReLU, BatchNorm last."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 10, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        last = [nn.Conv2d(20, 40, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(40)]
        self.features = nn.Sequential(*first, nn.BatchNorm2d(10), *block(10, 20), *last)
        self.head = nn.Linear(1960, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Inception(nn.Module):
    """Branches that end in BatchNorm and are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 12))
        self.a = nn.Sequential(*block(12, 6, k=1))
        self.b = nn.Sequential(*block(12, 6, k=1), *block(6, 8))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), *block(12, 4, k=1))
        self.last = nn.Sequential(*block(18, 10))
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(torch.cat([self.a(x), self.b(x), self.c(x)], 1))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Branches that end in BatchNorm and are added to what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 12))
        self.blocks = nn.ModuleList(nn.Sequential(*block(12, 16), *block(16, 12)) for _ in range(3))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner in self.blocks:
            x = F.relu(x + inner(x))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a concatenation with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*block(3, 8))
        self.deep = nn.Sequential(nn.MaxPool2d(2), *block(8, 16))
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.BatchNorm2d(8))
        self.out = nn.Sequential(*block(16, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.out(torch.cat([x, self.up(self.deep(x))], 1))


def stack(*pools: Callable[[], nn.Module], act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Conv-activation-BatchNorm-pool three times, then global average and Linear: the order of many Keras models."""
    layers: list[nn.Module] = []
    for (i, o), pool in zip(((3, 8), (8, 16), (16, 24)), pools, strict=True):
        layers += [*block(i, o, act=act), pool()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def vgg() -> nn.Sequential:
    """VGG-11's widths over eight, in that order, with its two hidden Linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 0, 16, 0, 32, 32, 0, 64, 64, 0):
        layers += block(channels, width) if width else [nn.MaxPool2d(2)]
        channels = width or channels
    head = [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


def audio() -> nn.Sequential:
    """One-dimensional, BatchNorm on the input, long strided kernels."""
    first = [nn.BatchNorm1d(2), nn.Conv1d(2, 8, 9, stride=4, padding=4), nn.ReLU(), nn.BatchNorm1d(8)]
    second = [nn.Conv1d(8, 16, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(16)]
    return nn.Sequential(*first, *second, nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))


def mlp() -> nn.Sequential:
    """Linear, ReLU, BatchNorm, three times."""
    hidden = [[nn.Linear(i, o), nn.ReLU(), nn.BatchNorm1d(o)] for i, o in ((20, 32), (32, 32), (32, 16))]
    return nn.Sequential(nn.BatchNorm1d(20), *(layer for layers in hidden for layer in layers), nn.Linear(16, 5))


def depthwise() -> nn.Sequential:
    """Depthwise and pointwise convolutions, BatchNorm after each activation."""
    layers = block(3, 8)
    for width in (16, 24):
        layers += [*block(width - 8, width - 8, groups=width - 8), *block(width - 8, width, k=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def video() -> nn.Sequential:
    """Three-dimensional."""
    first = [nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm3d(4), nn.MaxPool3d(2)]
    return nn.Sequential(
        *first, nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm3d(8), nn.Flatten(), nn.Linear(512, 5)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the article's": (Article, (1, 28, 28)),
    "Keras stack, max pooling": (lambda: stack(*[lambda: nn.MaxPool2d(2)] * 3), (3, 32, 32)),
    "Keras stack, average pooling": (lambda: stack(*[lambda: nn.AvgPool2d(2)] * 3), (3, 32, 32)),
    "Keras stack, padded average pooling": (lambda: stack(*[lambda: nn.AvgPool2d(3, 2, 1)] * 3), (3, 32, 32)),
    "Keras stack, no pooling": (lambda: stack(*[nn.Identity] * 3), (3, 32, 32)),
    "Keras stack, SiLU": (lambda: stack(*[lambda: nn.AvgPool2d(2)] * 3, act=nn.SiLU), (3, 32, 32)),
    "VGG-11, BatchNorm after ReLU": (vgg, (3, 32, 32)),
    "audio, BatchNorm on the input": (audio, (2, 512)),
    "MLP": (mlp, (20,)),
    "concatenated branches": (Inception, (3, 24, 24)),
    "residual blocks": (Residual, (3, 24, 24)),
    "U-Net": (UNet, (3, 24, 24)),
    "depthwise separable": (depthwise, (3, 24, 24)),
    "video": (video, (1, 8, 8, 8)),
}

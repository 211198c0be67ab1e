"""The preprocessing as part of the network, so that a file takes the raw input as a user has it.

Owns the module that does it, and its plain reference. Knows no file format.

It stands in front of the network as one multiplication and one subtraction per element, before the first layer's
border: the zeros that a convolution pads with mean 0 *after* normalisation, which for MNIST is 127.5 in pixels and no
pixel at all. Folding it into that convolution is exact too, with a channel of ones or a bias map, but loses: on
OpenVINO in int8 at batch 256 (two AVX-512 cores, MNIST, paired rounds) images/s were 3.42 times eager torch's as it
stands here, 3.19 through a 1×1 convolution and 2.95 with a bias map, and preprocessing outside the file came to 3.25.
OpenVINO sees that 256 grey levels scaled to [-1, 1] are the levels of the quantised input, and convolves the pixels
themselves. In float32, with onnxruntime and with OpenVINO, all forms came within the noise of each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from export.bundle import Preprocessing, TensorSpec


class FromRaw(nn.Module):
    """`model` preceded by the bundle's preprocessing: raw [N, …] → what `model` makes of (raw · scale - mean) / std.

    It computes in `dtype`, and hands `model` a tensor of it.
    """

    factor: torch.Tensor
    offset: torch.Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, input: TensorSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.input = input
        axis = (1, -1, *[1] * (len(input.shape) - 2))
        std = np.asarray(preprocessing.std, np.float64).reshape(axis)
        mean = np.asarray(preprocessing.mean, np.float64).reshape(axis)
        self.register_buffer("factor", torch.from_numpy(preprocessing.scale / std).to(dtype))
        self.register_buffer("offset", torch.from_numpy(mean / std).to(dtype))

    def forward(self, raw: torch.Tensor) -> Any:
        """Raw [N, …] of any dtype → what the model returns."""
        x = _shaped(raw, self.input).to(self.dtype)
        return self.model(x * self.factor - self.offset)


def reference(model64: nn.Module, preprocessing: Preprocessing, input: TensorSpec, raw: torch.Tensor) -> Any:
    """What a float64 model makes of raw inputs, by the preprocessing's own expression in float64."""
    axis = (1, -1, *[1] * (len(input.shape) - 2))
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).reshape(axis)
    std = torch.tensor(preprocessing.std, dtype=torch.float64).reshape(axis)
    return model64((_shaped(raw, input).double() * preprocessing.scale - mean) / std)


def _shaped(raw: torch.Tensor, input: TensorSpec) -> torch.Tensor:
    """Raw [N, …] in the shape of the model's input; as it is where any size may vary, since then it has that shape."""
    sizes = [size for size in input.shape[1:] if isinstance(size, int)]
    return raw.reshape(raw.shape[0], *sizes) if len(sizes) == len(input.shape) - 1 else raw

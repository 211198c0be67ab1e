"""The operators of ONNX that its reference implementation computes slowly, or not in float64, by torch.

Owns what each computes, as the ONNX specification has it. Knows neither files nor graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch.nn import functional

Array = np.ndarray
Sizes = Sequence[int] | None

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
MAX_POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


class _Window:
    """How a window goes over the sizes of an input: kernel, strides, dilations, and what is padded at both ends."""

    def __init__(
        self,
        sizes: Sequence[int],
        kernel: Sequence[int],
        strides: Sizes,
        dilations: Sizes,
        pads: Sizes,
        auto_pad: str | None,
        ceil: bool = False,
    ) -> None:
        rank = len(kernel)
        self.kernel, self.strides, self.dilations = tuple(kernel), _each(strides, rank, 1), _each(dilations, rank, 1)
        self.pads: list[tuple[int, int]] = []
        self.further: list[int] = []
        for axis, (size, step) in enumerate(zip(sizes, self.strides, strict=True)):
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            begin, end = (pads[axis], pads[rank + axis]) if pads and auto_pad in (None, "", "NOTSET") else (0, 0)
            if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
                total = max((math.ceil(size / step) - 1) * step + reach - size, 0)
                begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
                end = total - begin
            self.pads.append((begin, end))
            length, further = size + begin + end, 0
            if ceil:
                last = math.ceil((length - reach) / step)
                if last * step >= size + begin:  # a window begins in the input, or in what is padded before it
                    last -= 1
                further = max(last * step + reach - length, 0)
            self.further.append(further)

    def padded(self, x: torch.Tensor, padding: float, further: float) -> torch.Tensor:
        """`x` with `padding` around it, and after that with `further` at its end, where a last window needs it."""
        around = [size for pair in reversed(self.pads) for size in pair]
        behind = [size for more in reversed(self.further) for size in (0, more)]
        return functional.pad(functional.pad(x, around, value=padding), behind, value=further)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of each window."""
        ones = torch.ones(1, 1, *self.kernel, dtype=torch.float64)
        convolve = CONVOLUTIONS[len(self.kernel) - 1]
        found = convolve(x.reshape(-1, 1, *x.shape[2:]), ones, None, self.strides, 0, self.dilations)
        return found.reshape(*x.shape[:2], *found.shape[2:])


def _each(values: Sizes, rank: int, default: int) -> tuple[int, ...]:
    return tuple(values) if values else (default,) * rank


def _tensor(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


class Conv(OpRun):
    """Four images of ResNet-18 took 1.4 s in the reference's convolutions, a fifth of that in torch's (two cores)."""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes = None,
        group: int | None = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        window = _Window(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
        convolve = CONVOLUTIONS[len(window.kernel) - 1]
        padded = window.padded(_tensor(x), 0.0, 0.0)
        offset = None if bias is None else _tensor(bias)
        made = convolve(padded, _tensor(weight), offset, window.strides, 0, window.dilations, group or 1)
        return (made.numpy(),)


class ConvTranspose(OpRun):
    """As the gradient of Conv; `output_shape` and `auto_pad` say what is cut off at the ends."""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes = None,
        group: int | None = None,
        kernel_shape: Sizes = None,
        output_padding: Sizes = None,
        output_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        rank = weight.ndim - 2
        steps, spread, more = _each(strides, rank, 1), _each(dilations, rank, 1), _each(output_padding, rank, 0)
        whole = TRANSPOSED[rank - 1](_tensor(x), _tensor(weight), None, steps, 0, 0, group or 1, spread)
        ends: list[int] = []
        begins: list[int] = []
        same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
        for axis in range(rank):
            length = whole.shape[2 + axis] + more[axis]
            if output_shape or same:
                wanted = output_shape[-rank:][axis] if output_shape else x.shape[2 + axis] * steps[axis]
                cut = max(length - wanted, 0)
                begin = cut // 2 if auto_pad == "SAME_UPPER" else cut - cut // 2
                begins.append(begin)
                ends.append(cut - begin)
            else:
                begins.append(pads[axis] if pads else 0)
                ends.append(pads[rank + axis] if pads else 0)
        around = [(-begin, more[axis] - end) for axis, (begin, end) in enumerate(zip(begins, ends, strict=True))]
        made = functional.pad(whole, [size for pair in reversed(around) for size in pair])
        if bias is not None:
            made = made + _tensor(bias).reshape(1, -1, *[1] * rank)
        return (made.numpy(),)


class MaxPool(OpRun):
    """Four images of ResNet-18 took 2.5 s in the reference's one pool, more than in all of its convolutions."""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sizes = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        storage_order: int | None = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with the places of its maxima")
        assert kernel_shape is not None
        window = _Window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
        padded = window.padded(_tensor(x), -math.inf, -math.inf)
        pool = MAX_POOLS[len(window.kernel) - 1]
        return (pool(padded, window.kernel, window.strides, 0, window.dilations).numpy(),)


class AveragePool(OpRun):
    """Sums over how many of the elements count: padding does where `count_include_pad` says so, and never what is
    added so that a last window fits (`ceil_mode`).
    """

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Sizes = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        assert kernel_shape is not None
        window = _Window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
        ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float64)
        counts = window.sums(window.padded(ones, 1.0 if count_include_pad else 0.0, 0.0))
        return ((window.sums(window.padded(_tensor(x), 0.0, 0.0)) / counts).numpy(),)


class BatchNormalization(OpRun):
    """With the statistics that it is given. The reference (onnx 1.23) takes those of the batch in opsets 9 to 13."""

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        var: Array,
        epsilon: float | None = None,
        momentum: float | None = None,
        spatial: int | None = None,
        training_mode: int | None = None,
        is_test: int | None = None,
        consumed_inputs: Sizes = None,
    ) -> tuple[Array]:
        if training_mode or any(self.onnx_node.output[1:]) or spatial == 0:
            raise NotImplementedError("BatchNormalization in training mode, or of each place by itself")
        scale = gamma / np.sqrt(var + np.float64(1e-5 if epsilon is None else epsilon))
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * scale.reshape(shape) + (beta - scale * mean).reshape(shape),)


class Erf(OpRun):
    """The reference rounds it to float32, whatever it is given."""

    def _run(self, x: Array) -> tuple[Array]:
        return (torch.erf(_tensor(x)).numpy(),)


LAYERS: tuple[type[OpRun], ...] = (Conv, ConvTranspose, MaxPool, AveragePool, BatchNormalization, Erf)
"""What `onnx.reference.ReferenceEvaluator` takes as `new_ops`."""

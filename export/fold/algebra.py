"""The algebra of folding: layers with other weights that compute a BatchNorm on the way.

Owns the formulas, each on one layer. Knows nothing of graphs, and never changes a tensor it is given. With `a` the
scale and `s` the shift of a BatchNorm, per channel:

    scale and shift            a = gamma / sqrt(var + eps),  s = beta - a mean
    after a layer              a (W x + b) + s                 = (a W) x + (a b + s)                  [absorb_after]
    before a layer, scale      W (a x) + b                     = (W a) x + b                          [scale_input]
    before a layer, shift      W (x + s) + b                   = W x + (b + sum W s)                  [shift_input]
                               where every output reads all of its inputs; with zero padding only inside
    before a padded layer      W pad(x + s 1) + b              = [W, K] pad([x, 1]) + b, K = sum_c W_c s_c
                               a channel of ones, which the padding borders with zeros                [border_kernel]
    the channel of ones        row 0 with bias 1 in the layer that makes x                            [add_ones_output]
    floor                      |a| relu(z) + t                 = max(|a| z + t, t)                    [rules, case 9]

All arithmetic is in float64; weights are cast back when the network is written.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from export.fold.graph import Layer, Tensor


def affine(gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """BatchNorm's running statistics and parameters [C] → scale, shift, float64 [C]."""
    mean, var = mean.detach().double().cpu(), var.detach().double().cpu()
    scale = 1 / torch.sqrt(var + eps)
    if gamma is not None:
        scale = gamma.detach().double().cpu() * scale
    shift = -scale * mean
    if beta is not None:
        shift = beta.detach().double().cpu() + shift
    return scale, shift


def absorb_after(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """The layer followed by x → scale x + shift, `scale` and `shift` [O]."""
    weight, bias = _weight(layer), _bias(layer)
    if layer.transposed:
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        weight = (grouped * scale.reshape(layer.groups, 1, -1, *([1] * layer.rank))).reshape(weight.shape)
    else:
        weight = weight * scale.reshape(-1, *([1] * (weight.dim() - 1)))
    spread = (-1, *([1] * (bias.dim() - 1)))
    return replace(layer, weight=weight, bias=bias * scale.reshape(spread) + shift.reshape(spread))


def scale_input(layer: Layer, scale: Tensor) -> Layer:
    """The layer preceded by x → scale x, `scale` [I]. Exact with zero padding and for any sign."""
    return replace(layer, weight=_weight(layer) * _along_input(layer, scale))


def shift_input(layer: Layer, shift: Tensor) -> Layer:
    """The layer preceded by x → x + shift, `shift` [I]. Exact only where `layer.reads_padding` is False."""
    kernel = border_kernel(layer, shift)
    total = kernel.reshape(kernel.shape[0], -1).sum(1)
    bias = _bias(layer)
    return replace(layer, bias=bias + total.reshape(-1, *([1] * (bias.dim() - 1))))


def border_kernel(layer: Layer, shift: Tensor) -> Tensor:
    """[O, 1, *kernel] (transposed: [1, O, *kernel]): the weights of a channel of ones that stand for `shift`."""
    weighted = _weight(layer) * _along_input(layer, shift)
    if layer.transposed:
        return weighted.reshape(layer.groups, -1, *weighted.shape[1:]).sum(1).reshape(1, -1, *weighted.shape[2:])
    return weighted.sum(1, keepdim=True)


def add_inputs(layer: Layer, position: int, kernel: Tensor) -> Layer:
    """The layer (one group) with more input channels at `position`, weighted with `kernel` [O, n, *k] ([n, O, *k])."""
    axis = 0 if layer.transposed else 1
    weight = _weight(layer)
    before, after = weight.narrow(axis, 0, position), weight.narrow(axis, position, weight.shape[axis] - position)
    return replace(layer, weight=torch.cat([before, kernel, after], axis))


def no_kernel(layer: Layer, channels: int) -> Tensor:
    """Zeros for `add_inputs`: input channels that the layer doesn't look at."""
    shape = list(layer.weight.shape)
    shape[0 if layer.transposed else 1] = channels
    return torch.zeros(shape, dtype=torch.float64)


def add_ones_output(layer: Layer) -> Layer:
    """The layer (one group, no bias map) with one more output channel, the last, which is 1 everywhere."""
    axis = 1 if layer.transposed else 0
    weight = _weight(layer)
    row = torch.zeros_like(weight.narrow(axis, 0, 1))
    bias = torch.cat([_bias(layer), torch.ones(1, dtype=torch.float64)])
    return replace(layer, weight=torch.cat([weight, row], axis), bias=bias)


def _weight(layer: Layer) -> Tensor:
    return layer.weight.detach().double().cpu()


def _bias(layer: Layer) -> Tensor:
    if layer.bias is None:
        return torch.zeros(layer.channels_out, dtype=torch.float64)
    return layer.bias.detach().double().cpu()


def _along_input(layer: Layer, vector: Tensor) -> Tensor:
    """[I] → a factor for the weight, one value for each input channel of each output's group."""
    weight = layer.weight
    ones = [1] * (weight.dim() - 2)
    if layer.transposed:
        return vector.reshape(-1, 1, *ones)
    per_group = weight.shape[0] // layer.groups
    return vector.reshape(layer.groups, -1).repeat_interleave(per_group, 0).reshape(*weight.shape[:2], *ones)

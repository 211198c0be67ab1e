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
    the same as a constant     W pad(x + s 1) + b              = W pad(x) + (b + W pad(s 1))          [add_bias_map]
    beside a layer             W x + b + (a x + s)             = (W + diag(a) at the centre) x + b + s   [beside]
    two layers of one input    W x + b + V x + c               = (W + V around the centre) x + b + c     [beside]
    past a clamp, backward     a clamp(x, l, h) + s            = clamp(a x + s, a l + s, a h + s)     [operations.Clamp]
                               for a ≥ 0; l and h change places for a < 0. With l = 0: a relu(x) + s = max(a x + s, s)
    past a clamp, forward      clamp(a x + s, l, h)            = a clamp(x, (l - s)/a, (h - s)/a) + s [operations.Clamp]
                               for a > 0, the ends swapped for a < 0, and the constant clamp(s, l, h) for a = 0

All arithmetic is in float64; weights are cast back when the network is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from export.fold.maps import Refused
from export.fold.operations import Layer

Tensor = torch.Tensor


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


def add_inputs(layer: Layer, positions: Sequence[int], kernel: Tensor) -> Layer:
    """The layer (one group) with more input channels, which come to stand at `positions`.

    They are weighted with `kernel`: [O, n, *k], transposed [n, O, *k].
    """
    axis = 0 if layer.transposed else 1
    weight = _weight(layer)
    total = weight.shape[axis] + len(positions)
    others = [index for index in range(total) if index not in set(positions)]
    sizes = list(weight.shape)
    sizes[axis] = total
    wider = torch.empty(sizes, dtype=torch.float64)
    wider.index_copy_(axis, torch.tensor(others, dtype=torch.long), weight)
    wider.index_copy_(axis, torch.tensor(list(positions), dtype=torch.long), kernel)
    return replace(layer, weight=wider)


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


def add_bias_map(layer: Layer, response: Tensor) -> Layer:
    """The layer plus `response` [O, *spatial]; one that is the same everywhere becomes a bias."""
    flat = response.reshape(response.shape[0], -1)
    if bool((flat == flat[:, :1]).all()):
        response = flat[:, 0]
    bias = _bias(layer)
    if bias.dim() < response.dim():
        bias = bias.reshape(-1, *([1] * (response.dim() - 1)))
    elif response.dim() < bias.dim():
        response = response.reshape(-1, *([1] * (bias.dim() - 1)))
    return replace(layer, bias=bias + response)


def beside(layer: Layer, kernel: Tensor, bias: Tensor, corner: tuple[int, ...]) -> Layer:
    """The layer plus another one of the same input: `kernel` [O, I/groups, *k], which lies at `corner`, `bias` [O]."""
    weight = _weight(layer).clone()
    place = weight
    for axis, (start, size) in enumerate(zip(corner, kernel.shape[2:], strict=True), start=2):
        place = place.narrow(axis, start, size)
    place += kernel
    own = _bias(layer)
    return replace(layer, weight=weight, bias=own + bias.reshape(-1, *([1] * (own.dim() - 1))))


def diagonal(layer: Layer, scale: Tensor) -> Tensor:
    """[O, I/groups, 1, …]: the kernel of x → scale x, `scale` [O], in a layer of as many outputs as inputs."""
    if layer.channels_in != layer.channels_out:
        raise Refused("it makes another number of channels than it reads")
    kernel = torch.zeros(*layer.weight.shape[:2], *([1] * layer.rank), dtype=torch.float64)
    channels = torch.arange(layer.channels_out)
    kernel[channels, channels % layer.weight.shape[1]] = scale.reshape(-1, *([1] * layer.rank))
    return kernel


def ungrouped(layer: Layer) -> Layer:
    """The same convolution with one group: zeros where a group does not look."""
    per_group, inputs = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    weight = torch.zeros(layer.channels_out, layer.channels_in, *layer.weight.shape[2:], dtype=torch.float64)
    for group in range(layer.groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        weight[rows, group * inputs : (group + 1) * inputs] = _weight(layer)[rows]
    return replace(layer, weight=weight, groups=1)


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

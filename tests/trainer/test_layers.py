"""The rewritten layers compute what torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer.layers import rewritten


def images(*shape: int) -> torch.Tensor:
    """Float64 noise with equal neighbours in it, as a blank border has them, in the convolutions' memory format."""
    torch.manual_seed(0)
    noise = torch.randn(*shape, dtype=torch.float64).round()
    noise[..., : shape[-2] // 2, :] = 0.5
    return noise.to(memory_format=torch.channels_last).requires_grad_()


def test_a_pool_and_its_gradient_are_the_same_numbers() -> None:
    layer, x = nn.MaxPool2d(2), images(3, 5, 8, 12)
    expected = layer(x)
    upstream = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    with rewritten(layer):
        found = layer(x)
    assert type(found.grad_fn).__name__ == "_MaxPoolBackward", "it is torch's own pool still"
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, x, upstream)[0], wanted)


def test_a_batchnorm_computes_the_same_and_keeps_the_same_statistics() -> None:
    expected_layer = nn.BatchNorm2d(5, dtype=torch.float64)
    nn.init.normal_(expected_layer.weight)
    nn.init.normal_(expected_layer.bias)
    layer, x = copy.deepcopy(expected_layer), images(3, 5, 8, 12)
    with rewritten(layer):
        pass
    for _ in range(2):
        upstream = torch.randn(3, 5, 8, 12, dtype=torch.float64)
        grads = []
        for each in (expected_layer, layer):
            output = each(x)
            grads.append((output, *torch.autograd.grad(output, [x, each.weight, each.bias], upstream)))
        for wanted, found in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    for wanted, found in zip(expected_layer.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert layer.num_batches_tracked == 2
    torch.testing.assert_close(layer.eval()(x), expected_layer.eval()(x), rtol=1e-12, atol=1e-12)


def test_other_pools_stay_as_they_are() -> None:
    x = images(2, 3, 9, 9)
    for layer in (nn.MaxPool2d(3), nn.MaxPool2d(2, stride=1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2)):
        expected = layer(x)
        with rewritten(layer):
            assert torch.equal(layer(x), expected)


def test_it_is_undone_where_compiling_fails() -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no compiler"), rewritten(model):
        raise RuntimeError("no compiler")
    assert all("forward" not in vars(layer) for layer in model)

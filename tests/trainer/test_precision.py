"""bf16 on a CPU that has none computes what hardware that has it computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from trainer import mnist, precision, train
from trainer.history import Trained
from trainer.recipes import Settings


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("default")  # what the compiler stack warns of is not this project's to mend
def test_rounding_is_that_of_bf16(compiled: bool) -> None:
    """To the nearest, ties to even, as torch's own conversion; over values of all magnitudes, and ties."""
    rounded = torch.compile(precision._rounded_to_bf16) if compiled else precision._rounded_to_bf16
    torch.manual_seed(0)
    values = torch.randn(100_000) * torch.exp2(torch.randint(-100, 100, (100_000,)).float())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])
    for tensor in (values, ties):
        assert torch.equal(rounded(tensor), tensor.bfloat16().float())


def test_bf16_rounds_the_operands_and_keeps_the_weights(
    data: mnist.Mnist, settings: Settings, reference: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_bf16_arithmetic", lambda device: False)
    bf16 = train.train(dataclasses.replace(settings, precision="bf16"), data, compiled=False)
    assert list(bf16.weights) == list(reference.weights)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in bf16.weights.values())
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in bf16.weights.values()), "trained in float32"
    assert any((bf16.weights[name] != tensor).any() for name, tensor in reference.weights.items())
    # Eight significant bits: the same way down the loss, within a percent or so.
    assert [e.loss for e in bf16.history] == pytest.approx([e.loss for e in reference.history], rel=0.03)


def test_rounded_layers_compute_what_bf16_hardware_computes() -> None:
    """Against float64 arithmetic on numbers rounded by torch's own conversion, forward and backward."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().bfloat16().double()

    torch.manual_seed(0)
    convolution, norm, linear = (
        torch.nn.Conv2d(1, 5, 3, padding=1),
        torch.nn.BatchNorm2d(5).eval(),
        torch.nn.Linear(320, 4),
    )
    norm.running_mean.uniform_(-1, 1)
    layers = torch.nn.Sequential(convolution, torch.nn.ReLU(), norm, torch.nn.Flatten(), linear)
    precision._round_to_bf16(layers)
    image, upstream = rounded(torch.randn(2, 1, 8, 8)), torch.randn(2, 4)
    logits = layers(image.float())
    logits.backward(upstream)

    weight, bias = convolution.weight.detach(), convolution.bias.detach().double()
    first = rounded(F.conv2d(image, rounded(weight), bias, padding=1))
    scale = (norm.running_var + norm.eps).double().rsqrt()
    normed = rounded((first.relu() - norm.running_mean.double()[:, None, None]) * scale[:, None, None])
    torch.testing.assert_close(
        logits.double(), rounded(F.linear(normed.flatten(1), rounded(linear.weight), linear.bias.detach().double()))
    )
    to_linear = rounded(upstream)
    torch.testing.assert_close(linear.weight.grad.double(), to_linear.T @ normed.flatten(1), rtol=1e-5, atol=1e-5)
    to_norm = (to_linear @ rounded(linear.weight)).reshape(2, 5, 8, 8)
    to_convolution = rounded(to_norm * scale[:, None, None] * (first > 0))
    expected = torch.nn.grad.conv2d_weight(image, weight.shape, to_convolution, padding=1)
    # A number on the brink between two bf16 values may be rounded to the other one: by 2^-8 of itself.
    torch.testing.assert_close(convolution.weight.grad.double(), expected, rtol=1e-3, atol=1e-3)

"""What a fold may cost: bytes of bias maps, and the memory format that a runtime is fast in.

Two Conv-ReLU-BatchNorm of 32 channels at 384² grew from 0.05 MB to 21.3 MB by maps of the whole image, and ran at 0.93
of the unfolded file. `auto` leaves a BatchNorm where every way costs more than it does; `all` folds regardless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import MAP, Net, assert_all_folded, conv, fold_exactly, image, weight_bytes
from networks import enliven
from torch import Tensor, nn

from export.fold import Folded, fold_batchnorm

MEGABYTE = 2**20


def large(*layers: nn.Module, side: int = 192) -> tuple[nn.Module, Tensor]:
    """The layers in float32, brought to life on a small image, and one large image."""
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return enliven(nn.Sequential(*layers), image(2, 3, 16, 16)).float(), image(1, 3, side, side).float()


def folds(model: nn.Module, x: Tensor, **options: Any) -> Folded:
    """In float32, where it is compared by what float32 can tell."""
    folded = fold_batchnorm(model, (x,), **options)
    with torch.no_grad():
        wanted, found = model(x), folded.module(x)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    return folded


def article(middle: int = 8, side: int = 192) -> tuple[nn.Module, Tensor]:
    first = [conv(3, 32), nn.ReLU(), nn.BatchNorm2d(32)]
    return large(*first, conv(32, middle), nn.ReLU(), nn.BatchNorm2d(middle), conv(middle, 4), side=side)


def depthwise() -> tuple[nn.Module, Tensor]:
    """Where a map is the only way: no bound takes the shift, and no channel of ones has a place."""
    return large(conv(3, 32), nn.SiLU(), nn.BatchNorm2d(32), conv(32, 32, groups=32), nn.SiLU())


def on_the_input() -> tuple[nn.Module, Tensor]:
    return large(nn.BatchNorm2d(3), conv(3, 32), nn.ReLU())


NETWORKS = {"two convolutions": article, "depthwise": depthwise, "on the input": on_the_input}


@pytest.mark.slow
def test_two_convolutions_on_a_large_image() -> None:
    """0.05 MB of weights, of which maps made 21.3 MB."""
    model, x = article(32, 384)
    assert weight_bytes(model) < 0.06 * MEGABYTE
    folded = fold_batchnorm(model, (x,))
    assert weight_bytes(folded.module) < MEGABYTE, folded.report


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.parametrize("network", NETWORKS)
def test_maps_are_no_larger_than_what_they_replace(network: str, runtime: str) -> None:
    """192² and 32 channels are a map of 4.5 MB, against weights of less than 0.05 MB; 8 and 4 are two of 1.7 MB."""
    model, x = NETWORKS[network]()
    before = weight_bytes(model)
    folded = folds(model, x, runtime=runtime)
    assert weight_bytes(folded.module) < 2 * before + MEGABYTE, folded.report


@pytest.mark.parametrize("network", NETWORKS)
def test_all_folds_regardless_of_cost(network: str) -> None:
    model, x = NETWORKS[network]()
    folded = folds(model, x, strategy="all")
    assert_all_folded(folded)
    assert {norm.name for norm in folded.report.folded} == {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }


def test_a_strategy_that_is_named_is_taken_whatever_it_costs() -> None:
    model, x = depthwise()
    folded = folds(model, x, strategy="bias-map")
    assert [norm.method for norm in folded.report.folded] == [MAP]


def test_what_costs_too_much_is_kept_with_that_reason() -> None:
    model, x = depthwise()
    folded = folds(model, x)
    assert [norm.name for norm in folded.report.kept] == ["2"], folded.report
    assert "cost" in folded.report.kept[0].reason


def test_a_small_map_is_worth_it() -> None:
    """An upper bound on bytes must not keep what is cheap: 9x11 pixels."""
    torch.manual_seed(0)
    x = image(3, 4, 9, 11)
    model = enliven(nn.Sequential(conv(4, 6), nn.SiLU(), nn.BatchNorm2d(6), conv(6, 6, groups=6), nn.ReLU()), x)
    assert_all_folded(fold_exactly(model, x))


# -- memory format ---------------------------------------------------------------------------------------------------

FOLDS: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "into the layer before": (lambda: [conv(4, 6), nn.BatchNorm2d(6), nn.ReLU()], "auto"),
    "into the layer after": (lambda: [nn.Sigmoid(), nn.BatchNorm2d(4), conv(4, 6, padding=0)], "auto"),
    "ones": (lambda: [conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU()], "ones"),
    "bias map": (lambda: [conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU()], "bias-map"),
    "floor": (lambda: [conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU()], "floor"),
    "depthwise": (lambda: [conv(4, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU()], "auto"),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], "auto"),
}


@pytest.mark.parametrize("case", FOLDS)
def test_channels_last_stays_channels_last(case: str) -> None:
    """Weights, and with them what the network returns, were written in the default format again."""
    make, strategy = FOLDS[case]
    torch.manual_seed(0)
    x = image(3, 4, 9, 11).to(memory_format=torch.channels_last)
    model = enliven(nn.Sequential(*make()), x).to(memory_format=torch.channels_last)
    folded = fold_exactly(model, x, strategy=strategy)
    assert_all_folded(folded)
    for name, weight in folded.module.named_parameters():
        if weight.dim() == 4 and weight.shape[2:] != (1, 1):
            assert weight.is_contiguous(memory_format=torch.channels_last), name
    with torch.no_grad():
        wanted, found = model(x), folded.module(x)
    assert found.stride() == wanted.stride()


def test_channels_last_in_three_dimensions() -> None:
    torch.manual_seed(0)
    x = image(2, 4, 5, 6, 7).to(memory_format=torch.channels_last_3d)
    model = enliven(nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU()), x)
    folded = fold_exactly(model.to(memory_format=torch.channels_last_3d), x)
    assert_all_folded(folded)
    weights = [weight for weight in folded.module.parameters() if weight.dim() == 5]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_a_format_of_ones_own_stays_right() -> None:
    """Weights that are a transposed view, as some loaders leave them."""
    torch.manual_seed(0)
    layer = conv(4, 6)
    layer.weight.data = layer.weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    model = enliven(Net(lambda m, x: m.n(m.a(x)).relu(), a=layer, n=nn.BatchNorm2d(6)), image(3, 4, 5, 7))
    assert_all_folded(fold_exactly(model, image(3, 4, 5, 7)))

"""BatchNorms around an activation: before it, as in DenseNet, and behind one that has a ceiling as well as a floor.

`relu(a x + s)` is `a max(x, -s/a) + s`, so a BatchNorm before a ReLU becomes a bound for each channel, and what is left
goes into the next layer. Behind ReLU6 the two bounds take the map. Both stayed, and so did a BatchNorm between an
activation and a depthwise convolution where the size is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import FLOOR, Net, assert_all_folded, conv, fold_exactly, fresh, image, operations
from networks import enliven
from torch import Tensor, export, nn

IMAGE = image(3, 6, 5, 7)
AUTO = export.Dim.AUTO
ANY_SIZE: dict[str, Any] = {"dynamic_shapes": ({0: AUTO, 2: AUTO, 3: AUTO},), "others": [(image(2, 6, 8, 6),)]}


def build(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return enliven(nn.Sequential(*layers), IMAGE.clone())


# -- before the ReLU -------------------------------------------------------------------------------------------------

PRE_ACTIVATION: dict[str, Callable[[], list[nn.Module]]] = {
    "1x1": lambda: [nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1)],
    "in place": lambda: [nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(6, 5, 1)],
    "3x3 without padding": lambda: [nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, padding=0)],
    "reflected": lambda: [nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, padding_mode="reflect")],
    "average pooling": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), conv(6, 5, 1)],
    "max pooling, fresh": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 5, 1)],
    "the head": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)],
    "Linear": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(210, 3)],
    "behind a pool": lambda: [nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1)],
    "dropout": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), conv(6, 5, 1)],
    "two norms": lambda: [nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1)],
    "ReLU6": lambda: [nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 5, 1)],
}


@pytest.mark.parametrize("case", PRE_ACTIVATION)
def test_before_a_relu(case: str) -> None:
    """Free before a layer that reads no border: for torch all are folded, scales of both signs and of zero."""
    model = build(*PRE_ACTIVATION[case]())
    if "fresh" in case:
        # A negative scale does not pass a maximum of the pixels.
        fold_exactly(model, IMAGE, runtime="torch")
        model = fresh(nn.Sequential(*PRE_ACTIVATION[case]()))
    assert_all_folded(fold_exactly(model, IMAGE, runtime="torch"))
    fold_exactly(model, IMAGE, runtime="onnxruntime")


def test_a_scale_of_zero_before_a_relu() -> None:
    """`-s/a` is no number there, and the channel is the constant `relu(s)`."""
    model = build(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1))
    norm = model[0]  # type: ignore[index]
    norm.weight.data.zero_()  # type: ignore[union-attr,operator]
    assert_all_folded(fold_exactly(model, IMAGE, runtime="torch"))
    norm.weight.data.fill_(1e-200)  # type: ignore[union-attr,operator]
    fold_exactly(model, IMAGE, runtime="torch")


@pytest.mark.parametrize(
    ("strategy", "runtime"),
    [("auto", "onnxruntime"), *((way, "torch") for way in ("auto", "all", "ones", "bias-map", "floor"))],
)
def test_before_a_relu_and_a_border(strategy: str, runtime: str) -> None:
    """ResNet-v2: zeros join behind the ReLU, where `s` would have to be."""
    model = build(conv(6, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.Sigmoid())
    fold_exactly(model, IMAGE, strategy=strategy, runtime=runtime)
    model = build(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.Sigmoid())
    fold_exactly(model, IMAGE, strategy=strategy, runtime=runtime)


class Dense(nn.Module):
    """DenseNet's layer: BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3; every layer reads all that came before."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(layers):
            width = channels + index * growth
            first = [nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, 8, 1, bias=False)]
            second = [nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, growth, bias=False)]
            self.layers.append(nn.Sequential(*first, *second))
        width = channels + layers * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, 4, 1), nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return self.transition(torch.cat(values, 1))


@pytest.mark.parametrize("sizes", ["fixed", "any"])
def test_densenet(sizes: str) -> None:
    """Half of its BatchNorms stand before a ReLU whose input others read, and none is left for torch."""
    torch.manual_seed(0)
    model = enliven(Dense(6, 4, 3), IMAGE.clone())
    options = ANY_SIZE if sizes == "any" else {}
    assert_all_folded(fold_exactly(model, IMAGE, runtime="torch", **options))
    fold_exactly(model, IMAGE, runtime="onnxruntime", **options)


def test_a_pre_activation_that_others_read() -> None:
    """ResNet-v2's shortcut reads the ReLU too: by a layer that can take the rest, or by a sum that can't."""
    torch.manual_seed(0)
    parts = {"n": nn.BatchNorm2d(6), "a": conv(6, 6, 1), "b": conv(6, 6, 1)}
    both = enliven(Net(lambda m, x: m.a(y := F.relu(m.n(x))) * m.b(y), **parts), IMAGE)
    assert_all_folded(fold_exactly(both, IMAGE, runtime="torch"))
    alone = enliven(Net(lambda m, x: m.a(y := F.relu(m.n(x))) + y * y, **parts), IMAGE)
    fold_exactly(alone, IMAGE, runtime="torch")
    shortcut = enliven(Net(lambda m, x: m.a(F.relu(m.n(y := m.b(x)))) + y, **parts), IMAGE)
    assert_all_folded(fold_exactly(shortcut, IMAGE, runtime="torch"))


# -- behind an activation with two bounds ----------------------------------------------------------------------------

CLIPS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "ReLU6 in place": lambda: nn.ReLU6(inplace=True),
    "Hardtanh": nn.Hardtanh,
    "Hardtanh of other bounds": lambda: nn.Hardtanh(-0.25, 0.5),
    "clamp": lambda: Net(lambda _, x: x.clamp(0, 1)),
    "clamp below": lambda: Net(lambda _, x: x.clamp(min=-0.125)),
    "clamp above": lambda: Net(lambda _, x: x.clamp(max=0.125)),
    "clamp_min": lambda: Net(lambda _, x: torch.clamp_min(x, 0.125)),
    "maximum with zero": lambda: Net(lambda _, x: torch.maximum(x, x.new_zeros(()))),
}
FLOORED = [name for name in CLIPS if name != "maximum with zero"]


@pytest.mark.parametrize("clip", FLOORED)
def test_floor_takes_both_bounds(clip: str) -> None:
    folded = fold_exactly(build(conv(6, 6), CLIPS[clip](), nn.BatchNorm2d(6), conv(6, 5)), IMAGE, strategy="floor")
    assert_all_folded(folded)
    assert [norm.method for norm in folded.report.folded] == [FLOOR]


@pytest.mark.parametrize("clip", CLIPS)
def test_floor_at_the_output_and_through_a_pool(clip: str) -> None:
    """Where nothing can take the signs, and where they must come before a maximum of the pixels."""
    folded = fold_exactly(build(conv(6, 6), CLIPS[clip](), nn.BatchNorm2d(6)), IMAGE, strategy="floor")
    if clip in FLOORED:
        assert_all_folded(folded)
    model = build(conv(6, 6), nn.MaxPool2d(2), CLIPS[clip](), nn.BatchNorm2d(6), conv(6, 5))
    fold_exactly(model, IMAGE, strategy="floor")
    model = build(conv(6, 6), CLIPS[clip](), nn.MaxPool2d(2), nn.BatchNorm2d(6), conv(6, 5))
    fold_exactly(model, IMAGE, strategy="floor")


def test_an_inverted_clamp() -> None:
    """A floor above the ceiling: torch then gives the ceiling everywhere."""
    model = build(conv(6, 6), Net(lambda _, x: x.clamp(0.5, 0.25)), nn.BatchNorm2d(6), conv(6, 5))
    fold_exactly(model, IMAGE, strategy="floor")


# -- before a depthwise convolution of any size ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6], ids=["ReLU", "ReLU6"])
@pytest.mark.parametrize("strategy", ["auto", "floor"])
def test_before_a_depthwise_convolution_of_any_size(activation: type[nn.Module], strategy: str) -> None:
    """MobileNet's order behind the activation: no channel of ones has a place, and no map a size."""
    model = build(conv(6, 6), activation(), nn.BatchNorm2d(6), conv(6, 6, groups=6), nn.Sigmoid())
    assert_all_folded(fold_exactly(model, IMAGE, strategy=strategy, **ANY_SIZE))


@pytest.mark.parametrize("groups", [2, 6], ids=["two groups", "depthwise"])
def test_ones_before_a_grouped_convolution_of_any_size(groups: int) -> None:
    """SiLU has no bound to take the map. Folded or kept, in every size."""
    model = build(conv(6, 6), nn.SiLU(), nn.BatchNorm2d(6), conv(6, 6, groups=groups), nn.Sigmoid())
    for strategy in ("auto", "ones", "all"):
        fold_exactly(model, IMAGE, strategy=strategy, **ANY_SIZE)


def test_bounds_are_all_that_a_pre_activation_leaves() -> None:
    folded = fold_exactly(build(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1)), IMAGE, runtime="torch")
    assert_all_folded(folded)
    assert set(operations(folded.module)) <= {"maximum", "minimum", "clamp", "conv2d"}

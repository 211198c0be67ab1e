"""Constants for each channel that are multiplied and added: BatchNorms by another name, and what stands beside one.

FrozenBatchNorm2d of detection models, a BatchNorm written out, LayerScale, the normalisation of the input: they were
opaque, stayed themselves and blocked the BatchNorms next to them. So did weights that are computed from constants.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Net, assert_all_folded, conv, fold_exactly, image, operations
from networks import enliven
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

IMAGE = image(3, 4, 5, 7)
ARITHMETIC = {"mul", "add", "sub", "rsub", "div", "neg", "rsqrt", "sqrt", "reciprocal", "pow"}


class Frozen(FrozenBatchNorm2d):
    """torchvision's, with statistics that matter, scales of both signs and a zero."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        generator = torch.Generator().manual_seed(channels)
        for name in ("weight", "bias", "running_mean"):
            getattr(self, name).copy_(torch.randn(channels, generator=generator))
        self.weight[1] = 0
        self.running_var.copy_(0.5 + torch.rand(channels, generator=generator))


class Written(Frozen):
    """The same as it is written in formulas, by operations in float64."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var, gamma, beta = (
            v[:, None, None] for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / torch.sqrt(var + self.eps) * gamma + beta


class Scale(nn.Module):
    """LayerScale and ReZero: a parameter for each channel, of which one is negative."""

    def __init__(self, channels: int, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-0.5, 2, channels).reshape(channels, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Shift(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma


def build(*layers: nn.Module) -> nn.Module:
    return enliven(nn.Sequential(*layers), IMAGE)


def assert_no_arithmetic(model: nn.Module, x: Tensor, **options: object) -> None:
    """Folded, exact, and no constant is multiplied or added any more."""
    folded = fold_exactly(model, x, **options)  # type: ignore[arg-type]
    assert_all_folded(folded)
    assert not ARITHMETIC & set(operations(folded.module)), folded.report


NORMS = {"FrozenBatchNorm2d": Frozen, "written out": Written}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "place",
    [
        "after a convolution",
        "before a convolution",
        "behind a BatchNorm",
        "before a BatchNorm",
        "between layers",
        "in a residual",
        "before Linear",
    ],
)
def test_a_norm_by_another_name(norm: str, place: str) -> None:
    torch.manual_seed(0)
    kind = NORMS[norm]
    models: dict[str, Callable[[], nn.Module]] = {
        "after a convolution": lambda: build(conv(4, 6, bias=False), kind(6), nn.ReLU()),
        "before a convolution": lambda: build(kind(4), conv(4, 6, padding=0), nn.ReLU()),
        "behind a BatchNorm": lambda: build(conv(4, 6), nn.BatchNorm2d(6), kind(6), nn.ReLU()),
        "before a BatchNorm": lambda: build(conv(4, 6), kind(6), nn.BatchNorm2d(6), nn.ReLU()),
        "between layers": lambda: build(conv(4, 6), kind(6), nn.ReLU(), conv(6, 6), nn.BatchNorm2d(6), nn.ReLU()),
        "before Linear": lambda: build(nn.Sigmoid(), kind(4), nn.Flatten(), nn.Linear(140, 3)),
        "in a residual": lambda: enliven(
            Net(lambda m, x: F.relu(m.n(m.a(x))) + m.k(m.b(x)), a=conv(4, 6), n=kind(6), b=conv(4, 6, 1), k=kind(6)),
            IMAGE,
        ),
    }
    model = models[place]()
    folded = fold_exactly(model, IMAGE)
    assert_all_folded(folded)
    sums = 1 if place == "in a residual" else 0
    left = {name: count for name, count in operations(folded.module).items() if name in ARITHMETIC}
    assert left == ({"add": sums} if sums else {}), folded.report


def test_frozen_norms_after_the_activation() -> None:
    """The article's order, by a detection model's norm: whatever the way, no constant is left but the one it leaves."""
    torch.manual_seed(0)
    folded = fold_exactly(build(conv(4, 6), nn.ReLU(), Frozen(6), conv(6, 5), nn.ReLU()), IMAGE, strategy="ones")
    assert not ARITHMETIC & set(operations(folded.module))


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "times a number": lambda y: y * 0.25,
    "a number times": lambda y: 0.25 * y,
    "divided by a number": lambda y: y / 255.0,
    "plus a number": lambda y: y + 0.5,
    "minus a number": lambda y: y - 0.5,
    "a number minus": lambda y: 1.0 - y,
    "negative": lambda y: -y,
    "with alpha": lambda y: torch.sub(torch.add(y, 0.5, alpha=3), y.new_tensor(0.25), alpha=2),
    "in place": lambda y: y.mul_(0.5).add_(0.25),
    "input normalisation": lambda y: (
        (y - y.new_tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])[:, None, None])
        / y.new_tensor([0.5, -0.4, 0.3, 0.2, 0.1, 0.6])[:, None, None]
    ),
    "addcmul": lambda y: torch.addcmul(
        y.new_tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1), y, y.new_tensor([0.5, -1, 2, 0, 1, 3]).view(1, 6, 1, 1)
    ),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_between_a_layer_and_a_norm(constant: str) -> None:
    """The BatchNorm goes through to the layer, and takes the constants along."""
    torch.manual_seed(0)
    between = Net(lambda _, y: CONSTANTS[constant](y))
    after = build(conv(4, 6), between, nn.BatchNorm2d(6), nn.ReLU())
    assert_no_arithmetic(after, IMAGE)
    before = build(conv(4, 6), nn.BatchNorm2d(6), between, conv(6, 5, 1))
    assert_no_arithmetic(before, IMAGE)


@pytest.mark.parametrize("shape", [(1, 1), ()], ids=["channel axis", "last axis"])
@pytest.mark.parametrize("kind", [Scale, Shift])
def test_a_parameter_of_each_channel(kind: type[Scale], shape: tuple[int, ...]) -> None:
    """LayerScale, beside BatchNorms and alone; on the last axis it is none of the channels'."""
    torch.manual_seed(0)
    channels = 6 if shape else 7
    model = build(conv(4, 6), nn.BatchNorm2d(6), kind(channels, *shape), conv(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
    if shape:
        assert_no_arithmetic(model, IMAGE)
    else:
        fold_exactly(model, IMAGE)


def test_layer_scale_of_tokens() -> None:
    """A Linear writes its channels last, where LayerScale multiplies them."""
    torch.manual_seed(0)
    tokens = image(3, 7, 4)
    model = nn.Sequential(nn.Linear(4, 6), Scale(6), nn.ReLU()).double().eval()
    folded = fold_exactly(model, tokens)
    assert not ARITHMETIC & set(operations(folded.module))


def test_layer_scale_before_a_sum() -> None:
    """A block of ConvNeXt's kind: the sum stays, the scale does not."""
    torch.manual_seed(0)
    parts = {"a": conv(4, 4), "n": nn.BatchNorm2d(4), "b": conv(4, 4, 1), "s": Scale(4, 1, 1)}
    model = enliven(Net(lambda m, x: x + m.s(m.b(F.gelu(m.n(m.a(x))))), **parts), IMAGE)
    folded = fold_exactly(model, IMAGE)
    assert_all_folded(folded)
    assert operations(folded.module)["mul"] == 0


def normalised(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(v).view(1, 4, 1, 1) for v in ((0.485, 0.456, 0.406, 0.4), (0.229, 0.224, 0.225, 0.2)))
    return (x - mean) / std


@pytest.mark.parametrize(("padding", "strategy"), [(0, "auto"), (1, "bias-map")])
def test_the_input_normalised_in_the_model(padding: int, strategy: str) -> None:
    torch.manual_seed(0)
    layers = [conv(4, 6, padding=padding), nn.BatchNorm2d(6), nn.ReLU()]
    model = build(Net(lambda _, x: normalised(x)), *layers)
    folded = fold_exactly(model, IMAGE, strategy=strategy)
    assert_all_folded(folded)
    # A bias map is one addition.
    assert sum(count for name, count in operations(folded.module).items() if name in ARITHMETIC) == padding


UNCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant of each pixel": lambda y: y * torch.linspace(0.5, 2, 35, dtype=y.dtype).view(5, 7),
    "a constant of each image": lambda y: y + torch.linspace(0, 1, 3, dtype=y.dtype).view(3, 1, 1, 1),
    "of rows": lambda y: y * torch.linspace(0.5, 2, 5, dtype=y.dtype).view(5, 1),
    "its own mean": lambda y: y - y.mean((0, 2, 3), keepdim=True),
    "more dimensions": lambda y: (y * torch.linspace(0.5, 2, 2, dtype=y.dtype).view(2, 1, 1, 1, 1)).sum(0),
    "one channel made six": lambda y: y[:, :1] * torch.linspace(0.5, 2, 6, dtype=y.dtype).view(6, 1, 1),
    "a number divided by": lambda y: 1 / (y * y + 1),
    "floor division": lambda y: torch.div(y, 0.3, rounding_mode="floor"),
    "an integer's": lambda y: (y * 4).long() * 2 + y,
    "into single precision": lambda y: (y.float() * 0.1).double(),
}


@pytest.mark.parametrize("constant", UNCHANGED)
def test_constants_that_are_no_map_of_channels(constant: str) -> None:
    torch.manual_seed(0)
    between = Net(lambda _, y: UNCHANGED[constant](y))
    batches = constant not in ("a constant of each image",)
    fold_exactly(build(conv(4, 6), between, nn.BatchNorm2d(6), nn.ReLU()), IMAGE, batches=batches)
    fold_exactly(build(conv(4, 6), nn.BatchNorm2d(6), between, conv(6, 5)), IMAGE, batches=batches)


# -- weights that are computed from constants ------------------------------------------------------------------------


class Computed(nn.Conv2d):
    """A convolution by weights that some function makes of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], i: int, o: int, **options: int) -> None:
        super().__init__(i, o, 3, **({"padding": 1} | options))  # type: ignore[arg-type]
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[:6]
        return F.conv2d(x, self.function(self.weight), bias, self.stride, self.padding, self.dilation, self.groups)


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(conv(4, 6)),
    "weight_norm over another axis": lambda: parametrizations.weight_norm(conv(4, 6), dim=1),
    "sliced": lambda: Computed(lambda w: w[:6], 4, 8),
    "equalised": lambda: Computed(lambda w: w * 0.5, 4, 6),
    "standardised": lambda: Computed(
        lambda w: (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5), 4, 6
    ),
    "flipped": lambda: Computed(lambda w: w.flip(3), 4, 6),
    "transposed": lambda: Computed(lambda w: w.transpose(0, 1), 6, 4, bias=False),
    "cast": lambda: Computed(lambda w: w.float().double(), 4, 6),
    "two concatenated": lambda: Computed(lambda w: torch.cat([w, w.flip(2)]), 4, 3, bias=False),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_layer_whose_weights_are_computed(weight: str) -> None:
    torch.manual_seed(0)
    assert_all_folded(fold_exactly(build(WEIGHTS[weight](), nn.BatchNorm2d(6), nn.ReLU()), IMAGE))
    late = build(WEIGHTS[weight](), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU())
    assert_all_folded(fold_exactly(late, IMAGE, strategy="ones"))


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
def test_the_old_weight_norm() -> None:
    """It sets the weight on every call, which torch.export remarks on."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(conv(4, 6))
    assert_all_folded(fold_exactly(build(layer, nn.BatchNorm2d(6), nn.ReLU()), IMAGE))

"""A BatchNorm beside a layer, and layers or BatchNorms that are shared between branches.

`conv(x) + BN(x)` is one convolution: the scale goes to the tap in the middle. RepVGG, MobileOne and their kin are
built of it, and kept every such BatchNorm. Heads that share their convolutions and not their BatchNorms, as
EfficientDet's do, need a copy of the convolution for each; of a sum whose first side can't take the shift, the second
can.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Net, assert_all_folded, conv, fold_exactly, image, operations
from networks import enliven
from torch import Tensor, export, nn

IMAGE = image(3, 6, 5, 7)
AnySize = export.Dim.AUTO
ANY_SIZE = ({0: AnySize, 2: AnySize, 3: AnySize},)

Program = Callable[[Net, Tensor], object]


def build(program: Program, x: Tensor = IMAGE, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return enliven(Net(program, **modules), x)


# -- beside a layer --------------------------------------------------------------------------------------------------

BESIDE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "3x3": (lambda: conv(6, 6), lambda: nn.BatchNorm2d(6), IMAGE),
    "3x3 without bias": (lambda: conv(6, 6, bias=False), lambda: nn.BatchNorm2d(6), IMAGE),
    "1x1": (lambda: conv(6, 6, 1), lambda: nn.BatchNorm2d(6), IMAGE),
    "5x5, dilated": (lambda: conv(6, 6, 5, padding=4, dilation=2), lambda: nn.BatchNorm2d(6), IMAGE),
    "1x3": (lambda: nn.Conv2d(6, 6, (1, 3), padding=(0, 1)), lambda: nn.BatchNorm2d(6), IMAGE),
    "padding same": (lambda: conv(6, 6, padding="same"), lambda: nn.BatchNorm2d(6), IMAGE),
    "an even kernel, padding same": (lambda: conv(6, 6, 4, padding="same"), lambda: nn.BatchNorm2d(6), IMAGE),
    "two groups": (lambda: conv(6, 6, groups=2), lambda: nn.BatchNorm2d(6), IMAGE),
    "depthwise": (lambda: conv(6, 6, groups=6), lambda: nn.BatchNorm2d(6), IMAGE),
    "one dimension": (lambda: nn.Conv1d(4, 4, 3, padding=1), lambda: nn.BatchNorm1d(4), image(3, 4, 9)),
    "three dimensions": (lambda: nn.Conv3d(4, 4, 3, padding=1), lambda: nn.BatchNorm3d(4), image(2, 4, 3, 4, 5)),
    "Linear": (lambda: nn.Linear(5, 5), lambda: nn.BatchNorm1d(5), image(4, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("layer", "order"),
    [*((layer, "layer first") for layer in BESIDE), ("3x3", "norm first"), ("3x3", "in place"), ("Linear", "in place")],
)
def test_a_norm_beside_a_layer(layer: str, order: str) -> None:
    """One operation less: the sum is gone too."""
    make_layer, make_norm, x = BESIDE[layer]

    def forward(m: Net, x: Tensor) -> Tensor:
        if order == "layer first":
            return F.relu(m.a(x) + m.n(x))
        if order == "norm first":
            return F.relu(m.n(x) + m.a(x))
        y = m.a(x)
        y += m.n(x)
        return F.relu(y)

    torch.manual_seed(0)
    folded = fold_exactly(enliven(Net(forward, a=make_layer(), n=make_norm()), x), x)
    assert_all_folded(folded)
    assert operations(folded.module)["add"] == 0


class RepVGG(nn.Module):
    """The block as it is trained: 3x3, 1x1 and nothing, each with a BatchNorm, summed before the ReLU."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.three = nn.Sequential(conv(channels, channels, bias=False, groups=groups), nn.BatchNorm2d(channels))
        self.one = nn.Sequential(conv(channels, channels, 1, bias=False, groups=groups), nn.BatchNorm2d(channels))
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.three(x) + self.one(x) + self.skip(x))


class MobileOne(RepVGG):
    """More branches of the same, and the skip first."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, groups)
        self.more = nn.Sequential(conv(channels, channels, bias=False, groups=groups), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.skip(x)
        for branch in (self.one, self.three, self.more):
            out = out + branch(x)
        return F.relu(out)


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["dense", "two groups", "depthwise"])
@pytest.mark.parametrize("block", [RepVGG, MobileOne])
def test_blocks_that_are_one_convolution(block: type[RepVGG], groups: int) -> None:
    """Two of them, so that the second reads what the first one wrote."""
    torch.manual_seed(0)
    model = enliven(nn.Sequential(block(6, groups), block(6, groups), nn.Conv2d(6, 3, 1)), IMAGE)
    assert_all_folded(fold_exactly(model, IMAGE, dynamic_shapes=ANY_SIZE, others=[(image(2, 6, 8, 6),)]))


def test_a_norm_beside_two_layers() -> None:
    """conv3x3(x) + conv1x1(x) + BN(x), none of the convolutions followed by a BatchNorm of its own."""
    model = build(lambda m, x: F.relu(m.a(x) + m.b(x) + m.n(x)), a=conv(6, 6), b=conv(6, 6, 1), n=nn.BatchNorm2d(6))
    assert_all_folded(fold_exactly(model, IMAGE))


SIGNED: dict[str, Program] = {
    "the layer subtracted": lambda m, x: m.n(x) - m.a(x),
    "the norm subtracted": lambda m, x: m.a(x) - m.n(x),
    "nothing between": lambda m, x: m.a(x) - F.dropout(0 + m.n(x), 0.5, False),
    "in place": lambda m, x: m.a(x).sub_(m.n(x)),
    "turned": lambda m, x: torch.rsub(m.n(x), m.a(x)),
    "layers subtracted": lambda m, x: m.a(x) - m.b(x) - m.n(x),
    "a layer's opposite": lambda m, x: m.n(x) + (m.k(x) - m.a(x)),
    "a difference's opposite": lambda m, x: m.a(x) - (m.b(x) - m.n(x)),
    "the input": lambda m, x: m.a(x) + m.n(x) + x,
    "the input, first": lambda m, x: x + (m.n(x) + m.a(x)),
    "the input subtracted": lambda m, x: m.n(x) + (m.a(x) - x),
    "FastViT's mixer": lambda m, x: x + 0.3 * ((m.a(x) + m.k(x)) - m.n(x)),
}


@pytest.mark.parametrize("case", SIGNED)
def test_sums_with_signs_that_are_one_convolution(case: str) -> None:
    modules = {"a": conv(6, 6), "b": conv(6, 6, 1), "n": nn.BatchNorm2d(6), "k": nn.BatchNorm2d(6)}
    used = {name: modules[name] for name in SIGNED[case].__code__.co_names if name in modules}
    model = build(lambda m, x: F.relu(SIGNED[case](m, x)), **used)
    folded = fold_exactly(model, IMAGE)
    assert_all_folded(folded)
    counts = operations(folded.module)
    assert (counts["add"], counts["sub"], counts["mul"], counts["conv2d"]) == (0, 0, 0, 1), counts


APART: dict[str, tuple[Program, dict[str, Callable[[], nn.Module]]]] = {
    "stride two": (lambda m, x: m.a(x) + m.n(x[:, :, ::2, ::2]), {"a": lambda: conv(6, 6, stride=2)}),
    "a circle": (lambda m, x: m.a(x) + m.n(x), {"a": lambda: conv(6, 6, padding_mode="circular")}),
    "reflected": (lambda m, x: m.a(x) + m.n(x), {"a": lambda: conv(6, 6, padding_mode="reflect")}),
    "shared": (lambda m, x: m.a(x) + m.n(x) + m.a(x.flip(3)), {"a": lambda: conv(6, 6)}),
    "read elsewhere": (lambda m, x: (y := m.a(x)) + m.n(x) + y.relu(), {"a": lambda: conv(6, 6)}),
    "another value": (lambda m, x: m.a(x) + m.n(x.flip(3)), {"a": lambda: conv(6, 6)}),
    "off the middle": (
        lambda m, x: m.a(F.pad(x, (2, 0, 1, 1))) + m.n(x),
        {"a": lambda: conv(6, 6, padding=0)},
    ),
    "twice": (lambda m, x: m.a(x) + 2 * m.n(x), {"a": lambda: conv(6, 6)}),
    "alpha": (lambda m, x: torch.add(m.a(x), m.n(x), alpha=2), {"a": lambda: conv(6, 6)}),
    "broadcast": (lambda m, x: m.a(x[:1]) + m.n(x), {"a": lambda: conv(6, 6)}),
    "transposed": (lambda m, x: m.a(x) + m.n(x), {"a": lambda: nn.ConvTranspose2d(6, 6, 3, padding=1)}),
    "padding cut off": (lambda m, x: m.a(x)[..., 1:-1, 1:-1] + m.n(x), {"a": lambda: conv(6, 6, padding=2)}),
}
"""Beside a layer as well, but not the tap in the middle of a layer of its own."""


@pytest.mark.parametrize("case", APART)
def test_beside_a_layer_that_is_no_home(case: str) -> None:
    program, modules = APART[case]
    torch.manual_seed(0)
    model = enliven(Net(program, n=nn.BatchNorm2d(6), **{name: make() for name, make in modules.items()}), IMAGE)
    fold_exactly(model, IMAGE)


# -- shared layers and shared norms ----------------------------------------------------------------------------------


def two_heads(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(m.n(m.a(x))), F.relu(m.k(m.a(F.max_pool2d(x, 2))))


def test_heads_that_share_a_layer_and_not_the_norm() -> None:
    """EfficientDet: one convolution for all levels, a BatchNorm for each level."""
    model = build(two_heads, a=conv(6, 6), n=nn.BatchNorm2d(6), k=nn.BatchNorm2d(6))
    assert_all_folded(fold_exactly(model, IMAGE))


def test_heads_of_several_shared_layers() -> None:
    """Two layers deep and three levels, the first layer depthwise, as EfficientDet's heads are."""

    def forward(m: Net, x: Tensor) -> list[Tensor]:
        out = []
        for level in range(3):
            y = x if level == 0 else F.avg_pool2d(x, level + 1)
            y = F.silu(getattr(m, f"n{level}")(m.point(m.depth(y))))
            out.append(m.last(F.silu(getattr(m, f"k{level}")(m.point2(m.depth2(y))))))
        return out

    norms = {f"{kind}{level}": nn.BatchNorm2d(6) for level in range(3) for kind in "nk"}
    layers = {"depth": conv(6, 6, groups=6), "point": conv(6, 6, 1), "depth2": conv(6, 6, groups=6)}
    model = build(forward, **layers, point2=conv(6, 6, 1), last=conv(6, 4), **norms)
    assert_all_folded(fold_exactly(model, IMAGE))


def test_a_shared_layer_with_one_norm_and_none() -> None:
    model = build(lambda m, x: F.relu(m.n(m.a(x))) + m.a(x.flip(3)), a=conv(6, 6), n=nn.BatchNorm2d(6))
    assert_all_folded(fold_exactly(model, IMAGE))


def test_norms_before_a_shared_layer() -> None:
    model = build(
        lambda m, x: m.a(m.n(torch.sigmoid(x))) + m.a(m.k(torch.tanh(x))),
        a=conv(6, 5, 1),
        n=nn.BatchNorm2d(6),
        k=nn.BatchNorm2d(6),
    )
    assert_all_folded(fold_exactly(model, IMAGE))


def test_a_shared_layer_and_its_shared_norm() -> None:
    """Siamese: the same layer and the same BatchNorm twice. The report names the BatchNorm for each call."""
    model = build(
        lambda m, x: F.relu(m.n(m.a(x))) * F.relu(m.n(m.a(x.flip(3)))), a=conv(6, 6, bias=False), n=nn.BatchNorm2d(6)
    )
    assert_all_folded(fold_exactly(model, IMAGE, norms=["n", "n"]))


def test_tied_weights_of_two_layers() -> None:
    first, second = conv(6, 6), conv(6, 6)
    second.weight = first.weight
    model = build(
        lambda m, x: F.relu(m.n(m.a(x))) + F.relu(m.k(m.b(x))),
        a=first,
        b=second,
        n=nn.BatchNorm2d(6),
        k=nn.BatchNorm2d(6),
    )
    assert_all_folded(fold_exactly(model, IMAGE))


# -- sums of which one side can take the shift -----------------------------------------------------------------------


def bordered(m: Net, x: Tensor) -> Tensor:
    """Average pooling that counts its border passes a scale and no shift."""
    return F.avg_pool2d(m.a(x), 3, 1, 1)


SUMS: dict[str, Program] = {
    "the first": lambda m, x: m.n(m.b(x) + bordered(m, x)).relu(),
    "the second": lambda m, x: m.n(bordered(m, x) + m.b(x)).relu(),
    "the last of three": lambda m, x: m.n(bordered(m, x) + F.pad(m.c(x), (1, 1, 1, 1)) + m.b(x)).relu(),
    "the middle of three": lambda m, x: m.n(bordered(m, x) + (m.b(x) + F.pad(m.c(x), (1, 1, 1, 1)))).relu(),
    "neither": lambda m, x: m.n(bordered(m, x) + F.pad(m.c(x), (1, 1, 1, 1))).relu(),
}


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_takes_the_shift_where_it_can(case: str) -> None:
    model = build(SUMS[case], a=conv(6, 5), b=conv(6, 5, 1), c=conv(6, 5, 3, padding=0), n=nn.BatchNorm2d(5))
    folded = fold_exactly(model, IMAGE)
    if case != "neither":
        assert_all_folded(folded)


@pytest.mark.parametrize("kernel", [1, 3])
def test_two_parts_of_a_concatenation_of_which_one_is_bordered(kernel: int) -> None:
    """The map of the shift counted the part without a border twice, and its own check undid it."""
    model = build(
        lambda m, x: m.c(torch.cat([F.avg_pool2d(y := m.n(torch.sigmoid(m.a(x))), 3, 1, 1), y], 1)),
        a=conv(6, 6),
        n=nn.BatchNorm2d(6),
        c=conv(12, 5, kernel),
    )
    assert_all_folded(fold_exactly(model, IMAGE, strategy="bias-map"))
    for strategy in ("auto", "ones", "floor"):
        fold_exactly(model, IMAGE, strategy=strategy)

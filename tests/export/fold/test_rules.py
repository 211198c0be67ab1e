"""Each case of the search, and each refusal, on the smallest network that shows it.

A case passes when exactly the expected BatchNorms are gone by the expected way, and the folded network equals the
unfolded one in float64 to 1e-12 on random inputs and on inputs that are bright at the border alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import AFTER, BEFORE, FLOOR, MAP, ONES, Net, conv, image
from networks import enliven
from torch import Tensor, nn

from export.fold import Folded, fold_batchnorm


def shuffled(x: Tensor) -> Tensor:
    """Channels of two groups in turns, by sizes that an exporter computes while the network runs."""
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def tied_bias() -> nn.Module:
    """Two convolutions with one bias, as exporters make them of biases that are equal, zeros for example."""
    first, second = conv(4, 6), conv(6, 6)
    second.bias = first.bias
    norms = {"n": nn.BatchNorm2d(6), "k": nn.BatchNorm2d(6)}
    return Net(lambda m, x: F.relu(m.k(m.b(F.relu(m.n(m.a(x)))))), a=first, b=second, **norms)


def check(model: nn.Module, x: Tensor, strategy: str = "auto") -> Folded:
    """Fold, and hold the result to the model in float64; also at another batch size."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batchnorm(model, (x,), strategy=strategy)  # type: ignore[arg-type]
    border = torch.randn_like(x)
    if x.dim() > 2:
        border[(slice(None), slice(None), *[slice(1, -1)] * (x.dim() - 2))] = 0
    for inputs in (x, torch.randn_like(x) * 3, border, torch.cat([x, border])[: len(x) + 1]):
        with torch.no_grad():
            wanted, found = model(inputs), folded.module(inputs)
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-12
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the model was changed"
    return folded


def methods(folded: Folded) -> dict[str, str]:
    return {norm.name: norm.method for norm in folded.report.folded} | {n.name: "kept" for n in folded.report.kept}


IMAGE = image(3, 4, 9, 11)

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "1 after a convolution": (lambda: nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU()), IMAGE, {"1": BEFORE}),
    "1 without bias or affine": (
        lambda: nn.Sequential(conv(4, 6, bias=False), nn.BatchNorm2d(6, affine=False)),
        IMAGE,
        {"1": BEFORE},
    ),
    "1 after a depthwise convolution": (
        lambda: nn.Sequential(conv(4, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU()),
        IMAGE,
        {"1": BEFORE},
    ),
    "1 after a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)),
        IMAGE,
        {"1": BEFORE},
    ),
    "1 after a grouped transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)),
        IMAGE,
        {"1": BEFORE},
    ),
    "1 after Linear": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()),
        image(4, 5),
        {"1": BEFORE},
    ),
    "1 one dimension": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=2, dilation=2), nn.BatchNorm1d(6)),
        image(3, 4, 12),
        {"1": BEFORE},
    ),
    "1 three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)),
        image(2, 2, 5, 6, 7),
        {"1": BEFORE},
    ),
    "1 functional": (
        lambda: Net(
            lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias),
            c=conv(4, 5),
            n=nn.BatchNorm2d(5),
        ),
        IMAGE,
        {"batch_norm": BEFORE},
    ),
    "2 after another BatchNorm": (
        lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()),
        IMAGE,
        {"1": AFTER, "2": "kept"},
    ),
    "3 through average pooling": (
        lambda: nn.Sequential(conv(4, 6), nn.AvgPool2d(2), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE,
        {"2": BEFORE},
    ),
    "3 through resizing": (
        lambda: nn.Sequential(conv(4, 6), nn.Upsample(scale_factor=2, mode="bilinear"), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE,
        {"2": BEFORE},
    ),
    "3 through a concatenation": (
        lambda: Net(
            lambda m, x: F.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))), a=conv(4, 3), b=conv(4, 5, 1), n=nn.BatchNorm2d(8)
        ),
        IMAGE,
        {"n": BEFORE},
    ),
    "3 through a sum": (
        lambda: Net(lambda m, x: F.relu(m.n(m.a(x) + m.b(x))), a=conv(4, 5), b=conv(4, 5, 1), n=nn.BatchNorm2d(5)),
        IMAGE,
        {"n": BEFORE},
    ),
    "4 before a convolution without padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 6, 3, padding=0)),
        IMAGE,
        {"0": AFTER},
    ),
    "4 before 1x1, read twice": (
        lambda: Net(lambda m, x: m.a(y := m.n(x)) + m.b(y), n=nn.BatchNorm2d(4), a=conv(4, 5, 1), b=conv(4, 5, 1)),
        IMAGE,
        {"n": AFTER},
    ),
    "4 before a depthwise convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 8, 3, padding=0, groups=4), nn.ReLU()),
        IMAGE,
        {"0": AFTER},
    ),
    "4 reflected padding": (
        lambda: nn.Sequential(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5, padding_mode="reflect")),
        IMAGE,
        {"2": AFTER},
    ),
    "4 repeated padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 5, 5, padding_mode="replicate", stride=2)),
        IMAGE,
        {"0": AFTER},
    ),
    "4 circular padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 5, 3, padding_mode="circular")),
        IMAGE,
        {"0": AFTER},
    ),
    "4 Linear through flatten": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(396, 7)),
        IMAGE,
        {"0": AFTER},
    ),
    "4 Linear through view": (
        lambda: Net(lambda m, x: m.l(m.n(x).view(x.size(0), -1)), n=nn.BatchNorm2d(4), l=nn.Linear(396, 7)),
        IMAGE,
        {"n": AFTER},
    ),
    "4 Linear after ReLU": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)),
        image(4, 5),
        {"2": AFTER},
    ),
    "4 through global average": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGE,
        {"0": AFTER},
    ),
    "4 through a mean": (
        lambda: Net(lambda m, x: m.l(m.n(x).mean((2, 3))), n=nn.BatchNorm2d(4), l=nn.Linear(4, 3)),
        IMAGE,
        {"n": AFTER},
    ),
    "5 chain of BatchNorms into a layer": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), conv(4, 3, 1)),
        IMAGE,
        {"0": AFTER, "1": AFTER, "2": AFTER},
    ),
    "6 one part of a concatenation": (
        lambda: Net(
            lambda m, x: m.c(torch.cat([x, m.n(F.relu(m.a(x))), x], 1)),
            a=conv(4, 3),
            n=nn.BatchNorm2d(3),
            c=conv(11, 5, 1),
        ),
        IMAGE,
        {"n": AFTER},
    ),
    "6 two parts of a concatenation": (
        lambda: Net(
            lambda m, x: m.c(torch.cat([F.avg_pool2d(y := m.n(x), 3, 1, 1, count_include_pad=False), y], 1)),
            n=nn.BatchNorm2d(4),
            c=conv(8, 5, 1),
        ),
        IMAGE,
        {"n": AFTER},
    ),
    "7 ones channel": (
        lambda: nn.Sequential(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU()),
        IMAGE,
        {"2": ONES},
    ),
    "7 through SiLU and max pooling": (
        lambda: nn.Sequential(
            conv(4, 6, bias=False),
            nn.SiLU(),
            nn.MaxPool2d(2, padding=1),
            nn.BatchNorm2d(6),
            conv(6, 5, 5, stride=2, dilation=1),
        ),
        IMAGE,
        {"3": ONES},
    ),
    "7 from Linear-free transposed layers": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 5, 2), nn.ReLU(), nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 3, 3, 2, 1)
        ),
        IMAGE,
        {"2": ONES},
    ),
    "7 padding as an operation of its own": (
        lambda: nn.Sequential(
            conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), nn.ZeroPad2d((2, 0, 1, 3)), conv(6, 5, 3, padding=0)
        ),
        IMAGE,
        {"2": ONES},
    ),
    "7 average pooling that counts its padding": (
        lambda: nn.Sequential(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), nn.AvgPool2d(3, 2, 1), conv(6, 5, 1)),
        IMAGE,
        {"2": ONES},
    ),
    "7 other readers look past the ones": (
        lambda: Net(
            lambda m, x: m.c(m.n(y := F.relu(m.a(x)))) + m.b(y),
            a=conv(4, 6),
            n=nn.BatchNorm2d(6),
            b=conv(6, 5),
            c=conv(6, 5),
        ),
        IMAGE,
        {"n": ONES},
    ),
    "7 same padding": (
        lambda: nn.Sequential(
            conv(4, 6, padding="same"), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 4, padding="same", dilation=2)
        ),
        IMAGE,
        {"2": ONES},
    ),
    "8 on the network's input": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 6, stride=2), nn.ReLU()),
        IMAGE,
        {"0": MAP},
    ),
    "8 before a depthwise convolution": (
        lambda: nn.Sequential(conv(4, 6), nn.SiLU(), nn.BatchNorm2d(6), conv(6, 6, groups=6), nn.ReLU()),
        IMAGE,
        {"2": MAP},
    ),
    "8 after a sum": (
        lambda: Net(
            lambda m, x: m.c(m.n(F.relu(m.a(x) + m.b(x)))),
            a=conv(4, 6),
            b=conv(4, 6),
            n=nn.BatchNorm2d(6),
            c=conv(6, 5),
        ),
        IMAGE,
        {"n": MAP},
    ),
    "8 one part of a concatenation": (
        lambda: Net(lambda m, x: m.c(torch.cat([x, m.n(torch.sigmoid(x)), x], 1)), n=nn.BatchNorm2d(4), c=conv(12, 5)),
        IMAGE,
        {"n": MAP},
    ),
    "8 flattened zeros": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(572, 3)),
        IMAGE,
        {"0": MAP},
    ),
    "9 floor before a sum": (
        lambda: Net(lambda m, x: x[:, :1] + m.n(F.relu(m.a(x))), a=conv(4, 6), n=nn.BatchNorm2d(6)),
        IMAGE,
        {"n": FLOOR},
    ),
    "9 floor at the network's output": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6)),
        image(4, 5),
        {"2": FLOOR},
    ),
    "refused: statistics of the batch": (
        lambda: nn.Sequential(conv(4, 6), nn.BatchNorm2d(6, track_running_stats=False)),
        IMAGE,
        {"1": "kept"},
    ),
    "refused: the input is read elsewhere": (
        lambda: Net(lambda m, x: F.relu(m.n(y := m.a(x))) + y, a=conv(4, 6), n=nn.BatchNorm2d(6)),
        IMAGE,
        {"n": "kept"},
    ),
    "1 after a channel shuffle": (
        lambda: Net(lambda m, x: F.relu(m.n(m.b(shuffled(m.a(x))))), a=conv(4, 6), b=conv(6, 6), n=nn.BatchNorm2d(6)),
        IMAGE,
        {"n": BEFORE},
    ),
    "1 a bias that another layer reads too": (tied_bias, IMAGE, {"n": BEFORE, "k": BEFORE}),
    "1 shared weights, of which it gets a copy": (
        lambda: Net(lambda m, x: F.relu(m.n(m.a(x))) + m.a(x), a=conv(4, 6), n=nn.BatchNorm2d(6)),
        IMAGE,
        {"n": BEFORE},
    ),
    "refused: no layer before, none after": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), IMAGE, {"0": "kept"}),
    "refused: a softmax over channels": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Softmax(1), conv(4, 3)),
        IMAGE,
        {"0": "kept"},
    ),
    "refused: max pooling with negative scales": (
        lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), nn.MaxPool2d(2), conv(4, 3, 1)),
        IMAGE,
        {"1": "kept"},
    ),
    "refused: Linear over another axis": (
        lambda: nn.Sequential(nn.Linear(11, 6), nn.BatchNorm2d(4), nn.Softmax(1)),
        IMAGE,
        {"1": "kept"},
    ),
    "3 through a concatenation along another axis": (
        lambda: Net(
            lambda m, x: F.relu(m.n(torch.cat([m.a(x), m.b(x)], 2))), a=conv(4, 3), b=conv(4, 3), n=nn.BatchNorm2d(3)
        ),
        IMAGE,
        {"n": BEFORE},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    build, x, expected = CASES[case]
    strategy = {"7": "ones", "8": "bias-map", "9": "floor"}.get(case[0], "auto")
    torch.manual_seed(0)
    folded = check(enliven(build(), x), x, strategy)
    assert methods(folded) == expected
    kept = {norm.name for norm in folded.report.kept}
    left = sum(node.target is torch.ops.aten.batch_norm.default for node in folded.module.graph.nodes)
    assert left == len(kept)
    assert all(norm.reason for norm in folded.report.kept)


@pytest.mark.parametrize(("strategy", "method"), [("ones", ONES), ("bias-map", MAP), ("floor", FLOOR)])
def test_each_strategy_alone(strategy: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 6), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.ReLU())
    folded = check(enliven(model, IMAGE), IMAGE, strategy)
    assert methods(folded) == {"3": method}


def test_strategy_none_folds_nothing() -> None:
    folded = check(enliven(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)), IMAGE), IMAGE, "none")
    assert methods(folded) == {"1": "kept"}


def test_positive_scales_pass_max_pooling() -> None:
    model = enliven(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), conv(4, 3, 1)), IMAGE)
    model[1].weight.data.abs_()  # type: ignore[index,union-attr,operator]
    assert methods(check(model, IMAGE)) == {"1": AFTER}


def test_floor_keeps_negative_scales_with_a_minimum() -> None:
    """At the output nothing can take the signs, so the ReLU becomes a maximum and a minimum per channel."""
    folded = check(enliven(nn.Sequential(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE), IMAGE, "all")
    targets = {node.target for node in folded.module.graph.nodes}
    assert {torch.ops.aten.maximum.default, torch.ops.aten.minimum.default} <= targets


def test_the_naive_fold_would_show_at_the_border() -> None:
    """The comparison used here has teeth: shift into the bias alone is wrong at the border and nowhere else."""
    from export.fold import algebra
    from export.fold.operations import Layer

    torch.manual_seed(0)
    model = enliven(nn.Sequential(nn.BatchNorm2d(4), conv(4, 6)), IMAGE)
    norm, layer = model[0], model[1]  # type: ignore[index]
    scale, shift = algebra.affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    read = Layer(layer.weight, layer.bias, 2, (1, 1), ((1, 1), (1, 1)), (1, 1))
    naive = algebra.scale_input(algebra.shift_input(read, shift), scale)
    with torch.no_grad():
        error = (naive.evaluate(IMAGE) - model(IMAGE)).abs()
    assert float(error[..., 1:-1, 1:-1].max()) < 1e-12
    assert float(error[..., 0, :].max()) > 0.1


@pytest.mark.parametrize("method", [BEFORE, ONES, MAP, FLOOR])
def test_a_wrong_fold_is_undone_and_reported(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong channel in what a fold makes is caught by the fold's own check, whatever the way."""
    from dataclasses import replace

    from export.fold import search
    from export.fold.operations import Layer
    from export.fold.plan import Plan

    real = search.apply

    def spoil(plan: Plan) -> float:
        for node, op in plan.changes.items():
            if isinstance(op, Layer):
                weight = op.weight.detach().clone()
                weight[0] += 1e-6
                plan.changes[node] = replace(op, weight=weight)
                break
        return real(plan)

    monkeypatch.setattr(search, "apply", spoil)
    torch.manual_seed(0)
    tail = [nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5)] if method != BEFORE else [nn.BatchNorm2d(6)]
    strategy = {ONES: "ones", MAP: "bias-map", FLOOR: "floor"}.get(method, "none" if method == MAP else "auto")
    folded = check(enliven(nn.Sequential(conv(4, 6), *tail), IMAGE), IMAGE, strategy)
    assert set(methods(folded).values()) == {"kept"}
    assert "undone" in folded.report.kept[0].reason


def test_a_fold_that_only_the_whole_shows_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a fold's own check blind, the comparison of the whole would find the fold, and only that one goes."""
    from export.fold import neighbours, search

    monkeypatch.setattr(neighbours.Sink, "needs_border", False)
    monkeypatch.setattr(search, "relative", lambda found, wanted: 0.0)
    torch.manual_seed(0)
    layers = [conv(4, 6), nn.BatchNorm2d(6), nn.SiLU(), nn.BatchNorm2d(6), conv(6, 5), nn.SiLU(), nn.BatchNorm2d(5)]
    folded = check(enliven(nn.Sequential(*layers, conv(5, 4, 1)), IMAGE), IMAGE)
    assert methods(folded) == {"1": BEFORE, "3": "kept", "6": AFTER}
    (kept,) = folded.report.kept
    assert "undone" in kept.reason

"""BatchNorms inside regions: autocast, gradient modes, branches and loops that the graph holds as graphs of their own.

They were missing from the report, neither folded nor kept, and stayed in the file in silence. Whether a fold reaches
into a region is its own choice; that each BatchNorm is named once, and that the region still does what it did, is not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Net, conv, fold_exactly, image
from networks import enliven
from torch import Tensor, nn
from torch._higher_order_ops.map import map as each
from torch._higher_order_ops.while_loop import while_loop

IMAGE = image(3, 4, 5, 7)


def net(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    """Two convolutions, `a` and `b`, and a BatchNorm for each, `n` and `k`, brought to life without any region."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.k(m.b(m.n(m.a(x)))), a=conv(4, 6), n=nn.BatchNorm2d(6), b=conv(6, 6), k=nn.BatchNorm2d(6)
    )
    enliven(model, IMAGE)
    model.body = forward
    return model


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


# -- autocast and gradient modes -------------------------------------------------------------------------------------


def first_half(m: Net, x: Tensor) -> Tensor:
    with autocast():
        y = F.relu(m.n(m.a(x)))
    return m.k(m.b(y.to(x.dtype)))


def second_half(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.n(m.a(x)))
    with autocast():
        return m.k(m.b(y))


def everything(m: Net, x: Tensor) -> Tensor:
    with autocast():
        return m.k(m.b(F.relu(m.n(m.a(x)))))


def switched_off(m: Net, x: Tensor) -> Tensor:
    with autocast(enabled=False):
        return m.k(m.b(F.relu(m.n(m.a(x)))))


def norms_alone(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    with autocast():
        y = F.relu(m.n(y))
    y = m.b(y.to(x.dtype))
    with autocast(enabled=False):
        return m.k(y)


def layers_alone(m: Net, x: Tensor) -> Tensor:
    with autocast():
        y = m.a(x)
    y = m.n(y.to(x.dtype))
    with autocast():
        y = m.b(F.relu(y))
    return m.k(y.to(x.dtype))


def after_the_activation(m: Net, x: Tensor) -> Tensor:
    """A channel of ones, a map or a maximum would have to cross the wall of a region."""
    with autocast():
        y = m.n(F.relu(m.a(x)))
    return m.k(F.relu(m.b(y.to(x.dtype))))


def with_gradient(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.n(m.a(x))
    return m.k(m.b(y))


def without_gradient(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.n(m.a(x))
    return m.k(m.b(y))


def by_set_grad_enabled(m: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(True):
        y = F.relu(m.n(m.a(x)))
    return m.k(m.b(y))


def for_inference(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return m.k(m.b(m.n(m.a(x))))


def nested(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.n(m.a(x))
        with autocast():
            y = m.b(y)
            with torch.no_grad():
                return m.k(y)


def one_norm_in_and_out(m: Net, x: Tensor) -> Tensor:
    """Two outputs of one region, one of them the BatchNorm's input."""
    with torch.enable_grad():
        y = m.a(x)
        h = m.n(y)
    return m.k(m.b(h)) + y


def written_into_inside(m: Net, x: Tensor) -> Tensor:
    """The write into the BatchNorm's input stands in another graph than its reader."""
    y = m.a(x)
    h = m.n(y)
    with torch.enable_grad():
        y.mul_(2)
    return m.k(m.b(h)) + y


def written_into_outside(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.enable_grad():
        h = m.n(y)
    h.relu_()
    return m.k(m.b(h)) + y


REGIONS = [first_half, second_half, everything, switched_off, norms_alone, layers_alone, after_the_activation,
           with_gradient, without_gradient, by_set_grad_enabled, for_inference, nested, one_norm_in_and_out,
           written_into_inside, written_into_outside]  # fmt: skip


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("strategy", ["auto", "ones"])
def test_norms_in_regions(region: Callable[[Net, Tensor], Tensor], strategy: str) -> None:
    """In float64, which autocast leaves alone."""
    fold_exactly(net(region), IMAGE, strategy=strategy)


AUTOCAST = [first_half, second_half, everything, switched_off, norms_alone, layers_alone, after_the_activation]


@pytest.mark.parametrize("region", AUTOCAST)
def test_autocast_still_casts(region: Callable[[Net, Tensor], Tensor]) -> None:
    """In float32, where a region that is lost or grows shows in the result's dtype, or in its digits."""
    model = net(region).float()
    # bfloat16 has eight bits, and folded weights are rounded elsewhere than unfolded ones.
    fold_exactly(model, IMAGE.float(), tolerance=0.05 if region is not switched_off else 1e-5)


# -- branches and loops ----------------------------------------------------------------------------------------------


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(conv(i, o), nn.BatchNorm2d(o))


def by_value(m: Net, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, m.yes, m.no, (m.n(x),))


def by_size(m: Net, x: Tensor) -> Tensor:
    return torch.cond(x.shape[0] > 3, m.yes, m.no, (m.n(x),))


def one_sided(m: Net, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: m.yes(m.n(y)), lambda y: m.no[0](y) * 2, (x,)) + m.no[1](m.no[0](x))


def around(m: Net, x: Tensor) -> Tensor:
    """The branch ends in a layer, and the BatchNorm comes after either."""
    return m.last(torch.cond(x.sum() > 0, m.yes, m.no, (m.n(x),)))


def mapped(m: Net, x: Tensor) -> Tensor:
    return m.yes(m.n(x)) + m.no(each(lambda y: m.n(y[None])[0], x))


def looped(m: Net, x: Tensor) -> Tensor:
    def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, m.n(m.square(y))

    return m.yes(while_loop(lambda i, y: i < 2, step, (torch.zeros((), dtype=torch.long), x))[1]) + m.no(x)


BRANCHES = {by_value: 3, by_size: 3, one_sided: 3, around: 4, mapped: 4, looped: 3}
"""How many BatchNorms stand in the graphs of each."""


@pytest.mark.parametrize("program", BRANCHES)
def test_norms_in_branches_and_loops(program: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    parts = {"yes": block(4, 6), "no": block(4, 6), "n": nn.BatchNorm2d(4), "square": conv(4, 4, 1)}
    model = Net(lambda m, x: m.last(m.yes(m.n(x)) + m.no(m.n(m.square(x)))), **parts, last=nn.BatchNorm2d(6))
    enliven(model, IMAGE)
    model.body = program
    fold_exactly(model, IMAGE, others=[(-IMAGE,)], norms=BRANCHES[program])

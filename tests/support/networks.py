"""Networks whose BatchNorms matter: bringing one to life, and drawing small ones at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Draw = Callable[[int, int], int]
"""A whole number between two, both included."""


def enliven(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """Make every BatchNorm do something, in float64 and eval mode, and keep the signals alive.

    A fresh BatchNorm is the identity and hides every mistake. Here gamma has both signs and a zero, beta is random, and
    the running statistics are those of the data that arrives, layer by layer, so that nothing dies out on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.eval().double()

    def measure(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        (x,) = arguments
        if norm.affine:
            gamma = 0.5 + torch.rand(norm.num_features, generator=generator, dtype=torch.float64)
            gamma *= torch.where(torch.rand(norm.num_features, generator=generator) < 0.5, -1.0, 1.0)
            if norm.num_features > 3:
                gamma[3] = 0
            norm.weight.data.copy_(gamma)
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator, dtype=torch.float64))
        if norm.track_running_stats:
            others = [axis for axis in range(x.dim()) if axis != 1]
            norm.running_mean.copy_(x.mean(others))
            norm.running_var.copy_(x.var(others, unbiased=False) + 0.1)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return model


class RandomNetwork(nn.Module):
    """A program of modules over named values: each step is (module, or "add", "cat"; the values it reads)."""

    def __init__(self, steps: list[tuple[nn.Module | str, tuple[int, ...]]], outputs: tuple[int, ...]) -> None:
        super().__init__()
        unique = list(dict.fromkeys(module for module, _ in steps if isinstance(module, nn.Module)))
        self.parts = nn.ModuleList(unique)
        self.steps = [(unique.index(m) if isinstance(m, nn.Module) else m, reads) for m, reads in steps]
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for what, reads in self.steps:
            read = [values[index] for index in reads]
            if what == "add":
                values.append(read[0] + read[1])
            elif what == "cat":
                values.append(torch.cat(read, 1))
            else:
                assert isinstance(what, int)
                values.append(self.parts[what](read[0]))
        return tuple(values[index] for index in self.outputs)


class Functional(nn.Module):
    """An operation without weights."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def random_network(draw: Draw, adaptive: bool = True) -> tuple[nn.Module, Tensor]:
    """A small network of random layers, order, padding, stride, groups, branches, residuals and shared modules.

    `adaptive` allows pooling to any size, which ONNX has no operator for. Returns it, in float64 and eval mode with
    BatchNorms that matter, and an example input of batch 3.
    """

    def pick(options: list[object]) -> object:
        return options[draw(0, len(options) - 1)]

    steps: list[tuple[nn.Module | str, tuple[int, ...]]] = []
    shapes: list[tuple[int, ...]] = [(draw(1, 4), draw(5, 8), draw(5, 8))]
    reusable: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []
    torch.manual_seed(draw(0, 10_000))
    current = 0

    def push(module: nn.Module | str, reads: tuple[int, ...], shape: tuple[int, ...]) -> int:
        steps.append((module, reads))
        shapes.append(shape)
        return len(shapes) - 1

    def measure(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        try:
            with torch.no_grad():
                result = module.eval()(torch.zeros(2, *shape))
        except RuntimeError:  # a kernel larger than its input: another step is drawn
            return None
        return tuple(result.shape[1:]) if result.numel() else None

    planned: list[int] = []
    for _ in range(draw(3, 12)):
        shape = shapes[current]
        channels = shape[0]
        spatial = len(shape) == 3
        if not planned and draw(0, 3) == 0:
            # The order that folding is for: layer, activation, sometimes a pool, BatchNorm, layer.
            planned = [5, 9, *([11] if draw(0, 2) == 0 else []), 0, 5]
        kind = planned.pop(0) if planned else draw(0, 15)
        module: nn.Module | None = None
        if kind <= 4:
            module = nn.BatchNorm2d(channels, affine=draw(0, 4) > 0) if spatial else nn.BatchNorm1d(channels)
        elif kind <= 8 and spatial:
            groups = pick([1, 1, 1, channels])
            assert isinstance(groups, int)
            out = groups * draw(1, 2) if groups > 1 else draw(1, 5)
            options = {"stride": draw(1, 2), "dilation": draw(1, 2), "groups": groups, "bias": draw(0, 1) == 1}
            if draw(0, 5) == 0:
                module = nn.ConvTranspose2d(channels, out, draw(1, 3), padding=draw(0, 1), **options)  # type: ignore[arg-type]
            else:
                mode = pick(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
                module = nn.Conv2d(channels, out, draw(1, 3), padding=draw(0, 2), padding_mode=mode, **options)  # type: ignore[arg-type]
        elif kind <= 8:
            module = nn.Linear(channels, draw(2, 5), bias=draw(0, 1) == 1)
        elif kind <= 10:
            choices = [
                nn.ReLU(),
                nn.ReLU(inplace=True),
                nn.LeakyReLU(0.2),
                nn.SiLU(),
                nn.Sigmoid(),
                nn.Hardtanh(),
                nn.Dropout(),
            ]
            module = pick([*choices, nn.PReLU(), nn.Softmax(1), nn.Tanh()])  # type: ignore[assignment]
        elif kind <= 12 and spatial:
            size, stride, padding = draw(1, 3), draw(1, 2), draw(0, 1)
            padding = min(padding, size // 2)
            include = draw(0, 1) == 1
            choices = [
                nn.MaxPool2d(size, stride, padding, ceil_mode=draw(0, 1) == 1),
                nn.AvgPool2d(size, stride, padding, count_include_pad=include, ceil_mode=draw(0, 1) == 1),
                nn.Upsample(scale_factor=2, mode=str(pick(["nearest", "bilinear"]))),
                nn.ZeroPad2d((draw(0, 1), draw(0, 1), draw(0, 1), draw(0, 1))),
                nn.AdaptiveAvgPool2d(draw(1, 3) if adaptive else 1),
                nn.AdaptiveMaxPool2d(2 if adaptive else 1),
                Functional("mean", lambda x: x.mean((2, 3))),
                nn.Flatten(),
                Functional("view", lambda x: x.view(x.size(0), -1)),
                Functional("flip", lambda x: x.flip(1)),
            ]
            module = pick(choices)  # type: ignore[assignment]
        elif kind == 13:
            same = [i for i, other in enumerate(shapes) if other == shape]
            current = push("add", (current, same[draw(0, len(same) - 1)]), shape)
            continue
        elif kind == 14:
            fitting = [i for i, other in enumerate(shapes) if len(other) == len(shape) and other[1:] == shape[1:]]
            other = fitting[draw(0, len(fitting) - 1)]
            current = push("cat", (current, other), (channels + shapes[other][0], *shape[1:]))
            continue
        else:
            fits = [(m, after) for m, before, after in reusable if before == shape]
            if fits and draw(0, 1):
                module, after = fits[draw(0, len(fits) - 1)]
                current = push(module, (current,), after)
            else:
                current = draw(0, len(shapes) - 1)  # go on from an earlier value: a branch
            continue
        if module is None:
            continue
        after = measure(module, shape)
        if after is None:
            continue
        if any(True for _ in module.parameters()):
            reusable.append((module, shape, after))
        current = push(module, (current,), after)
    outputs = {len(shapes) - 1, current}
    read = {index for _, reads in steps for index in reads}
    outputs |= {index for index in range(1, len(shapes)) if index not in read}
    network = RandomNetwork(steps, tuple(sorted(outputs)))
    generator = torch.Generator().manual_seed(draw(0, 10_000))
    example = torch.randn(3, *shapes[0], generator=generator, dtype=torch.float64)
    return enliven(network, example, seed=draw(0, 10_000)), example


def difference(model: nn.Module, folded: nn.Module, *inputs: Tensor) -> float:
    """Largest difference between the outputs of two networks, relative to the output's largest value.

    Values below 1e-3 count as 1e-3: what a softmax over one channel, say, leaves of a signal is rounding noise alone.
    """
    with torch.no_grad():
        wanted, found = model(*(x.clone() for x in inputs)), folded(*(x.clone() for x in inputs))
    pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
    return max(float((b - a).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)

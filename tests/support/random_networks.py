"""Torch networks drawn at random, step by step; each step is tried on real data before it is taken.

A network is a program over named values, as a forward method is: a name may be read twice, written into in place, be a
view of another, or be returned. What the eager run of such a program does to its values is what a fold must keep, so
nothing here avoids aliases. BatchNorms are woken by the data that arrives at them, see `enliven`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import spellings
import torch
import torch.nn.functional as F
from choosing import LARGEST, MOST_ELEMENTS, Chooser, Draw
from enliven import BatchNorm, wake
from programs import Branches, Functional, Moving, Network, Program, Region, Step, entered
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# -- drawing ---------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "norm": 7,
    "layer": 7,
    "activation": 4,
    "pool": 2,
    "view": 5,
    "in-place": 5,
    "combine": 3,
    "constants": 3,
    "odd": 1,
    "reuse": 1,
    "earlier": 3,
    "region": 1,
    "condition": 1,
    "pattern": 13,
}

PLAIN = {"norm": 5, "layer": 4, "activation": 2, "pool": 2, "combine": 2, "reuse": 1, "earlier": 1, "pattern": 1}
"""What every exporter takes: no aliases, no regions."""


@dataclass
class Drawn:
    """A network in float64 and eval mode, and what it is to be folded with.

    Attributes:
        inputs: an example, in float64, which the dtype's precision holds without rounding.
        sizes: which sizes are symbolic: ``"default"``, ``"batch"``, ``"all"`` or ``"fixed"``.
        stateful: forward changes a buffer.
    """

    network: Network
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype
    sizes: str
    stateful: bool = False

    @property
    def dynamic_shapes(self) -> Any:
        auto, batch = torch.export.Dim.AUTO, torch.export.Dim("batch")
        if self.sizes == "default":
            return None
        if self.sizes == "batch":
            return tuple({0: batch} for _ in self.inputs)
        if self.sizes == "fixed":
            return tuple({} for _ in self.inputs)
        return tuple({0: auto, **dict.fromkeys(range(2, x.dim()), auto)} for x in self.inputs)

    def features(self) -> set[str]:
        found = self.network.labels() | {str(self.dtype).removeprefix("torch."), f"sizes: {self.sizes}"}
        found |= {"several outputs"} if len(self.network.outputs) > 1 else set()
        found |= {"two inputs"} if len(self.inputs) > 1 else set()
        found |= {"forward changes a buffer"} if self.stateful else set()
        return found | ({"channels last"} if any(not x.is_contiguous() for x in self.inputs) else set())


def draw_network(draw: Draw) -> Drawn:
    """Any network: its dtype, which of its sizes are symbolic, and a program of everything that is known here."""
    choose = Chooser(draw)
    dtype = DTYPES[choose.weighted({"float64": 12, "float32": 3, "float16": 3, "bfloat16": 2})]
    sizes = choose.weighted({"default": 5, "batch": 1, "all": 2, "fixed": 2})
    while True:
        torch.manual_seed(choose.number(0, 1_000_000))
        batch = 1 if sizes == "fixed" and choose.one_in(3) else 3
        inputs = _example(choose, batch, dtype)
        builder = Builder(choose, inputs, EVERYTHING, dtype)
        network = builder.build(choose.number(3, 12))
        if network is not None and network.norms():
            return Drawn(network, inputs, dtype, sizes, builder.stateful)


def random_network(draw: Draw, adaptive: bool = True) -> tuple[Network, Tensor]:
    """A small network of plain layers, in float64 and eval mode, and an example input of batch 3.

    `adaptive` allows pooling to any size, which ONNX has no operator for.
    """
    choose = Chooser(draw)
    torch.manual_seed(choose.number(0, 1_000_000))
    while True:
        x = torch.randn(3, choose.number(1, 4), choose.number(5, 8), choose.number(5, 8), generator=choose.generator())
        builder = Builder(choose, (x.double(),), PLAIN, torch.float64, adaptive=adaptive)
        network = builder.build(choose.number(3, 12))
        if network is not None:
            return network, x.double()


def _example(choose: Chooser, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rank = int(choose.weighted({"2": 12, "1": 3, "0": 1, "3": 1}))
    smallest, largest = (3, 4) if rank == 3 else (5, 8)
    shape = (batch, choose.number(1, 4), *(choose.number(smallest, largest) for _ in range(rank)))
    count = 2 if choose.one_in(6) else 1
    inputs = [torch.randn(shape, generator=choose.generator(), dtype=torch.float64) for _ in range(count)]
    if rank == 2 and choose.one_in(8):
        inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    return tuple(x.to(dtype).double() for x in inputs)


@dataclass
class Builder:
    """A program in the making: every step has run on `values`, which are what the eager run makes of the example."""

    choose: Chooser
    inputs: tuple[Tensor, ...]
    kinds: Mapping[str, int]
    dtype: torch.dtype
    adaptive: bool = True
    steps: list[Step] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    current: int = 0
    next_index: list[int] = field(default_factory=list)
    woken: set[nn.Module] = field(default_factory=set)
    layers: list[tuple[nn.Module, int]] = field(default_factory=list)
    around_norms: list[int] = field(default_factory=list)
    planned: list[Callable[[], Any]] = field(default_factory=list)
    stateful: bool = False
    conditions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.values:
            self.values = {index: x.clone() for index, x in enumerate(self.inputs)}
            self.next_index = [len(self.inputs)]
        self.given = set(self.values)

    @property
    def x(self) -> Tensor:
        return self.values[self.current]

    # -- the frame

    @torch.no_grad()
    def build(self, count: int) -> Network | None:
        self.extend(count)
        outputs = self.returned()
        if not outputs:
            return None
        form = self.choose.weighted({"tuple": 6, "list": 1, "dict": 1}) if self.kinds is EVERYTHING else "tuple"
        if len(outputs) == 1 and form == "tuple":
            form = self.choose.pick(["tensor", "tuple"])
        network = Network(range(len(self.inputs)), self.steps, outputs, form).eval()
        finite = all(
            t.isfinite().all() for t in pytree.tree_leaves(copy.deepcopy(network)(*map(torch.clone, self.inputs)))
        )
        return network if finite else None

    def extend(self, count: int) -> None:
        done, attempts = 0, 0
        while done < count and attempts < 6 * count:
            attempts += 1
            before = len(self.steps)
            action = self.planned.pop(0) if self.planned else self.action(self.choose.weighted(self.kinds))
            action()
            done += len(self.steps) - before

    def action(self, kind: str) -> Callable[[], Any]:
        return getattr(self, kind.replace("-", "_"))  # type: ignore[no-any-return]

    def returned(self) -> list[int]:
        """The last value and every one that nothing reads, and sometimes one from the middle."""
        made = [i for step in self.steps for i in step.makes if self.values[i].is_floating_point()]
        read = {i for step in self.steps for i in step.reads}
        outputs = [i for i in made if i not in read or i == self.current]
        if made and self.choose.one_in(4):
            outputs.append(self.choose.pick(made))
        if self.around_norms and self.choose.one_in(6):
            outputs.append(self.choose.pick(self.around_norms))
        if made and not outputs:
            outputs = made[-1:]
        return sorted(set(outputs) - self.given)

    def take(self, label: str, module: nn.Module, *reads: int) -> tuple[int, ...] | None:
        """Add a step if it runs and makes sound values; returns the values made, or None."""
        module.eval().double()
        hooks = [
            m.register_forward_pre_hook(lambda norm, arguments: self.wake(norm, arguments[0]))
            for m in module.modules()
            if isinstance(m, BatchNorm) and m not in self.woken
        ]
        try:
            copies = {index: self.values[index].clone() for index in reads}
            results = getattr(module, "rehearse", module)(*(copies[index] for index in reads))
            if not self.sound([*pytree.tree_leaves(results), *copies.values()]):
                return None
            results = module(*(self.values[index] for index in reads))
        except (RuntimeError, ValueError, IndexError, NotImplementedError):  # sizes that don't fit, for the most part
            return None
        finally:
            for hook in hooks:
                hook.remove()
        results = () if results is None else results if isinstance(results, tuple) else (results,)
        makes = tuple(self.name(result) for result in results)
        self.steps.append(Step(module, reads, makes, label))
        return makes

    def go(self, label: str, module: nn.Module, *reads: int) -> bool:
        """`take`, and go on from the first value made."""
        reads = reads or (self.current,)
        makes = self.take(label, module, *reads)
        if makes is None:
            return False
        self.current = makes[0] if makes else reads[0]
        if len(makes) > 1:
            self.current = self.choose.pick(makes)
        return True

    def function(self, label: str, name: str, function: Callable[..., Any], *reads: int, **constants: Tensor) -> bool:
        return self.go(label, Functional(name, function, constants), *reads)

    def name(self, value: Tensor) -> int:
        index = self.next_index[0]
        self.next_index[0] += 1
        self.values[index] = value
        return index

    def sound(self, tensors: Iterable[Any]) -> bool:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                return False
            if not 0 < tensor.numel() <= MOST_ELEMENTS or not torch.isfinite(tensor).all():
                return False
            if tensor.abs().max() > LARGEST:
                return False
            # What carries no signal hides what is wrong before it; a few may.
            if tensor.numel() > 1 and tensor.max() - tensor.min() < 1e-3 and not self.choose.one_in(6):
                return False
        return True

    def wake(self, norm: nn.Module, x: Tensor) -> None:
        if norm in self.woken:
            return
        self.woken.add(norm)
        wake(norm, x.detach(), self.choose.generator())
        if norm.affine and self.choose.one_in(20):
            norm.weight.data.zero_()  # as residual branches start, and some stay
        elif norm.affine and self.choose.one_in(6):
            norm.weight.data.abs_()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.choose.generator(), dtype=torch.float64)

    def channels_of(self, x: Tensor) -> tuple[int, ...]:
        """The shape of a constant for each channel."""
        return (
            (x.shape[1], *([1] * (x.dim() - 2))) if self.choose.one_in(2) else (1, x.shape[1], *([1] * (x.dim() - 2)))
        )

    def alike(self, x: Tensor) -> list[int]:
        return [i for i, value in self.values.items() if value.shape == x.shape and value.dtype == x.dtype]

    # -- steps that every network has

    def norm(self) -> bool:
        x, before = self.x, self.current
        if not 2 <= x.dim() <= 5:
            return False
        channels = x.shape[1]
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
        eps = self.choose.pick([1e-5, 1e-5, 1e-3])
        if self.kinds is not PLAIN and self.choose.one_in(12):
            done = self.functional_norm()
        elif self.kinds is not PLAIN and self.dtype == torch.float64 and self.choose.one_in(30):
            done = self.go("BatchNorm of the batch", kind(channels, track_running_stats=False))
        else:
            done = self.go("BatchNorm", kind(channels, eps=eps, affine=not self.choose.one_in(6)))
        if done:
            self.around_norms += [before, self.current]
        return done

    def functional_norm(self) -> bool:
        x, channels = self.x, self.x.shape[1]
        others = [axis for axis in range(x.dim()) if axis != 1]
        return self.go(
            "F.batch_norm",
            Functional(
                "F.batch_norm",
                lambda x, mean, var, weight, bias: F.batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-5),
                {
                    "mean": x.mean(others),
                    "var": x.var(others, unbiased=False) + 0.1,
                    "weight": self.random(channels),
                    "bias": self.random(channels),
                },
                trained=self.choose.one_in(2),
                is_norm=True,
            ),
        )

    def new_layer(self, x: Tensor, out: int | None = None, *, same_size: bool = False) -> nn.Module | None:
        """A convolution or Linear for `x`; `same_size` keeps the sizes behind the channel."""
        choose, channels, rank = self.choose, x.shape[1] if x.dim() > 1 else 1, x.dim() - 2
        if rank not in (1, 2, 3) or (rank == 1 and not same_size and choose.one_in(3)):
            return nn.Linear(x.shape[-1], out or choose.number(2, 6), bias=choose.one_in(2)) if x.dim() > 1 else None
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        if same_size:
            size = choose.pick([1, 3])
            return conv(channels, out or channels, size, padding=size // 2, bias=choose.one_in(2))  # type: ignore[no-any-return]
        groups = choose.pick([1, 1, 1, channels, *(g for g in (2, 3) if channels % g == 0)])
        out = out or (groups * choose.number(1, 2) if groups > 1 else choose.number(1, 6))
        if out % groups:
            groups = 1
        options: dict[str, Any] = {"dilation": choose.number(1, 2), "groups": groups, "bias": choose.one_in(2)}
        if choose.one_in(6):
            transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
            stride = choose.number(1, 2)
            options |= {"stride": stride, "output_padding": choose.number(0, 1) if stride > 1 else 0}
            return transposed(channels, out, choose.number(1, 3), padding=choose.number(0, 1), **options)  # type: ignore[no-any-return]
        size = tuple(choose.number(1, 3) for _ in range(rank)) if choose.one_in(4) else choose.number(1, 3)
        mode = choose.pick(["zeros", "zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        if choose.one_in(8):
            return conv(channels, out, size, padding="same", padding_mode=mode, **options)  # type: ignore[no-any-return]
        options |= {"stride": choose.number(1, 2), "padding": choose.number(0, 2), "padding_mode": mode}
        return conv(channels, out, size, **options)  # type: ignore[no-any-return]

    def layer(self, out: int | None = None, *, same_size: bool = False) -> bool:
        module, before = self.new_layer(self.x, out, same_size=same_size), self.current
        if module is None:
            return False
        label = type(module).__name__
        if self.kinds is not PLAIN and self.choose.one_in(15):
            module, label = nn.utils.parametrizations.weight_norm(module), "weight_norm"
        elif self.kinds is not PLAIN and self.choose.one_in(15) and isinstance(module, nn.Conv2d):
            return self.computed_weights(module)
        elif self.kinds is not PLAIN and self.choose.one_in(15):
            twins = [other for other, _ in self.layers if type(other) is type(module)]
            # Not of weights that a parametrization makes anew at each call.
            twins = [t for t in twins if t.weight.shape == module.weight.shape and not hasattr(t, "parametrizations")]
            if twins:
                module.weight, label = twins[0].weight, "tied weights"
        done = self.go(label, module)
        if done:
            self.layers.append((module, before))
        return done

    def padded(self) -> bool:
        """A convolution that reads a border of zeros: there, and nowhere else, a shift is not a bias."""
        choose, x, before = self.choose, self.x, self.current
        if not 3 <= x.dim() <= 5:
            return self.layer()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3]
        padding, stride, bias = choose.number(1, 2), choose.number(1, 2), choose.one_in(2)
        module = conv(x.shape[1], choose.number(2, 6), choose.number(2, 3), stride, padding, bias=bias)
        done = self.go(f"{conv.__name__}, padded", module)
        if done:
            self.layers.append((module, before))
        return done

    def computed_weights(self, conv: nn.Conv2d) -> bool:
        """A convolution whose weights are made from constants while the network runs."""
        out, groups = conv.weight.shape[0], conv.groups
        stride, dilation, padding = conv.stride, conv.dilation, self.choose.number(0, 1)
        return self.go(
            "computed weights",
            Functional(
                "conv2d of sliced, scaled weights",
                lambda x, weight, gain: F.conv2d(
                    x, weight[:out] * gain[:, None, None, None], None, stride, padding, dilation, groups
                ),
                {"weight": self.random(out + 2, *conv.weight.shape[1:]) * 0.5, "gain": self.random(out)},
                trained=True,
            ),
        )

    def activation(self, name: str = "") -> bool:
        choose, x = self.choose, self.x
        if self.kinds is not PLAIN and not name and choose.one_in(3):
            return self.spelled_activation()
        inplace = choose.one_in(3)
        options: list[nn.Module] = [
            nn.ReLU(inplace),
            nn.ReLU(inplace),
            nn.ReLU6(inplace),
            nn.LeakyReLU(0.2, inplace),
            nn.SiLU(inplace),
            nn.Sigmoid(),
            nn.Hardtanh(-0.7, 1.2, inplace),
            nn.Hardswish(inplace),
            nn.Hardsigmoid(inplace),
            nn.ELU(inplace=inplace),
            nn.GELU(),
            nn.Softplus(),
            nn.Tanh(),
            nn.Dropout(0.5, inplace),
            nn.PReLU(),
            nn.PReLU(x.shape[1] if x.dim() > 1 else 1),
            nn.Softmax(1),
        ]
        fitting = [m for m in options if type(m).__name__ == name] or options
        module = choose.pick(fitting)
        writes = inplace and getattr(module, "inplace", False)
        return self.go(f"{type(module).__name__}{', in place' if writes else ''}", module)

    def spelled_activation(self) -> bool:
        """As functions and methods."""
        name, function = self.choose.pick(spellings.ACTIVATIONS)
        return self.function(name, name, function)

    def pool(self) -> bool:
        choose, x = self.choose, self.x
        size, stride, padding, up = choose.number(1, 3), choose.number(1, 2), choose.number(0, 1), choose.one_in(2)
        padding = min(padding, size // 2)
        if x.dim() == 3:
            options: list[nn.Module] = [
                nn.MaxPool1d(size, stride, padding, ceil_mode=up),
                nn.AvgPool1d(size, stride, padding, ceil_mode=up, count_include_pad=choose.one_in(2)),
                nn.Upsample(scale_factor=2, mode=choose.pick(["nearest", "linear"])),
                nn.ConstantPad1d((choose.number(0, 2), choose.number(0, 1)), choose.pick([0.0, 0.0, 0.5])),
                Functional("mean", lambda x: x.mean(2)),
                nn.Flatten(),
                nn.AdaptiveAvgPool1d(1),
            ]
        elif x.dim() == 4:
            sides = tuple(choose.number(0, 1) for _ in range(4))
            options = [
                nn.MaxPool2d(size, stride, padding, ceil_mode=up),
                nn.AvgPool2d(size, stride, padding, ceil_mode=up, count_include_pad=choose.one_in(2)),
                nn.Upsample(scale_factor=2, mode=choose.pick(["nearest", "bilinear"])),
                nn.ZeroPad2d(sides),  # type: ignore[arg-type]
                nn.AdaptiveAvgPool2d(choose.number(1, 3) if self.adaptive else 1),
                nn.AdaptiveMaxPool2d(2 if self.adaptive else 1),
                Functional("mean", lambda x: x.mean((2, 3))),
                nn.Flatten(),
                Functional("view", lambda x: x.view(x.size(0), -1)),
                Functional("flip", lambda x: x.flip(1)),
            ]
            if self.kinds is not PLAIN:
                options += [
                    nn.AvgPool2d(2, 2, divisor_override=3),
                    nn.ConstantPad2d(sides, 0.5),  # type: ignore[arg-type]
                    nn.ReflectionPad2d(sides),  # type: ignore[arg-type]
                    Functional("crop", lambda x: F.pad(x, (-1, 0, 0, -1))),
                    Functional("more channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))),
                    Functional("amax", lambda x: x.amax((2, 3), keepdim=True)),
                    Functional("interpolate to a size", lambda x: F.interpolate(x, (7, 6))),
                    nn.PixelShuffle(2),
                    nn.PixelUnshuffle(2),
                ]
        elif x.dim() == 5:
            options = [nn.MaxPool3d(2, 1), nn.AvgPool3d(2, 1, padding), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
        else:
            return False
        module = choose.pick(options)
        return self.go(module.name if isinstance(module, Functional) else type(module).__name__, module)

    def combine(self) -> bool:
        choose, x = self.choose, self.x
        if choose.one_in(3):
            fitting = [
                i
                for i, v in self.values.items()
                if v.dim() == x.dim() > 1 and v.shape[0] == x.shape[0] and v.shape[2:] == x.shape[2:]
                and v.is_floating_point()
            ]  # fmt: skip
            reads = [self.current, choose.pick(fitting), *([choose.pick(fitting)] if choose.one_in(4) else [])]
            return self.function("cat", "cat", lambda *v: torch.cat(v, 1), *choose.pick([reads, reads[::-1]]))
        reads = [self.current, choose.pick(self.alike(x))]
        if self.kinds is PLAIN:
            return self.function("add", "add", lambda a, b: a + b, *reads)
        name, function = choose.pick(spellings.COMBINATIONS)
        return self.function(name, name, function, *choose.pick([reads, reads[::-1]]))

    def reuse(self) -> bool:
        """A layer once more, on another value; a BatchNorm of its own behind it, or the same one, comes by chance."""
        fits = [m for m, i in self.layers if self.values[i].shape[1:] == self.x.shape[1:]]
        if not fits:
            return False
        done = self.go("a module used twice", self.choose.pick(fits))
        if done and self.choose.one_in(2):
            self.planned.append(self.norm)
        return done

    def earlier(self) -> None:
        """Go on from another value: a branch, or a second reading of an input."""
        self.current = self.choose.pick([i for i, v in self.values.items() if v.is_floating_point()])

    # -- views and reshapes

    def view(self) -> bool:
        name, function = self.choose.pick(spellings.views(self.x, self.choose))
        return self.function(name, name, function)

    # -- writing in place

    def target(self) -> int:
        """What to write into: where a fold erases a BatchNorm its input and output become one, so these above all."""
        candidates = [i for i, v in self.values.items() if v.is_floating_point()]
        made = [i for i in candidates if i not in self.given]
        if self.around_norms and self.choose.one_in(3):
            return self.choose.pick(self.around_norms)  # type: ignore[no-any-return]
        if made and not self.choose.one_in(8):
            return self.current if self.choose.one_in(2) and self.current in made else self.choose.pick(made)
        return self.choose.pick(candidates)  # type: ignore[no-any-return]

    def in_place(self, target: int | None = None) -> bool:
        choose = self.choose
        target = self.target() if target is None else target
        x, current = self.values[target], self.current
        reads, constants = [target], {}
        if choose.one_in(3) and (others := [i for i in self.alike(x) if i != target]):
            name, function = choose.pick(spellings.WRITES_OF_A_VALUE)
            reads.append(choose.pick(others))
        elif choose.one_in(4):
            name, function = choose.pick(spellings.WRITES_OF_A_CONSTANT)
            constants = {"c": self.random(*self.channels_of(x))}
        else:
            name, function = choose.pick(spellings.WRITES)
        done = self.function(f"in place: {name}", name, function, *reads, **constants)
        if done and choose.one_in(2):
            self.current = current  # go on from where it was; the value written is read later, by some name, or not
        return done

    # -- arithmetic with constants

    def constants(self) -> bool:
        choose, x = self.choose, self.x
        if choose.one_in(3):
            name, function = choose.pick(spellings.ARITHMETIC)
            return self.function(f"arithmetic: {name}", name, function)
        name, function, values = choose.pick(spellings.with_constants(x, self.channels_of(x), self.random))
        return self.go(f"constants: {name}", Functional(name, function, values, trained=choose.one_in(2)))

    def odd(self) -> bool:
        """What folding must leave alone."""
        choose, x = self.choose, self.x
        if x.dim() < 3:
            return False
        channels, last = x.shape[1], x.shape[-1]
        positions = tuple(range(2, x.dim()))
        mask = torch.where(torch.arange(last) < choose.number(1, last), 0.0, -math.inf).double()
        modules: list[tuple[str, nn.Module]] = [
            ("squeeze and excitation", Functional("SE", lambda x: x * torch.sigmoid(x.mean(positions, keepdim=True)))),
            ("layer_norm", nn.LayerNorm(last)),
            ("group_norm", nn.GroupNorm(1, channels)),
            ("softmax with a mask", Functional("masked", lambda x, mask: F.softmax(x + mask, -1), {"mask": mask})),
            ("attention", Functional("attention", lambda x: torch.softmax(x @ x.transpose(-1, -2), -1) @ x)),
            ("x - x.mean", Functional("centred", lambda x: x - x.mean(1, keepdim=True))),
            ("dtype there and back", Functional("dtypes", lambda x: x.to(torch.float64).to(x.dtype))),
            ("cumsum", Functional("cumsum", lambda x: x.cumsum(-1) / 4)),
        ]
        if self.dtype == torch.float64 and x.dim() in (3, 4, 5):
            norm = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[x.dim()]
            modules.append(("instance norm with statistics", norm(channels, track_running_stats=True)))
        if not self.stateful:
            counter = Functional("counter", spellings.counted, {"counter": torch.zeros(())})
            modules.append(("forward changes a buffer", counter))
            if norms := [
                s.module for s in self.steps if isinstance(s.module, BatchNorm) and s.module.track_running_stats
            ]:
                norm_of = choose.pick(norms)
                modules.append(("forward changes statistics", Moving(norm_of, through_a_view=choose.one_in(2))))
        label, module = choose.pick(modules)
        done = self.go(label, module)
        self.stateful |= done and label.startswith("forward changes")
        return done

    # -- regions and branches

    def region(self) -> bool:
        kinds = {"autocast": 3 if self.dtype in (torch.float64, torch.float32) else 0, "enable_grad": 2, "no_grad": 1}
        kinds = {kind: weight for kind, weight in kinds.items() if weight}
        kind = self.choose.weighted(kinds)
        inner = Builder(
            self.choose,
            self.inputs,
            {k: w for k, w in self.kinds.items() if k not in ("region", "condition", "odd")},
            self.dtype,
            values=dict(self.values),
            next_index=self.next_index,
            woken=self.woken,
            layers=self.layers,
            around_norms=self.around_norms,
        )
        inner.current = self.current
        with entered(kind):
            inner.extend(self.choose.number(1, 4))
        if not inner.steps:
            return False
        read = [i for i in dict.fromkeys(i for step in inner.steps for i in step.reads) if i in inner.given]
        outputs = inner.returned()
        self.around_norms = [i for i in inner.around_norms if i in self.values or i in outputs]
        inside = {i for step in inner.steps for i in step.makes}
        self.layers = [(m, i) for m, i in inner.layers if i not in inside or i in outputs]
        self.values |= {i: inner.values[i] for i in outputs}
        self.steps.append(Step(Region(kind, Program(read, inner.steps, outputs)), tuple(read), tuple(outputs), kind))
        self.current = outputs[-1] if outputs else self.current
        return True

    def condition(self) -> bool:
        """torch.cond; each side ends in a layer, since the two must make tensors of the same sizes and strides."""
        x, choose = self.x, self.choose
        if not 2 <= x.dim() <= 4:
            return False
        if not self.conditions:
            # Of a single element of the input, which no rounding changes.
            element = Functional("x[0] > 0", lambda x: x[(0,) * x.dim()] > 0)
            index = self.name(element(self.inputs[0]))
            self.steps.insert(0, Step(element, (0,), (index,), "condition"))
            self.conditions.append(index)
        out = choose.number(2, 5)
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()]

        def side() -> nn.Module:
            first = [norm(x.shape[1])] if choose.one_in(3) else []
            layer = nn.Linear(x.shape[1], out) if x.dim() == 2 else self.new_layer(x, out, same_size=True)
            assert layer is not None
            after: list[nn.Module] = [norm(out)] if choose.one_in(2) else []
            after += [nn.ReLU()] if choose.one_in(2) else []
            return nn.Sequential(*first, layer, *after)

        return self.go("torch.cond", Branches(side(), side()), self.conditions[0], self.current)

    # -- orders that folding is for, or has been wrong on

    def pattern(self) -> None:
        choose, rank = self.choose, self.x.dim() - 2
        if self.kinds is PLAIN:
            self.planned = self.after_activation()
            return
        patterns: dict[str, list[Callable[[], Any]]] = {
            "after activation": self.after_activation(),
            "after activation, twice": [*self.after_activation(), self.relu, self.norm, self.padded],
            "pre-activation": [self.layer, self.norm, self.relu, choose.pick([self.layer, self.padded])],
            "in place": [self.layer, self.norm, self.in_place, self.layer, self.in_place, self.combine],
            "reshaped": [self.layer, self.relu, self.reshaped, self.norm, self.layer],
            "parallel": [self.parallel],
            "shared": [self.shared],
            "flat": [self.norm, self.flattened, self.linear, self.norm],
            "tokens": [self.tokens],
            "decoder": [self.decoder],
            "steep": [self.steep] if self.dtype == torch.float16 and rank > 0 else [self.norm, self.layer],
            "written input": [self.written_input],
            **{f"erased, {number}": [self.erased] for number in range(5)},
            "constants between": [self.layer, self.constants, self.norm, self.layer],
        }
        self.planned = patterns[choose.pick(list(patterns))]

    def after_activation(self) -> list[Callable[[], Any]]:
        choose = self.choose
        pool = [self.pool] if choose.one_in(3) else []
        return [
            choose.pick([self.layer, self.padded]),
            self.relu,
            *pool,
            self.norm,
            choose.pick([self.layer, self.padded]),
        ]

    def relu(self) -> bool:
        return self.activation(self.choose.pick(["ReLU", "ReLU", "ReLU", "ReLU6", "Hardtanh"]))

    def linear(self) -> bool:
        return self.go("Linear", nn.Linear(self.x.shape[-1], self.choose.number(2, 6)))

    def flattened(self) -> bool:
        name, function = self.choose.pick(spellings.flattenings(self.x))
        return self.function(name, name, function)

    def reshaped(self) -> bool:
        if self.x.dim() < 3:
            return False
        name, function = self.choose.pick(spellings.same_channels(self.x))
        return self.function(name, name, function)

    def parallel(self) -> None:
        """conv(x) + BatchNorm(x) + 1x1(x) + x, or some of these, added or subtracted."""
        x, start = self.x, self.current
        rank = x.dim() - 2
        if rank not in (1, 2):
            return
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
        channels = x.shape[1]
        sides: list[list[nn.Module]] = [[norm(channels)]]
        groups = self.choose.pick([1, 1, channels])
        sides.append([conv(channels, channels, 3, padding=1, groups=groups, bias=self.choose.one_in(2))])
        if self.choose.one_in(2):
            sides.append([conv(channels, channels, 1)])
        for side in sides[1:]:
            side += [norm(channels)] if self.choose.one_in(2) else []
        if self.choose.one_in(2):
            sides.reverse()
        ends = []
        for side in sides:
            self.current = start
            if not all(self.go(f"parallel: {type(module).__name__}", module) for module in side):
                return
            ends.append(self.current)
        ends += [start] if self.choose.one_in(3) else []
        total = ends[0]
        operations: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = (
            [("+=", lambda a, b: a.add_(b)), ("-=", lambda a, b: a.sub_(b))]
            if self.choose.one_in(3)
            else [("+", lambda a, b: a + b), ("-", lambda a, b: a - b), ("rsub", lambda a, b: torch.rsub(b, a))]
        )
        for end in ends[1:]:
            name, function = self.choose.pick(operations)
            reads = [total, end] if name.endswith("=") else self.choose.pick([[total, end], [end, total]])
            if not self.function(f"parallel: {name}", name, function, *reads):
                return
            total = self.current
        if self.choose.one_in(2):
            self.planned = [self.relu]

    def shared(self) -> None:
        """One layer on two values, each with a BatchNorm of its own behind it, or before it."""
        start, twins = self.current, self.alike(self.x)
        layer = self.new_layer(self.x)
        if layer is None:
            return
        norm_first = self.choose.one_in(3)
        for value in (start, self.choose.pick(twins)):
            self.current = value
            if norm_first and not self.norm():
                return
            if not self.go("a module used twice", layer):
                return
            if not norm_first and not self.norm():
                return

    def tokens(self) -> None:
        """Linear on [N, tokens, channels], with the BatchNorm on a transposed or flattened view."""
        if self.x.dim() < 3:
            return
        if self.x.dim() > 3 or self.choose.one_in(2):
            self.function("tokens", "tokens", lambda x: x.flatten(2).transpose(1, 2))
        if self.choose.one_in(2):
            width = self.choose.number(2, 6)
            if not self.go("Linear", nn.Linear(self.x.shape[-1], width)):
                return
            before = self.current
            if self.function("LeViT: flatten(0, 1)", "flatten(0, 1)", lambda x: x.flatten(0, 1)) and self.norm():
                self.function("LeViT: reshape_as", "reshape_as", lambda x, y: x.reshape_as(y), self.current, before)
        else:
            transpose = [lambda: self.function("tokens: transpose(1, 2)", "transpose", lambda x: x.transpose(1, 2))]
            self.planned = [
                self.linear,
                *transpose,
                self.norm,
                *(transpose if self.choose.one_in(2) else []),
                self.linear,
            ]

    def decoder(self) -> None:
        """Linear, then seen as an image, then BatchNorm."""
        channels, side = self.choose.number(2, 4), self.choose.number(2, 4)
        if self.x.dim() != 2 and not self.flattened():
            return
        if self.x.dim() == 2 and self.go("Linear", nn.Linear(self.x.shape[-1], channels * side * side)):
            shapes = [
                lambda x: x.view(x.size(0), channels, side, side),
                lambda x: x.view(-1, channels, side, side),
                lambda x: x.unflatten(1, (channels, side, side)),
            ]
            if self.function("decoder: view", "view", self.choose.pick(shapes)):
                self.planned = [self.norm, *([self.relu] if self.choose.one_in(2) else []), self.layer]

    def written_input(self) -> None:
        """A BatchNorm whose input is written into after it, and read again."""
        if not self.layer() or not self.norm():
            return
        before, after = self.around_norms[-2:]
        if self.choose.one_in(2):
            self.layer()
        if self.in_place(self.choose.pick([before, before, after])):
            self.current = self.choose.pick([before, after, self.current])
            self.planned = [self.choose.pick([self.layer, self.norm, self.combine]), self.combine]

    def erased(self) -> None:
        """A BatchNorm that its readers could take, and writes into its input, or its output, before or after they read.

        Its output is a tensor of its own; were it erased, the two would be one.
        """
        choose = self.choose
        if not choose.one_in(4):
            self.go("Conv or Linear", self.new_layer(self.x, choose.number(2, 6), same_size=True) or nn.Identity())
        before = self.current
        if not self.norm():
            return
        after = self.current
        channels = self.values[before].shape[1]
        readers, read = choose.number(1, 2), []
        write_at = choose.number(0, readers)
        for place in range(readers + 1):
            if place == write_at:
                target = choose.pick([before, before, before, after])
                fitting = [i for i in read if self.values[i].shape == self.values[target].shape]
                if fitting and choose.one_in(2):
                    self.function("in place: += of what it became", "+=", spellings.plus, target, choose.pick(fitting))
                else:
                    self.in_place(target)
            if place == readers:
                break
            self.current = after
            if choose.one_in(6):
                self.relu()
            layer = self.new_layer(self.x, channels, same_size=True)
            if layer is not None and self.go("Conv or Linear", layer):
                read.append(self.current)
        fitting = [i for i in read if self.values[i].shape == self.values[before].shape]
        if fitting and choose.one_in(2):
            self.function("add", "add", lambda a, b: a + b, choose.pick(fitting), before)
        elif choose.one_in(2):
            self.current = before
            self.planned = [self.layer]

    def steep(self) -> None:
        """Weights and a scale whose product no half holds, between small signals."""
        channels = self.x.shape[1]
        layer = self.new_layer(self.x, channels, same_size=True)
        assert layer is not None
        layer.double().weight.data.mul_(400)
        if layer.bias is not None:
            layer.bias.data.zero_()
        norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[self.x.dim()](channels).double()
        norm.running_var.fill_(2e-6)
        norm.weight.data.copy_(self.random(channels).sign())
        norm.eps = 1e-6
        self.woken.add(norm)
        order = [norm, layer] if self.choose.one_in(2) else [layer, norm]
        small = 2.0 ** -self.choose.number(10, 14)
        if self.function("steep: small", "small", lambda x: x * small):
            for module in order:
                if not self.go(f"steep: {type(module).__name__}", module):
                    return


def without(drawn: Drawn) -> Iterator[Drawn]:
    """The same with one step, or one output, less; what read the step's value reads its input."""
    program = drawn.network
    for place in reversed(range(len(program.steps))):
        gone = program.steps[place]
        others = [step for index, step in enumerate(program.steps) if index != place]
        instead = dict.fromkeys(gone.makes, gone.reads[0])

        def renamed(values: Sequence[int], instead: dict[int, int] = instead) -> tuple[int, ...]:
            return tuple(instead.get(value, value) for value in values)

        steps = [Step(s.module, renamed(s.reads), s.makes, s.label) for s in others]
        yield _with(drawn, steps, [o for o in renamed(program.outputs) if o not in program.reads])
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield _with(drawn, program.steps, [o for o in program.outputs if o != output])


def _with(drawn: Drawn, steps: Sequence[Step], outputs: Sequence[int]) -> Drawn:
    program = drawn.network
    form = program.form if outputs else "tuple"
    network = Network(program.reads, steps, sorted(set(outputs)), form).eval()
    return Drawn(network, drawn.inputs, drawn.dtype, drawn.sizes, drawn.stateful)

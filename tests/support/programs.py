"""Torch programs over named values, as a forward method is: steps that read values, make values, or write into them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from enliven import BatchNorm
from torch import Tensor, nn


class Functional(nn.Module):
    """An operation of one or more values, with its constants, which are passed by name."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        constants: Mapping[str, Tensor] | None = None,
        *,
        trained: bool = False,
        is_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.function, self.is_norm = name, function, is_norm
        self.constants = tuple(constants or ())
        for label, tensor in (constants or {}).items():
            if trained and tensor.is_floating_point():
                self.register_parameter(label, nn.Parameter(tensor))
            else:
                self.register_buffer(label, tensor)

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values, **{label: getattr(self, label) for label in self.constants})

    def extra_repr(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Step:
    """One statement. `makes` is empty where it only writes into what it reads."""

    module: nn.Module
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    label: str

    def __str__(self) -> str:
        made, read = (", ".join(f"v{i}" for i in values) for values in (self.makes, self.reads))
        inner = f"\n{self.module.program.listing('    ')}" if isinstance(self.module, Region) else ""
        what = f"{type(self.module).__name__} {self.label}" if isinstance(self.module, Region) else repr(self.module)
        return f"{made + ' = ' if made else ''}{what} of {read}   # {self.label}{inner}"


class Program(nn.Module):
    """Steps over named values; it reads the values `reads` and returns the values `outputs`."""

    def __init__(
        self, reads: Sequence[int], steps: Sequence[Step], outputs: Sequence[int], form: str = "tuple"
    ) -> None:
        super().__init__()
        unique = list(dict.fromkeys(step.module for step in steps))
        self.parts = nn.ModuleList(unique)
        self.reads, self.steps, self.outputs, self.form = tuple(reads), tuple(steps), tuple(outputs), form
        # By place and not by module: a copy of the program has modules of its own.
        self.order = [(unique.index(step.module), step.reads, step.makes) for step in steps]

    def run(self, *arguments: Tensor) -> Any:
        values = dict(zip(self.reads, arguments, strict=True))
        for part, reads, makes in self.order:
            results = self.parts[part](*(values[index] for index in reads))
            if makes:
                values.update(zip(makes, results if isinstance(results, tuple) else (results,), strict=True))
        if self.form == "tensor":
            return values[self.outputs[0]]
        if self.form == "dict":
            return {f"out{index}": values[index] for index in self.outputs}
        results = [values[index] for index in self.outputs]
        return results if self.form == "list" else tuple(results)

    def forward(self, *arguments: Tensor) -> Any:
        return self.run(*arguments)

    def norms(self) -> Counter[nn.Module]:
        """How many times each BatchNorm is called, branches not taken included."""
        return sum((norms_in(self.parts[part]) for part, _, _ in self.order), Counter())

    def listing(self, indent: str = "") -> str:
        lines = [line for step in self.steps for line in str(step).splitlines()]
        returned = f"return {self.form} of {', '.join(f'v{index}' for index in self.outputs)}"
        return "\n".join(indent + line for line in [*lines, returned])

    def labels(self) -> set[str]:
        inner = [step.module.program.labels() for step in self.steps if isinstance(step.module, Region)]
        return {step.label for step in self.steps}.union(*inner)


class Network(Program):
    """A program of one or two inputs, with the signature that torch.export wants."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return self.run(x) if other is None else self.run(x, other)


class Region(nn.Module):
    """A program under autocast, or with gradients switched on or off."""

    def __init__(self, kind: str, program: Program) -> None:
        super().__init__()
        self.kind, self.program = kind, program

    def forward(self, *values: Tensor) -> Any:
        with entered(self.kind):
            return self.program(*values)


def entered(kind: str) -> contextlib.AbstractContextManager[Any]:
    if kind == "autocast":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if kind == "no autocast":
        return torch.autocast("cpu", enabled=False)
    return torch.enable_grad() if kind == "enable_grad" else torch.no_grad()


class Branches(nn.Module):
    """One of two modules by a condition that only the data knows."""

    def __init__(self, yes: nn.Module, no: nn.Module) -> None:
        super().__init__()
        self.yes, self.no = yes, no

    def rehearse(self, condition: Tensor, *values: Tensor) -> Any:
        """Both sides run, so that the BatchNorms of both see data."""
        self.no(*(value.clone() for value in values))
        return self.yes(*values)

    def forward(self, condition: Tensor, *values: Tensor) -> Any:
        if torch.compiler.is_exporting():
            return torch.cond(condition, self.yes, self.no, values)
        # Eagerly torch.cond compiles both sides, which takes seconds and computes the same.
        return self.yes(*values) if condition else self.no(*values)


def norms_in(module: nn.Module) -> Counter[nn.Module]:
    """How many times one call of `module` calls each BatchNorm."""
    if isinstance(module, Program):
        return module.norms()
    if isinstance(module, BatchNorm) or (isinstance(module, Functional) and module.is_norm):
        return Counter({module: 1})
    return sum((norms_in(child) for child in module.children()), Counter())


class Moving(nn.Module):
    """Changes another module's running mean as it runs."""

    def __init__(self, norm: nn.Module, *, through_a_view: bool) -> None:
        super().__init__()
        self.holder = (norm,)  # not a child: this module doesn't call it
        self.through_a_view = through_a_view

    def forward(self, x: Tensor) -> Tensor:
        mean = self.holder[0].running_mean
        if self.through_a_view:
            mean[:1].add_(0.5)
        else:
            mean.mul_(1.25)
        return x + 0.1

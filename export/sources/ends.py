"""What goes into a user's model and what comes out of it.

Owns the spellings of `--input` and `--output`, the names of outputs that nobody named, and which sizes may vary.
Importing this imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from export.bundle import BOX_KINDS, Arrays, Output, OutputKind, TensorSpec
from trainer.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>[1-9]\d*\??(?:x[1-9]\d*\??)*)(?::(?P<dtype>" + "|".join(DTYPES) + "))?"
)
OUTPUT = re.compile(r"(?P<name>\S+):(?P<kind>" + "|".join(get_args(OutputKind)) + ")")
FREE_NAMES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
"""What the sizes after batch and channels are called, by how many an input has in all."""


@dataclass(frozen=True)
class Given:
    """One input as a user describes it: the shape of one, batch left out, and which of its sizes may vary."""

    shape: tuple[int, ...]
    free: tuple[bool, ...]
    name: str | None = None
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Given:
        """``3x224x224``; ``3x224?x224?`` where height and width may vary; ``mask=16:int64`` with a name and a dtype.

        Raises ValueError.
        """
        match = INPUT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no shape of one input; expected sizes like 3x224x224, without the batch, with ? after "
                "those that may vary, NAME= before them where there are several inputs, and a dtype after them where "
                f"it is not float32, like mask=16:int64 ({', '.join(DTYPES)})."
            )
        sizes = match["sizes"].split("x")
        shape = tuple(int(size.rstrip("?")) for size in sizes)
        return cls(shape, tuple(size.endswith("?") for size in sizes), match["name"], match["dtype"] or "float32")

    def spec(self, name: str, dtype: str | None = None, batch: int | None = None) -> TensorSpec:
        """The input with a batch of that size before it, or of any."""
        names = FREE_NAMES.get(1 + len(self.shape), ())
        first = 1 + len(self.shape) - len(names)
        sizes = tuple(
            (names[place - first] if place >= first else f"size_{place}") if free else size
            for place, (size, free) in enumerate(zip(self.shape, self.free, strict=True), 1)
        )
        return TensorSpec(name=name, dtype=dtype or self.dtype, shape=(batch or "batch", *sizes))


def parse_output(text: str) -> tuple[str, OutputKind]:
    """``NAME:kind``. Raises ValueError."""
    match = OUTPUT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected NAME:KIND, the kind one of {', '.join(get_args(OutputKind))}.")
    return match["name"], cast(OutputKind, match["kind"])


def random_inputs(given: Given, count: int) -> np.ndarray:
    """Inputs [count, *shape], the same every time: normally distributed, or of whole numbers 0 and 1."""
    draw = np.random.default_rng(0)
    if np.dtype(given.dtype).kind == "f":
        return draw.standard_normal((count, *given.shape), dtype=np.float32).astype(given.dtype)
    return draw.integers(0, 2, (count, *given.shape)).astype(given.dtype)


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """`dynamic_shapes` of torch.export for inputs of these shapes: one dimension for each name."""
    import torch

    names = dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str))
    dims = {name: torch.export.Dim(name) for name in names}
    return tuple({axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs)


def other_sizes(specs: Sequence[TensorSpec], arrays: Arrays) -> Arrays | None:
    """The first of some inputs [N, …] at other sizes, where any but the batch may vary: twice, side by side."""
    if not any(isinstance(size, str) for spec in specs for size in spec.shape[1:]):
        return None
    return tuple(
        np.tile(array, [1, *(1 + isinstance(size, str) for size in spec.shape[1:])])
        for spec, array in zip(specs, arrays, strict=True)
    )


def outputs_of(
    made: Any, again: Any, kinds: Mapping[str, OutputKind], model: str, batch: int | None = None
) -> tuple[Output, ...]:
    """The outputs of a model that returned `made` for two inputs, or for `batch` where it takes only these, and `again`
    for as many of other sizes, or None.

    They are called as in the dict that the model returns, else ``output``, or ``output_0`` and on where there are
    several. Raises UserError where something else than tensors [batch, …] came back, or a kind is of no output.
    """
    tensors = _named(made, model)
    other = _named(again, model) if again is not None else tensors
    outputs = []
    for name, tensor in tensors.items():
        dtype = "float32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        if batch == 1 and kinds.get(name) in BOX_KINDS:
            outputs.append(Output(name=name, dtype=dtype, shape=("found", *tensor.shape[1:]), kind=kinds[name]))
            continue
        if tensor.dim() < 1 or len(tensor) != (batch or 2):
            raise UserError(
                f"{model}: output {name} has shape {list(tensor.shape)} for {batch or 2} inputs; expected the batch as "
                "its first dimension. Wrap the model in a module that returns what is to be compared."
            )
        sizes = tuple(
            size if size == elsewhere else f"{name}_{axis}"
            for axis, (size, elsewhere) in enumerate(zip(tensor.shape[1:], other[name].shape[1:], strict=True), 1)
        )
        outputs.append(Output(name=name, dtype=dtype, shape=(batch or "batch", *sizes), kind=kinds.get(name)))
    if unknown := [name for name in kinds if name not in tensors]:
        raise UserError(f"--output {unknown[0]}: {model} has no such output, but {', '.join(tensors)}.")
    return tuple(outputs)


def _named(made: Any, model: str) -> dict[str, torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    leaves, _ = pytree.tree_flatten_with_path(made)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for _, leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for _, leaf in leaves})) or "nothing"
        raise UserError(
            f"{model} returns {type(made).__name__} of {kinds}, expected tensors. Wrap the model in a module that "
            "returns the tensors to compare."
        )
    if len(leaves) == 1 and not isinstance(made, Mapping):
        return {"output": leaves[0][1]}
    named: dict[str, torch.Tensor] = {}
    for place, (path, leaf) in enumerate(leaves):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", place)))) for key in path]
        named["_".join(keys) if not keys[0].isdigit() else "output_" + "_".join(keys)] = leaf
    return named

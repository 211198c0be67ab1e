"""The folded network against the unfolded one, both in float64.

Owns on which inputs the two are compared, and how near they must be. Knows neither folding nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from export.bundle.rows import Rows
from export.errors import ExportRefused
from export.formats.running import tensors_of
from export.oracle import in_float64
from export.progress import Advance, unheard
from export.raw_input import FromRaw, reference

if TYPE_CHECKING:
    from export.sources.material import Material

EXACT = 1e-12
"""Largest relative difference, in float64, between the folded network and the unfolded one."""

Tensors = tuple[torch.Tensor, ...]


class Unfolded:
    """The unfolded network in float64, with its outputs for real and random inputs and for borders alone.

    They are computed once, `chunk` at a time, however many networks are held to them.
    """

    def __init__(self, model64: nn.Module, inputs: tuple[Rows, ...], chunk: int) -> None:
        self._model64, self._chunk = model64, chunk
        real = tuple(in_float64(torch.from_numpy(np.asarray(rows))) for rows in inputs)
        generator = torch.Generator().manual_seed(0)
        noise = tuple(
            torch.randn(x.shape, generator=generator, dtype=torch.float64) if x.is_floating_point() else x for x in real
        )
        border = tuple(border_of(x, x.dim() - 2) if x.is_floating_point() else x for x in noise)
        self._given = {"real": real, "random": noise, "border": border}
        self._wanted: dict[str, Tensors] = {}

    @property
    def calls(self) -> int:
        """How many inputs a comparison runs through a network."""
        return sum(len(x[0]) for x in self._given.values())

    def require_equal(self, folded64: nn.Module, advance: Advance = unheard) -> None:
        """Raises ExportRefused where that network computes anything else."""
        for what, given in self._given.items():
            if what not in self._wanted:
                self._wanted[what] = _outputs(self._model64, given, self._chunk)
            found = _outputs(folded64, given, self._chunk, advance)
            _require_exact(
                found, self._wanted[what], f"The folded network differs from the unfolded one on {what} inputs"
            )


def require_equal_from_raw(
    model64: nn.Module, networks: Mapping[Any, nn.Module], material: Material, count: int, chunk: int
) -> None:
    """The same for the networks with the preprocessing in front, on raw inputs, the darkest and the brightest too."""
    preprocessing = material.preprocessing
    real = torch.from_numpy(np.array(material.raw[:count]))
    limits = torch.iinfo(real.dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(limits.min, limits.max + 1, real.shape, generator=generator, dtype=real.dtype)
    flat = torch.stack([torch.full_like(real[0], value) for value in (limits.min, limits.max)])
    border = border_of(noise, min(len(material.input.shape) - 2, noise.dim() - 1))
    for what, x in (("real", real), ("random", noise), ("border", border), ("flat", flat)):
        wanted = _outputs(lambda raw: reference(model64, preprocessing, material.input, raw), (x,), chunk)
        for network in networks.values():
            found = _outputs(FromRaw(network, preprocessing, material.input, torch.float64), (x,), chunk)
            _require_exact(
                found, wanted, f"The network with the preprocessing inside is not right on {what} raw inputs"
            )


def _outputs(network: Callable[..., Any], given: Tensors, chunk: int, advance: Advance = unheard) -> Tensors:
    """Every output for all of the inputs, computed `chunk` inputs at a time."""
    parts = []
    for start in range(0, len(given[0]), chunk):
        with torch.no_grad():
            parts.append(tensors_of(network(*(x[start : start + chunk] for x in given))))
        advance(len(given[0][start : start + chunk]))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def border_of(x: torch.Tensor, spatial: int) -> torch.Tensor:
    """`x` with zeros inside; the last `spatial` dimensions are those that have a border."""
    border = x.clone()
    if spatial > 0:
        border[tuple([slice(None)] * (x.dim() - spatial) + [slice(1, -1)] * spatial)] = 0
    return border


def _require_exact(found: Tensors, wanted: Tensors, complaint: str) -> None:
    for output, truth in zip(found, wanted, strict=True):
        if not truth.is_floating_point():  # what names something has no size, and ties may go either way
            continue
        error = float((output - truth).abs().max() / truth.abs().max())
        if not error <= EXACT:
            raise ExportRefused(f"{complaint}: off by {error:.1e} (relative, float64).")

"""What is computed in float64 before any file is written: the folded networks, compared with the unfolded one.

Owns which networks there are and that each is held to the unfolded one. Knows neither the rules of folding nor files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from export import writing
from export.bundle import Arrays
from export.checks import first
from export.columns import laid_on_side
from export.effort import Effort
from export.equality import Unfolded, require_equal_from_raw
from export.fold import Folded, fold_batchnorm
from export.fold.report import FoldReport, Runtime, Strategy
from export.memory import give_back
from export.oracle import in_float64, outputs64
from export.progress import Progress
from export.sources.ends import other_sizes
from export.sources.material import Material
from export.variants import Plan


@dataclass(frozen=True)
class InFloat64:
    """The network folded for each runtime, twice the same where the ways are equal; what the files of a plan are made
    from; and the oracle's outputs, None where another process computes them. `elsewhere` are some inputs at other sizes
    with their outputs, where sizes may vary.
    """

    ways: dict[Runtime, Folded]
    networks: writing.Networks
    outputs: Arrays | None
    elsewhere: tuple[Arrays, Arrays] | None


def fold_and_compare(
    material: Material, strategy: Strategy, plan: Plan, effort: Effort, progress: Progress, *, with_outputs: bool
) -> InFloat64:
    """Fold, compare, and compute the oracle where that is asked for. Raises ExportRefused.

    In float64, so that the fold itself is held to float64's precision; the files get weights rounded once.
    """
    examples64 = tuple(in_float64(torch.from_numpy(array)) for array in material.examples)
    model64 = copy.deepcopy(material.module).double()
    sizes = material.dynamic_shapes()
    unfolded = Unfolded(model64, first(material.inputs, effort.compared), effort.chunk)
    folded = _folded(model64, examples64, sizes, strategy, "onnxruntime", progress)
    progress.say(summary(folded.report))
    _require_equal(unfolded, folded.module, "the folded network", progress)
    few = tuple(np.asarray(rows) for rows in first(material.inputs, effort.batches[1] or effort.batches[0]))
    larger = other_sizes((material.input, *material.more_inputs), few)
    elsewhere = None
    if larger is not None:
        at_other_sizes = Unfolded(model64, larger, effort.chunk)
        _require_equal(at_other_sizes, folded.module, "the folded network at other sizes", progress)
        elsewhere = larger, outputs64(model64, larger, effort.chunk)
    for_torch = folded
    if strategy in ("auto", "all"):
        other = _folded(model64, examples64, sizes, strategy, "torch", progress)
        if _methods(other.report) != _methods(folded.report):
            for_torch = other
            progress.say("for torch:\n" + summary(for_torch.report))
            _require_equal(unfolded, for_torch.module, "the network folded for torch", progress)
        del other
    if with_outputs:
        give_back()  # of a large model
    ways: dict[Runtime, Folded] = {"onnxruntime": folded, "torch": for_torch}
    networks = writing.networks(plan, model64, ways, examples64, sizes, strategy)
    for kind, network in networks.items():
        _require_equal(unfolded, network, f"the network for {kind} files", progress)
    if any(file.takes == "raw" for file in plan.files):
        with progress.step("comparing the networks that take the raw input with the unfolded one in float64"):
            require_equal_from_raw(model64, networks, material, effort.compared, effort.chunk)
    outputs = _outputs(model64, material, effort, progress) if with_outputs else None
    return InFloat64(ways, networks, outputs, elsewhere)


def _folded(
    model64: nn.Module,
    examples64: tuple[torch.Tensor, ...],
    sizes: tuple[dict[int, Any], ...],
    strategy: Strategy,
    runtime: Runtime,
    progress: Progress,
) -> Folded:
    """The network folded for a runtime, with columns on their side."""
    with progress.step(f"folding for {runtime}"):
        folded = fold_batchnorm(model64, examples64, dynamic_shapes=sizes, strategy=strategy, runtime=runtime)
        return Folded(laid_on_side(folded.module), folded.report)


def _require_equal(unfolded: Unfolded, network: nn.Module, what: str, progress: Progress) -> None:
    with progress.step(f"comparing {what} with the unfolded one in float64", unfolded.calls) as advance:
        unfolded.require_equal(network, advance)


def _outputs(model64: nn.Module, material: Material, effort: Effort, progress: Progress) -> Arrays:
    with progress.step(f"computing the float64 oracle of {effort.inputs} inputs", effort.inputs) as advance:
        return outputs64(model64, material.inputs, effort.chunk, advance=advance)


def summary(report: FoldReport) -> str:
    """What became of each BatchNorm, a line each."""
    lines = [f"folded {norm.name}: {norm.method}, into {', '.join(norm.into)}" for norm in report.folded]
    lines += [f"kept {norm.name}: {norm.reason}" for norm in report.kept]
    lines += [f"simplified {other.name}: {other.method}, into {', '.join(other.into)}" for other in report.simplified]
    return "\n".join(lines or ["the model has no BatchNorm"])


def _methods(report: FoldReport) -> list[tuple[str, str]]:
    return [(norm.name, norm.method) for norm in report.folded]

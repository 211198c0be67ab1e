"""Folding a torch module: export its graph, fold it, write it back, and compare the whole.

Owns `fold_batchnorm`. The cases stand in `search`, the formulas in `algebra`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from export.fold import from_torch, search
from export.fold.errors import FoldError
from export.fold.report import FoldReport, Runtime, Strategy
from export.fold.search import Limits
from export.fold.whole import difference, until_right
from trainer.errors import no_interrupt_lost


@dataclass(frozen=True)
class Folded:
    """A folded model: `module` computes the model's function; `report` says what became of each BatchNorm."""

    module: fx.GraphModule
    report: FoldReport


def fold_batchnorm(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    strategy: Strategy = "auto",
    runtime: Runtime = "onnxruntime",
) -> Folded:
    """Fold every BatchNorm of a model whose home is exact; the others stay and are in the report with the reason.

    Each fold is checked by itself, and the whole is compared with the model on random inputs like the example; a fold
    that the whole does not bear is undone.

    Args:
        model: any module in eval mode that torch.export takes. It is never changed and shares nothing with the result.
        example_inputs: a tuple of tensors that the model takes; a batch of 2 or more where the batch is to be symbolic.
        dynamic_shapes: as for `torch.export.export`. None makes the first dimension of every input symbolic, together,
            where torch.export accepts that, and fixes all sizes otherwise.
        strategy: how a shift gets over a border of zeros: ``"ones"``, ``"bias-map"`` or ``"floor"`` alone, ``"all"``,
            the cheapest that is exact, or ``"auto"``, the same unless it costs more than the BatchNorm does. ``"none"``
            folds nothing.
        runtime: for whom costs are counted, ``"onnxruntime"`` or ``"torch"``.

    Returns:
        The folded module, on the model's device and in its dtype, in eval mode, and the report.

    Raises:
        FoldError: the model is in training mode, has weights that are not finite, or torch.export refuses it.
    """
    module = graph_module(model, example_inputs, dynamic_shapes)
    graph, effects = from_torch.prepare(module)

    def attempt(limits: Limits) -> Folded:
        with torch.no_grad():
            read = from_torch.read(graph, effects)
            report = search.fold(read, strategy, runtime, limits)
            return Folded(from_torch.write(graph, read), report)

    def problem(folded: Folded) -> str | None:
        states = [_state(module, effects.constants) for module in (graph, folded.module)]
        return difference(model, folded.module, example_inputs, *states)

    return until_right(attempt, problem, lambda folded: folded.report)


def _state(module: nn.Module, names: set[str]) -> list[torch.Tensor]:
    """The tensors of those names, as far as the module has them: what a call changes."""
    have = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [have[name] for name in sorted(names) if name in have]


def graph_module(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> fx.GraphModule:
    """The model's graph as torch.export sees it, sharing its weights. Raises FoldError as `fold_batchnorm` does."""
    if model.training:
        raise FoldError(
            "the model is in training mode, in which BatchNorm normalises by the batch and can't be folded. "
            "Call model.eval() first."
        )
    statistics = ("running_mean", "running_var")
    masks = {name for name, _ in model.named_buffers() if not name.endswith(statistics)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A mask may well hold minus infinity; a weight may not.
        wrong = torch.isnan(tensor).any() if name in masks else not torch.isfinite(tensor).all()
        if tensor.is_floating_point() and wrong:
            raise FoldError(
                f"{name} holds values that are not finite (NaN or infinity). No result would be right: "
                "use weights from a training that converged."
            )
    return as_module(export_program(model, example_inputs, dynamic_shapes))


def as_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module that can be traced, pickled and exported again, sharing the program's weights.

    What `ExportedProgram.module` returns can't: its eval() raises, and unpickling asks for the tracer that made it.
    """
    exported = program.module(check_guards=False)
    exported.graph._tracer_cls = None
    return fx.GraphModule(exported, exported.graph)


def any_batch(inputs: int = 1) -> tuple[dict[int, Any], ...]:
    """`dynamic_shapes` for so many inputs whose first dimension is the batch, which may have any size."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in range(inputs))


def export_program(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """The model as torch.export sees it; `dynamic_shapes` as for `fold_batchnorm`. Raises FoldError."""
    attempts = [dynamic_shapes]
    if dynamic_shapes is None and all(isinstance(x, torch.Tensor) and x.dim() and x.shape[0] > 1 for x in inputs):
        attempts = [any_batch(len(inputs)), None]
    for attempt in attempts:
        try:
            with torch.no_grad(), no_interrupt_lost():
                return torch.export.export(model, inputs, dynamic_shapes=attempt)
        except Exception as error:  # torch.export raises many kinds; each means that it does not take this model
            problem = error
    first_line = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    raise FoldError(
        f"torch.export does not take this model: {first_line} Folding works on its graph; its documentation "
        "says what a model must avoid (control flow that depends on data, for one). `python -m export --trace` "
        "traces it instead."
    ) from problem

"""torch.export programs: into the vocabulary of `export.fold.graph`, and back with the folds in them."""

from __future__ import annotations

from torch import fx

from export.fold.from_torch.aliases import Effects, functionalise
from export.fold.from_torch.read import read
from export.fold.from_torch.regions import inline_gradient_modes
from export.fold.from_torch.write import write

__all__ = ["Effects", "prepare", "read", "write"]


def prepare(module: fx.GraphModule) -> tuple[fx.GraphModule, Effects]:
    """The module with a graph of its own, functional as far as nobody can tell; shares the weights of `module`."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    if result is not None:
        graph.output(result)
    graph._codegen = module.graph._codegen
    prepared = fx.GraphModule(module, graph, "Prepared")
    inline_gradient_modes(prepared)
    effects = functionalise(prepared)
    prepared.recompile()
    prepared.meta.update(module.meta)
    return prepared, effects

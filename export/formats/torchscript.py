"""TorchScript: deprecated by its makers, still what many deployments load.

Owns tracing a module so that the batch stays free, counting the BatchNorms in such a file, and running it with the
optimising executor off. Knows nothing of folding.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from export.bundle import Arrays
from export.formats.running import Run, as_function

aten = torch.ops.aten


def available() -> bool:
    """Whether this torch still has TorchScript."""
    return hasattr(torch.jit, "trace") and hasattr(torch.jit, "load")


def write(module: nn.Module, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    """Trace `module` on `examples` of its inputs, [batch, …], and save it. Nothing is frozen or folded by TorchScript
    itself.

    A trace fixes for good whether a convolution may use TF32 on a GPU, from what the process allows at that moment, and
    torch allows it by default. Here it may not: the file is float32, wherever it runs.
    """
    traced_from = _sizes_as_methods(module) if isinstance(module, fx.GraphModule) else module
    with warnings.catch_warnings(), torch.no_grad(), _without_tf32():
        _ignore_deprecation()
        warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
        traced = torch.jit.trace(traced_from, examples, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        traced.save(str(path))


def batchnorms(path: Path) -> int:
    """How many batch_norm calls the file's graph holds once everything is inlined."""
    return str(_load(path).inlined_graph).count("aten::batch_norm(")


def runner(path: Path) -> Run:
    """The file as a function, inputs → outputs, on the CPU with the optimising executor off."""
    run_optimised = as_function(_load(path))

    def run(*batch: np.ndarray) -> Arrays:
        with torch.jit._fuser.optimized_execution(False):
            return run_optimised(*batch)

    return run


def _load(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        _ignore_deprecation()
        module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return module


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _ignore_deprecation() -> None:
    """torch.jit is deprecated, and the format still asked for. Which kind of warning says so depends on the version."""
    for kind in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)


def _sizes_as_methods(module: fx.GraphModule) -> fx.GraphModule:
    """The module with sizes read by methods: tracing takes `aten.sym_size` for a number, and would fix the batch."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    graph._codegen = module.graph._codegen
    for node in graph.nodes:
        if node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target in (aten.view.default, aten.reshape.default, aten.expand.default):
            node.op, node.target = "call_method", node.target._schema.name.removeprefix("aten::")
    return fx.GraphModule(module, graph)

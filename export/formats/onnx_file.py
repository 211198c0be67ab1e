"""ONNX: one file, weights inside, symbolic batch.

Owns writing a torch.export program as ONNX, counting the BatchNorms in such a file, and running it with every
optimisation off. Knows nothing of folding.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from export.formats import onnx_pads
from export.formats.onnx_session import open_session
from export.formats.running import Run
from trainer.errors import UserError

OPSET = 20
"""Has GELU as one node; every onnxruntime from 1.17 on runs it."""


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    optimize: bool,
    quantised: bool = False,
) -> int:
    """Write the program to `path`; returns the opset. `optimize=False` keeps BatchNorms that torch would fold itself.

    Of a file that is to be `quantised` padding stays inside the convolutions: int8 kernels have no use for a copy.

    Raises onnx.checker.ValidationError where the file does not pass the full check.
    """
    with _quiet():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=optimize,
            opset_version=OPSET,
            external_data=False,
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        )
    assert exported is not None
    onnx_pads.inside(exported.model)
    if not quantised:
        onnx_pads.apart(exported.model)
    exported.save(str(path), external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    return OPSET


def write_traced(
    module: nn.Module,
    examples: tuple[torch.Tensor, ...],
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    free: bool,
) -> None:
    """Trace the module on `examples` and write it to `path`, with every BatchNorm that it has; `free` are batches that
    may have any size. Raises UserError where torch's exporter does not take the module.
    """
    names = [*input_names, *output_names]
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                module,
                examples,
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_axes={name: {0: "batch"} for name in names} if free else None,
                training=torch.onnx.TrainingMode.PRESERVE,  # else it folds what it can by itself
                external_data=False,
            )
    except Exception as error:  # of no common kind
        raise UserError(f"torch can't trace this model: {type(error).__name__}: {error}.") from error
    onnx.checker.check_model(str(path), full_check=True)


def batchnorms(path: Path) -> int:
    """How many BatchNormalization nodes the file holds, in functions and subgraphs too."""
    model = onnx.load(str(path), load_external_data=False)

    def count(nodes: object) -> int:
        return sum(
            (node.op_type == "BatchNormalization")
            + sum(count(graph.node) for attribute in node.attribute for graph in (attribute.g, *attribute.graphs))
            for node in nodes  # type: ignore[attr-defined]
        )

    return count(model.graph.node) + sum(count(function.node) for function in model.functions)


def runner(path: Path, *, optimised: bool = False, entries: Mapping[str, str] | None = None) -> Run:
    """The file as a function, inputs → outputs, on the CPU with every graph optimisation off, or all of them.

    `entries` go to the session's configuration.
    """
    session = open_session(str(path), optimised=optimised, entries=entries)
    names = [argument.name for argument in session.get_inputs()]
    return lambda *batch: tuple(map(np.asarray, session.run(None, dict(zip(names, batch, strict=True)))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and warns of its own internals; neither tells a user anything."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)

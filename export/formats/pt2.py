"""torch.export programs as files: what the torch backends run, unfolded, as the reference.

Owns writing and running `.pt2` files. Knows nothing of folding.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from export.formats.running import Run, as_function


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Save the program."""
    torch.export.save(program, str(path))


def batchnorms(path: Path) -> int:
    """How many batch_norm calls the program holds."""
    graph = _load(path).graph
    return sum(node.target is torch.ops.aten.batch_norm.default for node in graph.nodes)


def runner(path: Path) -> Run:
    """The file as a function, inputs → outputs, run eagerly on the CPU."""
    return as_function(_load(path).module())


def _load(path: Path) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        # torch 2.11 says so of its own reading of the archive.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(str(path))

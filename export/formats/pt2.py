"""torch.export programs as files: what the torch backends run, unfolded, as the reference.

Owns writing and running `.pt2` files. Knows nothing of folding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Save the program."""
    torch.export.save(program, str(path))


def batchnorms(path: Path) -> int:
    """How many batch_norm calls the program holds."""
    graph = _load(path).graph
    return sum(node.target is torch.ops.aten.batch_norm.default for node in graph.nodes)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file as a function, float32 batch → float32 logits, run eagerly on the CPU."""
    module = _load(path).module()

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(batch)).numpy())

    return run


def _load(path: Path) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        # torch 2.11 says so of its own reading of the archive.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(str(path))

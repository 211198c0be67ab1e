"""The truth: float64 logits of the unfolded model.

Owns the oracle's numbers. Knows no file format.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Self

import numpy as np
import torch
from torch import fx, nn

from export.bundle.rows import Rows

CHUNK = 50
"""Images at a time: 1,000 took 0.52 s in chunks of 50, 0.70 s of 250, 0.85 s at once (float64, two cores)."""


def logits64(model64: nn.Module, inputs: Rows) -> np.ndarray:
    """float64 logits [N, classes] of a float64 model for float32 model inputs [N, …]."""
    with torch.no_grad():
        parts = [
            model64(torch.from_numpy(np.asarray(inputs[i : i + CHUNK])).double()) for i in range(0, len(inputs), CHUNK)
        ]
    return torch.cat(parts).numpy()


class Logits64:
    """`logits64` in a process of its own, so that exporting goes on meanwhile.

    A process and not a thread, since tracing a graph changes how modules are called in all threads. It starts when this
    object is made, and imports what it needs while there is nothing to compute yet.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_compute, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def submit(self, module: fx.GraphModule, inputs: Rows) -> None:
        """Start computing, for a float32 module and its float32 inputs [N, …]."""
        self._pipe.send((pickle.dumps(module), inputs))

    def wait(self) -> np.ndarray:
        """The float64 logits [N, classes]. Raises RuntimeError where the process failed."""
        try:
            logits = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process that computed the oracle ended with {self._process.exitcode}") from None
        assert isinstance(logits, np.ndarray)
        return logits


def _compute(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    # The parent needs a core: two pools that wait for each other's threads by spinning took three times as long.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    module, inputs = pipe.recv()
    pipe.send(logits64(pickle.loads(module).double(), inputs))


def run_in_batches(run: Callable[[np.ndarray], np.ndarray], inputs: Rows, batch: int) -> np.ndarray:
    """All of `inputs` through `run`, `batch` images at a time; the last batch may be smaller."""
    return np.concatenate([run(np.asarray(inputs[i : i + batch])) for i in range(0, len(inputs), batch)])

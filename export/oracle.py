"""The truth: float64 outputs of the unfolded model.

Owns the oracle's numbers. Knows no file format.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Self

import torch
from torch import fx, nn

from export.bundle import Arrays, Output
from export.bundle.rows import Rows
from export.formats.running import as_function, run_in_batches
from export.progress import Advance, unheard


def outputs64(
    model64: nn.Module,
    inputs: tuple[Rows, ...],
    chunk: int,
    specs: Sequence[Output] = (),
    advance: Advance = unheard,
) -> Arrays:
    """Every output [N, …] of a float64 model for its inputs [N, …], of which floats are given in float64.

    They are computed `chunk` inputs at a time, and `advance` is told of each chunk. `specs` are those of the outputs,
    where there may be lists among them.
    """
    run = as_function(lambda *batch: model64(*map(in_float64, batch)))
    return run_in_batches(run, inputs, chunk, specs, advance)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Floats in float64; other numbers as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


class Outputs64:
    """`outputs64` in a process of its own, so that exporting goes on meanwhile.

    A process and not a thread, since tracing a graph changes how modules are called in all threads. It starts when this
    object is made, and imports what it needs while there is nothing to compute yet. It takes half a gigabyte, and the
    model twice more, in float32 and in float64.
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

    def submit(self, module: fx.GraphModule, inputs: tuple[Rows, ...], chunk: int) -> None:
        """Start computing, for a float32 module and its inputs [N, …], `chunk` of them at a time."""
        self._pipe.send((pickle.dumps(module), inputs, chunk))

    def wait(self, advance: Advance = unheard) -> Arrays:
        """Every output, float64 [N, …]; `advance` is told of each chunk.

        Raises RuntimeError where the process failed.
        """
        try:
            while isinstance(outputs := self._pipe.recv(), int):
                advance(outputs)
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process that computed the oracle ended with {self._process.exitcode}") from None
        assert isinstance(outputs, tuple)
        return outputs


def _compute(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    # The parent needs a core: two pools that wait for each other's threads by spinning took three times as long.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    module, inputs, chunk = pipe.recv()
    pipe.send(outputs64(pickle.loads(module).double(), inputs, chunk, advance=pipe.send))

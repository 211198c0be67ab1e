"""The truth: float64 logits of the unfolded model, and how far float32 may be from them.

Owns the oracle's numbers and the verdicts made against it while exporting. Knows no file format.
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

from export.bundle import COARSER, Oracle, Precision, Tolerances

CHUNK = 50
"""Images at a time: 1,000 took 0.52 s in chunks of 50, 0.70 s of 250, 0.85 s at once (float64, two cores)."""


def logits64(model64: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """float64 logits [N, classes] of a float64 model for float32 model inputs [N, …]."""
    with torch.no_grad():
        parts = [model64(torch.from_numpy(inputs[i : i + CHUNK]).double()) for i in range(0, len(inputs), CHUNK)]
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

    def submit(self, module: fx.GraphModule, inputs: np.ndarray) -> None:
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


def run_in_batches(run: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, batch: int) -> np.ndarray:
    """All of `inputs` through `run`, `batch` images at a time; the last batch may be smaller."""
    return np.concatenate([run(inputs[i : i + batch]) for i in range(0, len(inputs), batch)])


def rms_error(logits: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean square difference over all logits; NaN and infinity count as infinite."""
    error = float(np.sqrt(np.mean((logits.astype(np.float64) - truth) ** 2)))
    return error if np.isfinite(error) else float("inf")


def flips(logits: np.ndarray, truth: np.ndarray, margin: float) -> list[int]:
    """Indices of inputs that are predicted differently although the truth's two highest logits are `margin` apart."""
    highest = np.sort(truth, axis=1)
    clear = highest[:, -1] - highest[:, -2] > margin
    return [int(i) for i in np.flatnonzero(clear & (logits.argmax(1) != truth.argmax(1)))]


def failure(logits: np.ndarray, oracle: Oracle, tolerances: Tolerances, precision: Precision) -> str | None:
    """Why logits of all the oracle's inputs, from a file of that precision, are not right, or None where they are."""
    truth = oracle.logits
    if precision == "float32" or logits.shape != truth.shape:
        return strict_failure(logits, oracle, tolerances)
    if not np.isfinite(logits).all():
        return f"{np.count_nonzero(~np.isfinite(logits))} of its logits are NaN or infinite"
    if truth.ndim != 2 or truth.shape[1] < 2:  # no scores of classes, so nothing is predicted
        allowed = tolerances.strict_rms_factor * COARSER[precision] * tolerances.float32_rms_error
        error = rms_error(logits, truth)
        return None if error <= allowed else f"its RMS error is {error:.2e}, allowed are {allowed:.2e}"
    if precision == "int8":
        if oracle.labels is None:
            return _flips_failure(logits, truth, tolerances.int8_flips_percent_without_labels)
        return _top1_failure(logits, oracle, tolerances.int8_top1_points) or _mcnemar_failure(
            logits, oracle, tolerances.int8_p_value
        )
    return _flips_failure(logits, truth, tolerances.fast_flips_percent) or _top1_failure(
        logits, oracle, tolerances.fast_top1_points
    )


def departure(few: np.ndarray, logits: np.ndarray, oracle: Oracle) -> str | None:
    """Why a file that gives `few` for the first inputs of `logits`, at another batch size, is not right, or None.

    Another kernel may round otherwise, but not by more than the file is off anyway.
    """
    same = logits[: len(few)]
    if few.shape != same.shape:
        return f"its output has shape {list(few.shape)} at another batch size, expected {list(same.shape)}"
    allowed, apart = rms_error(logits, oracle.logits), rms_error(few, same.astype(np.float64))
    return None if apart <= allowed else f"another batch size changes its logits by {apart:.2e} (RMS)"


def _flips_failure(logits: np.ndarray, truth: np.ndarray, percent: float) -> str | None:
    flipped = int(np.count_nonzero(logits.argmax(1) != truth.argmax(1)))
    if 100 * flipped <= percent * len(truth):
        return None
    return f"it predicts {flipped} of {len(truth)} images differently, allowed are {percent} %"


def _right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    right: np.ndarray = logits.argmax(1) == labels
    return right


def _top1_failure(logits: np.ndarray, oracle: Oracle, points: float) -> str | None:
    if oracle.labels is None:
        return None
    found, wanted = (100 * float(_right(which, oracle.labels).mean()) for which in (logits, oracle.logits))
    if abs(found - wanted) <= points + 1e-9:
        return None
    return f"its top-1 is {found:.2f} %, the float64 oracle's {wanted:.2f} %: further apart than {points} points"


def _mcnemar_failure(logits: np.ndarray, oracle: Oracle, p_value: float) -> str | None:
    """By the exact test on the images that only one of the two has right."""
    assert oracle.labels is not None
    here, there = (_right(which, oracle.labels) for which in (logits, oracle.logits))
    lost, gained = int(np.sum(there & ~here)), int(np.sum(here & ~there))
    if lost == gained:
        return None
    from scipy.stats import binomtest

    found = float(binomtest(lost, lost + gained).pvalue)
    if found > p_value:
        return None
    return f"it loses {lost} images and gains {gained}: that is no chance (exact McNemar p = {found:.2g})"


def strict_failure(logits: np.ndarray, oracle: Oracle, tolerances: Tolerances) -> str | None:
    """Why float32 logits of the oracle's first images are not right, or None where they are."""
    truth = oracle.logits[: len(logits)]
    if logits.shape != truth.shape:
        return f"its output has shape {list(logits.shape)}, expected {list(truth.shape)}"
    allowed = tolerances.strict_rms_factor * tolerances.float32_rms_error
    error = rms_error(logits, truth)
    if not error <= allowed:
        return f"its RMS error against the float64 oracle is {error:.2e}, allowed are {allowed:.2e}"
    if truth.ndim != 2 or truth.shape[1] < 2:
        return None  # no scores of classes, so nothing is predicted
    flipped = flips(logits, truth, tolerances.strict_flip_margin)
    if flipped:
        return f"it predicts {len(flipped)} images differently, the first of them number {flipped[0]}"
    return None

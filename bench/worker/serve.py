"""The child's end of the pipe: load, then answer one request after the other.

The heavy imports happen here. Knows nothing of what the answers mean.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bench.backends.contract import Backend, Options, Session
from bench.backends.registry import resolve
from bench.machine.sensors import energy_j, gpu_memory_of_this_process_bytes
from bench.results.parity import Bisection
from bench.results.terms import Timing
from bench.worker.bisect import bisect, bisectable
from bench.worker.clock import quickest_s, timed_block, timer_overhead_ns, wait_until_quiet, warm_up
from bench.worker.interrupts import take_no_interrupts
from bench.worker.loadgen import drive
from bench.worker.messages import (
    Available,
    BadBundle,
    Bisect,
    Broken,
    Close,
    Drive,
    Evaluate,
    Evaluated,
    Job,
    Loaded,
    Measure,
    Measured,
    Misplaced,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Reply,
    Request,
    Unavailable,
)
from export.bundle.detections import joined
from export.bundle.manifest import BOX_KINDS

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import numpy as np

    from export.bundle import Arrays, Bundle


# An image that takes longer by itself needs no second look: in a batch it takes half of that, seldom less.
PROBED_TOGETHER, PROBED_TOGETHER_S = 64, 0.02


def serve(pipe: Connection, job: Job, log: str) -> None:
    """The life of a worker process: load, then answer one request after the other until told to close.

    Everything that the runtime prints goes to the file `log`, where the parent looks if this process dies.
    """
    take_no_interrupts()
    _redirect_output(log)
    # Read by the runtimes when their libraries load: no pool may be larger than what was asked for.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job.options.threads)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone: there is nobody left to answer
        loading = True
        try:
            for reply in _answers(pipe, job):
                loading = False
                pipe.send(reply)
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # whatever a runtime raises: the parent says it and the other backends go on
            pipe.send(_as_reply(error, loading))


def _answers(pipe: Connection, job: Job) -> Iterator[Reply]:
    """The first answer after loading, then one for each request."""
    if job.bundle is None:
        yield from (_availability(resolve(reference)) for reference in (job.reference, *job.also))
        return
    backend = resolve(job.reference)
    if isinstance(availability := _availability(backend), Unavailable):
        yield availability
        return

    from export.bundle import Bundle

    bundle = Bundle.open(job.bundle)
    session = backend.load(bundle, job.options)
    placement = session.placement()
    if placement.stray:
        yield Misplaced(placement)
        return
    model = _Model(session, bundle, backend, job.options)
    gc.collect()
    gc.freeze()  # the imported libraries' objects: no later collection has to walk them
    wait_until_quiet()
    yield Loaded(placement, session.settings(), timer_overhead_ns())
    while not isinstance(request := cast(Request, pipe.recv()), Close):
        yield model.answer(request)
    session.close()


def _availability(backend: Backend) -> Available | Unavailable:
    reason = backend.unavailable_reason()
    return Available() if reason is None else Unavailable(reason)


class _Model:
    """The loaded session with the oracle's inputs."""

    def __init__(self, session: Session, bundle: Bundle, backend: Backend, options: Options) -> None:
        import numpy as np

        self._session = session
        self._bundle, self._backend, self._options = bundle, backend, options
        self._oracle = tuple(map(np.asarray, bundle.oracle().inputs))
        self._specs = bundle.manifest.outputs

    def answer(self, request: Probe | Evaluate | Bisect | Prepare | Measure | Drive) -> Reply:
        if isinstance(request, Probe):
            return self._probe()
        if isinstance(request, Evaluate):
            return self._evaluate(request)
        if isinstance(request, Bisect):
            return self._bisect(request.images)
        if isinstance(request, Drive):
            lists = any(spec.kind in BOX_KINDS for spec in self._specs)
            call = self._one_list if lists else partial(_end_to_end, self._session)
            driven = drive(call, self._oracle, request.load, request.folder)
            wait_until_quiet()
            return driven
        if isinstance(request, Measure) and request.cpus is not None:
            pin(request.cpus)
        raw = self._inputs(request.batch_size)
        whole = partial(_end_to_end, self._session, *raw)
        if isinstance(request, Prepare):
            outputs = joined([whole()], self._specs)
            done = warm_up(whole)  # which runs the model on the device, too
            wait_until_quiet()
            return Prepared(done, outputs)
        calls: dict[Timing, Callable[[], object]] = {
            "device_resident": partial(self._session.run, self._session.prepare(*raw)),
            "end_to_end": whole,
        }
        gpu_ns = self._session.gpu_ns
        blocks = tuple(
            timed_block(call, timing, request.seconds, energy_j, gpu_ns if timing == "device_resident" else None)
            for timing, call in calls.items()
        )
        return Measured(blocks, wait_until_quiet(), _peak_memory_bytes(), gpu_memory_of_this_process_bytes())

    def _bisect(self, images: tuple[int, ...]) -> Bisection:
        device = self._backend.device
        if device == "none" or not bisectable(self._backend, self._options.variant):
            raise TypeError(f"{self._backend.name} runs no float32 ONNX file, so there are no nodes to compare")
        return bisect(self._bundle, self._session, device, self._options, images)

    def _inputs(self, batch_size: int) -> Arrays:
        """The first `batch_size` inputs of the oracle (again from the start if it has fewer)."""
        import numpy as np

        return tuple(array[np.arange(batch_size) % len(array)] for array in self._oracle)

    def _probe(self) -> Probed:
        alone = self._bundle.manifest.fixed_batch or 1
        image_s = quickest_s(partial(_end_to_end, self._session, *self._inputs(alone))) / alone
        if image_s <= PROBED_TOGETHER_S and self._bundle.manifest.fixed_batch is None:
            together = partial(_end_to_end, self._session, *self._inputs(PROBED_TOGETHER))
            image_s = min(image_s, quickest_s(together) / PROBED_TOGETHER)
        wait_until_quiet()
        return Probed(image_s)

    def _evaluate(self, request: Evaluate) -> Evaluated:
        batch_size, stop = request.batch_size, len(self._oracle[0]) if request.stop is None else request.stop
        starts = range(request.start, stop, batch_size)
        parts = [
            _end_to_end(self._session, *(array[start : min(start + batch_size, stop)].copy() for array in self._oracle))
            for start in starts
        ]
        wait_until_quiet()
        return Evaluated(joined(parts, self._specs))

    def _one_list(self, *raw: np.ndarray) -> Arrays:
        """The outputs of one image, lists of boxes with a dimension for the batch."""
        return joined([_end_to_end(self._session, *raw)], self._specs)


def pin(cpus: tuple[int, ...]) -> None:
    """Let every thread of this process run on these CPUs only: a runtime's pool has affinities of its own."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cpus)


def _peak_memory_bytes() -> int | None:
    """The largest resident memory of this process so far; None on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # What `getrusage` says survives exec: a worker would start with the peak of the process that spawned it.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_to_end(session: Session, *raw: np.ndarray) -> Arrays:
    return session.fetch(session.run(session.prepare(*raw)))


def _as_reply(error: Exception, loading: bool) -> Reply:
    from export.bundle import BundleError

    if isinstance(error, BundleError):
        return BadBundle(str(error))
    text = "".join(traceback.format_exception(error))
    return Broken(f"{type(error).__name__}: {str(error).strip() or 'no message'}", text, loading)


def _redirect_output(log: str) -> None:
    """Send this process's stdout and stderr, those of native libraries too, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

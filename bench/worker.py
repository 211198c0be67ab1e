"""One process for each backend, so that runtimes share neither threads, nor libraries, nor a crash.

Owns both ends of the pipe: `serve`, which a spawned process runs, and `Worker`, which the parent holds. The heavy
imports happen in the child. The parent blocks while it waits, and so does an idle child: waiting costs no CPU. Knows
nothing of what the answers mean.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from bench.backend import Options, Placement, Session, Setting, resolve
from bench.measure import Block, Timing, WarmUp, timed_block, wait_until_quiet, warm_up

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    import numpy as np

    from export.bundle import Bundle

LOG_TAIL_CHARACTERS = 2_000
CLOSING_S = 5.0
HELD_BACK = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Job:
    """What a worker is started with. Without a bundle it only says whether the backend is available."""

    label: str
    reference: str
    bundle: Path | None
    options: Options


@dataclass(frozen=True)
class Evaluate:
    """Ask for the logits of all of the oracle's inputs."""

    batch_size: int


@dataclass(frozen=True)
class Prepare:
    """Ask for the warm-up at a batch size."""

    batch_size: int


@dataclass(frozen=True)
class Measure:
    """Ask for one timed block of each kind at a batch size. `seconds` is the time of one block."""

    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Close:
    """Ask the worker to end."""


Request = Evaluate | Prepare | Measure | Close


@dataclass(frozen=True)
class Available:
    """The backend can run here; said by a worker that has no bundle to load."""


@dataclass(frozen=True)
class Unavailable:
    """The backend can't run here: the reason and the remedy."""

    reason: str


@dataclass(frozen=True)
class Loaded:
    """The model is loaded, placed and ready."""

    placement: Placement
    settings: dict[str, Setting]


@dataclass(frozen=True)
class Misplaced:
    """The runtime loaded the model, but not on the device that the backend's name says."""

    placement: Placement


@dataclass(frozen=True)
class BadBundle:
    """The bundle lacks the file, or the file is not what the manifest says."""

    message: str


@dataclass(frozen=True)
class Broken:
    """The backend raised. `loading` tells a backend that can't load the file from one that failed later."""

    message: str
    trace: str
    loading: bool


@dataclass(frozen=True)
class Evaluated:
    """The logits, float32 [N, classes], in the oracle's order."""

    logits: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """The warm-up is done."""

    warm_up: WarmUp


@dataclass(frozen=True)
class Measured:
    """The timed blocks, in the order in which they ran, and how long the runtime's threads took to stop afterwards."""

    blocks: tuple[Block, ...]
    quiet_after_s: float


Reply = Available | Unavailable | Loaded | Misplaced | BadBundle | Broken | Evaluated | Prepared | Measured
R = TypeVar("R", bound=Reply)

FailureKind = Literal["crashed", "hung", "raised"]


class WorkerFailure(Exception):
    """A worker that can't go on: it crashed, did not answer in time, or its backend raised. Says which, and what is
    known.
    """

    def __init__(self, kind: FailureKind, message: str, trace: str = "", loading: bool = False) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.trace = trace
        self.loading = loading


def serve(pipe: Connection, job: Job, log: str) -> None:
    """The life of a worker process: load, then answer one request after the other until told to close.

    Everything that the runtime prints goes to the file `log`, where the parent looks if this process dies.
    """
    # Ctrl-C reaches the whole process group: the parent decides what it means, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
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
    backend = resolve(job.reference)
    reason = backend.unavailable_reason()
    if reason is not None or job.bundle is None:
        yield Available() if reason is None else Unavailable(reason)
        return

    from export.bundle import Bundle

    bundle = Bundle.open(job.bundle)
    session = backend.load(bundle, job.options)
    placement = session.placement()
    if placement.stray:
        yield Misplaced(placement)
        return
    model = _Model(session, bundle)
    gc.collect()
    gc.freeze()  # the imported libraries' objects: no later collection has to walk them
    wait_until_quiet()
    yield Loaded(placement, session.settings())
    while not isinstance(request := cast(Request, pipe.recv()), Close):
        yield model.answer(request)
    session.close()


class _Model:
    """The loaded session with the oracle's inputs."""

    def __init__(self, session: Session, bundle: Bundle) -> None:
        self._session = session
        self._raw = bundle.oracle().raw

    def answer(self, request: Evaluate | Prepare | Measure) -> Reply:
        if isinstance(request, Evaluate):
            return self._evaluate(request.batch_size)
        calls = self._calls(request.batch_size)
        if isinstance(request, Prepare):
            done = warm_up(calls["end_to_end"])  # which runs the model on the device, too
            wait_until_quiet()
            return Prepared(done)
        blocks = tuple(timed_block(call, timing, request.seconds) for timing, call in calls.items())
        return Measured(blocks, wait_until_quiet())

    def _calls(self, batch_size: int) -> dict[Timing, Callable[[], object]]:
        """The two things that are timed, on the first `batch_size` inputs of the oracle (again from the start if it has
        fewer).
        """
        import numpy as np

        session = self._session
        raw = self._raw[np.arange(batch_size) % len(self._raw)]
        return {
            "device_resident": partial(session.run, session.prepare(raw)),
            "end_to_end": partial(_end_to_end, session, raw),
        }

    def _evaluate(self, batch_size: int) -> Evaluated:
        import numpy as np

        starts = range(0, len(self._raw), batch_size)
        parts = [_end_to_end(self._session, self._raw[start : start + batch_size].copy()) for start in starts]
        wait_until_quiet()
        return Evaluated(np.concatenate(parts))


def _end_to_end(session: Session, raw: np.ndarray) -> np.ndarray:
    return session.fetch(session.run(session.prepare(raw)))


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


class Worker:
    """The parent's end: starts the process, asks, waits, and ends it.

    `timeout_s` is how long the process may take for one answer before it counts as hung.
    """

    def __init__(self, job: Job, timeout_s: float, log_folder: Path) -> None:
        self.job = job
        self._timeout_s = timeout_s
        self._log = log_folder / f"{job.label.replace(':', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, job, str(self._log))
        self._process: SpawnProcess = context.Process(target=serve, args=arguments, name=job.label, daemon=True)
        with _interrupts_held_back():
            self._process.start()
        theirs.close()  # else the pipe would stay open after the child's death
        self._patience_ends = time.monotonic() + timeout_s

    def ask(self, request: Request, expected: type[R]) -> R:
        """Send a request and wait for its answer. Raises WorkerFailure."""
        self.send(request)
        reply = self.receive()
        if not isinstance(reply, expected):
            raise TypeError(f"worker {self.job.label} answered {request} with {reply}")
        return reply

    def receive(self) -> Reply:
        """Block until the process answers, dies, or has taken too long. Raises WorkerFailure for the last two, and for
        an answer that says the backend raised."""
        remaining = max(0.0, self._patience_ends - time.monotonic())
        ready = multiprocessing.connection.wait([self._pipe, self._process.sentinel], remaining)
        if not ready:
            self.kill()
            raise WorkerFailure("hung", f"no answer within {self._timeout_s:g} s; the worker was ended")
        try:
            reply = cast(Reply, self._pipe.recv())
        except (EOFError, OSError):
            raise self._crash() from None
        if isinstance(reply, Broken):
            raise WorkerFailure("raised", reply.message, reply.trace, reply.loading)
        return reply

    def send(self, request: Request) -> None:
        """Send a request without waiting for its answer. That a worker has died is noticed by who waits for it."""
        blocks_s = 2 * request.seconds if isinstance(request, Measure) else 0.0  # asked for, so no sign of a hang
        self._patience_ends = time.monotonic() + self._timeout_s + blocks_s
        with contextlib.suppress(OSError):
            self._pipe.send(request)

    def join(self) -> None:
        """Wait a little for a process that was told to close."""
        self._process.join(CLOSING_S)

    def kill(self) -> None:
        """End the process at once. Nothing is lost: a worker keeps nothing."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()

    def _crash(self) -> WorkerFailure:
        self._process.join(CLOSING_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            cause = f"the worker was ended by {signal.Signals(-code).name}"
            if -code == getattr(signal, "SIGKILL", None):
                cause += " (if nobody did that by hand, the machine ran out of memory: try a smaller --batch-size)"
        else:
            cause = f"the worker ended with exit code {code} in the middle of its work"
        tail = self._log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].strip() if self._log.exists() else ""
        return WorkerFailure("crashed", cause, tail)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start a child with SIGINT and SIGTERM blocked, which it inherits until it serves.

    A signal in the middle of a start would print a traceback: the child's own, or that of one left half-started.
    Here it is kept, not lost: it arrives when the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    # With the first child, multiprocessing starts this helper and then unblocks both: start it beforehand.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

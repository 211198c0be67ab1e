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
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from bench.backends.contract import Backend, Options, Placement, Session, Setting, resolve
from bench.machine.sensors import energy_j, gpu_memory_of_this_process_bytes
from bench.worker.bisect import Bisection, bisect, bisectable
from bench.worker.clock import Block, Timing, WarmUp, timed_block, timer_overhead_ns, wait_until_quiet, warm_up
from bench.worker.loadgen import Driven, Load, drive

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
class Bisect:
    """Ask an ONNX backend for the first node that diverges from the torch graph, on these of the oracle's images."""

    images: tuple[int, ...]


@dataclass(frozen=True)
class Prepare:
    """Ask for the warm-up at a batch size."""

    batch_size: int


@dataclass(frozen=True)
class Measure:
    """Ask for one timed block of each kind at a batch size. `seconds` is the time of one block, `cpus` are those to run
    on; None: as before.
    """

    batch_size: int
    seconds: float
    cpus: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Drive:
    """Ask for one run of MLPerf LoadGen, which writes its logs to `folder`. `seconds` is how long it should take."""

    load: Load
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Close:
    """Ask the worker to end."""


Request = Evaluate | Bisect | Prepare | Measure | Drive | Close


@dataclass(frozen=True)
class Available:
    """The backend can run here; said by a worker that has no bundle to load."""


@dataclass(frozen=True)
class Unavailable:
    """The backend can't run here: the reason and the remedy."""

    reason: str


@dataclass(frozen=True)
class Loaded:
    """The model is loaded, placed and ready. `timer_overhead_ns` is what the clock adds to a call in this process."""

    placement: Placement
    settings: dict[str, Setting]
    timer_overhead_ns: float


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
    """The timed blocks, in the order in which they ran, how long the runtime's threads took to stop afterwards, and the
    largest memory that the process has held so far, on the host and on its GPU.
    """

    blocks: tuple[Block, ...]
    quiet_after_s: float
    peak_memory_bytes: int | None
    gpu_memory_bytes: int | None


Reply = (
    Available
    | Unavailable
    | Loaded
    | Misplaced
    | BadBundle
    | Broken
    | Evaluated
    | Bisection
    | Prepared
    | Measured
    | Driven
)
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
    model = _Model(session, bundle, backend, job.options)
    gc.collect()
    gc.freeze()  # the imported libraries' objects: no later collection has to walk them
    wait_until_quiet()
    yield Loaded(placement, session.settings(), timer_overhead_ns())
    while not isinstance(request := cast(Request, pipe.recv()), Close):
        yield model.answer(request)
    session.close()


class _Model:
    """The loaded session with the oracle's inputs."""

    def __init__(self, session: Session, bundle: Bundle, backend: Backend, options: Options) -> None:
        self._session = session
        self._bundle, self._backend, self._options = bundle, backend, options
        self._raw = bundle.oracle().raw

    def answer(self, request: Evaluate | Bisect | Prepare | Measure | Drive) -> Reply:
        if isinstance(request, Evaluate):
            return self._evaluate(request.batch_size)
        if isinstance(request, Bisect):
            return self._bisect(request.images)
        if isinstance(request, Drive):
            driven = drive(partial(_end_to_end, self._session), self._raw, request.load, request.folder)
            wait_until_quiet()
            return driven
        if isinstance(request, Measure) and request.cpus is not None:
            pin(request.cpus)
        calls = self._calls(request.batch_size)
        if isinstance(request, Prepare):
            done = warm_up(calls["end_to_end"])  # which runs the model on the device, too
            wait_until_quiet()
            return Prepared(done)
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
        self._log = log_folder / f"{job.label.replace(':', '-').replace('/', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, job, str(self._log))
        self._process: SpawnProcess = context.Process(target=serve, args=arguments, name=job.label, daemon=True)
        with interrupts_held_back():
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
        asked_s = 2 * request.seconds if isinstance(request, Measure | Drive) else 0.0  # so no sign of a hang
        self._patience_ends = time.monotonic() + self._timeout_s + asked_s
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
def interrupts_held_back() -> Iterator[None]:
    """Start a child with SIGINT and SIGTERM blocked, which it inherits until it asks for them (`take_no_interrupts`).

    A signal in the middle of a start would print a traceback: the child's own, or that of one left half-started.
    Here it is kept, not lost: it acts when the block ends. Blocking alone would not do for this process, since the
    system may hand a signal to a library's thread, whereupon Python calls the handler in the main one.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    from multiprocessing import resource_tracker

    # With the first child, multiprocessing starts this helper and then unblocks both: start it beforehand.
    resource_tracker.ensure_running()
    arrived: list[int] = []
    handlers = {number: signal.signal(number, lambda n, frame: arrived.append(n)) for number in HELD_BACK}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for kept in arrived:
        signal.raise_signal(kept)


def take_no_interrupts() -> None:
    """In a child: Ctrl-C reaches the whole process group; the parent decides what it means, and ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

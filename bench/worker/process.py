"""One process for each backend, so that runtimes share neither threads, nor libraries, nor a crash.

The parent's end of the pipe; the child's is `bench.worker.serve`. The parent blocks while it waits, and so does an idle
child: waiting costs no CPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from bench.results.terms import FailureKind
from bench.worker.interrupts import interrupts_held_back
from bench.worker.messages import Broken, Drive, Evaluate, Job, Measure, Prepare, Reply, Request
from bench.worker.serve import serve

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess


LOG_TAIL_CHARACTERS = 2_000
CLOSING_S = 5.0
R = TypeVar("R", bound=Reply)


class WorkerFailure(Exception):
    """A worker that can't go on: it crashed, did not answer in time, or its backend raised. Says which, and what is
    known.
    """

    def __init__(self, kind: FailureKind, message: str, trace: str = "", loading: bool = False) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.trace = trace
        self.loading = loading


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
        if isinstance(request, Evaluate | Prepare | Measure):
            asked_s += 2 * request.expected_s
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

"""Which backends can run here."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.backends.contract import Options
from bench.backends.registry import registered
from bench.worker.messages import Job, Unavailable
from bench.worker.process import Worker, WorkerFailure


def availability(threads: int, timeout_s: float) -> dict[str, str | None]:
    """Every backend's name with None where it can run here, else why it can't. Each has a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        jobs = [Job(name, reference, None, Options(threads)) for name, reference in registered().items()]
        workers = [Worker(job, timeout_s, Path(folder)) for job in jobs]
        try:
            return {worker.job.label: _availability(worker) for worker in workers}
        finally:
            for worker in workers:
                worker.kill()


def _availability(worker: Worker) -> str | None:
    try:
        reply = worker.receive()
    except WorkerFailure as failure:
        return f"{failure.kind} while it was tried: {failure}. {failure.trace[-500:]}".strip()
    return reply.reason if isinstance(reply, Unavailable) else None

"""Which backends can run here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from bench.backends.contract import Options
from bench.backends.registry import registered
from bench.worker.messages import Job, Unavailable
from bench.worker.process import Worker, WorkerFailure

Named = tuple[str, str]
"""A backend's name, and where the object is."""


def availability(threads: int, timeout_s: float) -> dict[str, str | None]:
    """Every backend's name with None where it can run here, else why it can't.

    The backends of a runtime share a process, which imports it once: that takes most of the time.
    """
    table = registered()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        groups = [list(group) for _, group in groupby(sorted(table.items(), key=_runtime), key=_runtime)]
        workers = [(_start(group, threads, timeout_s, Path(folder)), group) for group in groups]
        try:
            reasons = dict(entry for worker, group in workers for entry in _answers(worker, group))
        finally:
            for worker, _ in workers:
                worker.kill()
        for place, (name, where) in enumerate(table.items()):
            if name not in reasons:  # it came after one that took its process down: nothing is known of it
                worker = _start([(name, where)], threads, timeout_s, Path(folder) / f"{place}")
                try:
                    reasons |= dict(_answers(worker, [(name, where)]))
                finally:
                    worker.kill()
    return {name: reasons[name] for name in table}


def _runtime(entry: Named) -> str:
    """The module without what follows its first underscore: `torch_program` and `torch_aot` are both of torch."""
    package, _, module = entry[1].partition(":")[0].rpartition(".")
    return f"{package}.{module.partition('_')[0]}"


def _start(group: Sequence[Named], threads: int, timeout_s: float, folder: Path) -> Worker:
    folder.mkdir(exist_ok=True)
    (name, where), *others = group
    return Worker(Job(name, where, None, Options(threads), tuple(other for _, other in others)), timeout_s, folder)


def _answers(worker: Worker, group: Sequence[Named]) -> Iterator[tuple[str, str | None]]:
    """What is said of each of them, up to one that takes the process down."""
    for name, _ in group:
        try:
            reply = worker.receive()
        except WorkerFailure as failure:
            yield name, f"{failure.kind} while it was tried: {failure}. {failure.trace[-500:]}".strip()
            return
        yield name, reply.reason if isinstance(reply, Unavailable) else None

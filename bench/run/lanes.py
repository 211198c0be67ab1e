"""A worker process for each subject of a plan, one after another, and what is known of it so far.

Owns starting and ending them, what becomes of one that fails, and what a lane leaves in the result. Knows neither the
order in which they are asked nor what for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.backends.contract import Placement, Setting
from bench.backends.registry import registered
from bench.errors import EXIT_BAD_INPUT, EXIT_UNAVAILABLE, BenchError
from bench.machine.environment import Environment, describe
from bench.results.parity import Bisection, ParityVerdict
from bench.results.schema import BundleFacts, Failure, FileFacts, Skipped, SubjectResult, WarmUpFacts
from bench.run.plan import Plan, Subject, lettered, opened, select
from bench.worker.messages import BadBundle, Close, Job, Loaded, Misplaced, Request, Unavailable
from bench.worker.process import R, Worker, WorkerFailure

STRAY_NODES_SHOWN = 5


class Lane:
    """A subject's worker, one process after another, and what is known of it so far.

    `parity`, `warm_ups` and the memory are filled by who proves and measures; `failure` says why it takes no further
    part.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._worker: Worker | None = None
        self.placement: Placement | None = None
        self.settings: dict[str, Setting] = {}
        self.timer_overhead_ns: float | None = None
        self.peak_memory_bytes: int | None = None
        self.peak_gpu_memory_bytes: int | None = None
        self.warm_ups: list[WarmUpFacts] = []
        self.parity: ParityVerdict | None = None
        self.bisection: Bisection | None = None
        self.failure: Failure | None = None

    @property
    def worker(self) -> Worker:
        """The process that runs now."""
        if self._worker is None:
            raise RuntimeError(f"no process of {self.subject.label} was started")
        return self._worker

    def start(self, timeout_s: float, log_folder: Path) -> None:
        """Start a process, which begins to load at once."""
        subject = self.subject
        job = Job(subject.label, registered()[subject.backend.name], subject.bundle.path, subject.options)
        self._worker = Worker(job, timeout_s, log_folder)

    def close(self) -> None:
        """Tell the process to end."""
        if self.failure is None:
            self.worker.send(Close())

    def end(self) -> None:
        """End the process, if there is one: after `close` wait for it a little, else at once."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def ask(self, request: Request, expected: type[R]) -> R | None:
        """The worker's answer, or None when it failed now: then this lane takes no further part."""
        try:
            return self.worker.ask(request, expected)
        except WorkerFailure as failure:
            self.fail(failure)
            return None

    def fail(self, failure: WorkerFailure) -> None:
        self.worker.kill()
        self.failure = Failure(kind=failure.kind, message=str(failure), trace=failure.trace)


@dataclass(frozen=True)
class Ready:
    """What measuring starts from: the bundles, the machine before anything ran, and a lane for each subject.

    `skipped` are the backends that nobody named and that can't run here.
    """

    bundles: tuple[BundleFacts, ...]
    environment: Environment
    lanes: list[Lane]
    skipped: list[Skipped]


def lanes_of(plan: Plan) -> Ready:
    """Check the bundles of `plan` and choose the subjects; starts nothing.

    Raises BenchError: an unknown backend, a bad bundle.
    """
    paths = plan.selection.bundles
    # Resolved once: a new export swaps the folder behind a link, and all of a run must see the same bundle.
    bundles = lettered([opened(path) for path in paths])
    subjects, skipped = select(bundles, plan)
    facts = tuple(
        BundleFacts(
            letter=letter, path=str(path), name=bundle.manifest.name, digest=bundle.digest, fold=bundle.manifest.fold
        )
        for path, (letter, bundle) in zip(paths, bundles, strict=True)
    )
    return Ready(facts, describe(), [Lane(subject) for subject in subjects], skipped)


@contextmanager
def loaded(ready: Ready, plan: Plan, *, again: bool = False) -> Iterator[list[Lane]]:
    """Every lane that has not failed, its subject loaded in a process of its own; however this ends, none is left.

    All load at the same time: nothing is measured yet. Those that can't run here leave `ready`, if nobody asked for
    them. `again`: they could before, so one that fails now is a finding.

    Raises BenchError: an unavailable backend, a bad bundle, a row that would lie.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        lanes = [lane for lane in ready.lanes if lane.failure is None]
        try:
            for lane in lanes:
                lane.start(plan.timeout_s, Path(folder))
            ready.skipped.extend(_load(lanes, asked=plan.selection.backends is not None and not again))
            ready.lanes[:] = [lane for lane in ready.lanes if lane in lanes or lane.failure is not None]
            yield lanes
            for lane in lanes:
                lane.close()
            for lane in lanes:
                lane.worker.join()
        finally:
            for lane in lanes:
                lane.end()


def subject_result(lane: Lane) -> SubjectResult:
    """What is known of a lane by now."""
    backend, entry = lane.subject.backend, lane.subject.entry
    file = None
    if entry is not None:
        file = FileFacts(
            path=entry.path,
            sha256=entry.sha256,
            folded=entry.folded,
            precision=entry.precision,
            opset=entry.opset,
            bytes=entry.bytes + sum(companion.bytes for companion in entry.companions),
        )
    return SubjectResult(
        label=lane.subject.label,
        backend=backend.name,
        variant=lane.subject.options.variant,
        threads=lane.subject.options.threads,
        letter=lane.subject.letter,
        device=backend.device,
        file=file,
        placement=lane.placement,
        settings=lane.settings,
        timer_overhead_ns=lane.timer_overhead_ns,
        peak_memory_bytes=lane.peak_memory_bytes,
        peak_gpu_memory_bytes=lane.peak_gpu_memory_bytes,
        warm_ups=tuple(lane.warm_ups),
        parity=lane.parity,
        bisection=lane.bisection,
        failure=lane.failure,
    )


def _load(lanes: list[Lane], asked: bool) -> list[Skipped]:
    """Wait until every worker has loaded. Takes those out of `lanes` that can't run here, if nobody asked for them.

    Raises BenchError, after all have answered: unavailable for a backend that was asked for and can't run, and for any
    whose nodes are not where its name says.
    """
    skipped: list[Skipped] = []
    problems: list[str] = []
    for lane in list(lanes):
        label = lane.subject.label
        try:
            reply = lane.worker.receive()
        except WorkerFailure as failure:
            if asked and failure.loading:
                problems.append(f"{label} can't load its file here: {failure}")
            lane.fail(failure)
            continue
        if isinstance(reply, Loaded):
            lane.placement, lane.settings = reply.placement, reply.settings
            lane.timer_overhead_ns = reply.timer_overhead_ns
        elif isinstance(reply, Misplaced):
            stray = list(reply.placement.stray)
            shown = "; ".join(stray[:STRAY_NODES_SHOWN]) + ("; …" if len(stray) > STRAY_NODES_SHOWN else "")
            problems.append(
                f"{label} would not run where its name says: {len(stray)} of the model's nodes or tensors are "
                f"elsewhere ({shown}). Its figures would be those of another device; see bench backends, and check the "
                "runtime's installation and whether it supports these operators on the device."
            )
        elif isinstance(reply, Unavailable):
            if asked:
                problems.append(f"{label} is not available: {reply.reason}")
            else:
                skipped.append(Skipped(backend=label, reason=reply.reason))
                lanes.remove(lane)
                lane.end()
        elif isinstance(reply, BadBundle):
            raise BenchError(reply.message, EXIT_BAD_INPUT)
    if not lanes:
        problems = [f"{entry.backend}: {entry.reason}" for entry in skipped]
    if problems:
        raise BenchError(" ".join(problems), EXIT_UNAVAILABLE)
    return skipped

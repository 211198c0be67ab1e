"""A run from beginning to end: choose, load, prove parity, warm up, measure in interleaved rounds.

Owns the order of things and what becomes of a backend that fails. Knows no runtime: it speaks to workers.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench import sensors
from bench.backend import BACKENDS, Backend, Device, Options, Placement, Profile, Setting, file_of, find_backend
from bench.bisect import Bisection, bisectable
from bench.environment import Environment, cpu_busy_percent, describe, load_1min
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.parity import ParityVerdict, judge, worst_images
from bench.results import (
    SCHEMA_VERSION,
    BundleFacts,
    Failure,
    FileFacts,
    Result,
    Sample,
    Settings,
    Skipped,
    SubjectResult,
    WarmUpFacts,
)
from bench.roofline import Survey, survey
from bench.summary import CONTROL_SUFFIX, decided, enough, label_of, ratios, roofline, rows
from bench.worker import (
    BadBundle,
    Bisect,
    Close,
    Evaluate,
    Evaluated,
    Job,
    Loaded,
    Measure,
    Measured,
    Misplaced,
    Prepare,
    Prepared,
    R,
    Request,
    Unavailable,
    Worker,
    WorkerFailure,
)
from export.bundle import FLOAT32, VARIANTS, Bundle, BundleError, FileEntry

if TYPE_CHECKING:
    import numpy as np

    from export.bundle import Oracle

Progress = Callable[[str, float], None]
"""Told what is being done and the share of the run that is done (0 to 1)."""

# Any size would do; this one doesn't divide the usual counts of images, so that every backend is judged at two batch
# sizes.
PARITY_BATCH_SIZE = 192
# Rounds whose number is not given: the first look at them, and the last of all.
MIN_ROUNDS, MAX_ROUNDS = 10, 200
STRAY_NODES_SHOWN = 5
# Enough to tell a value from another; every intermediate of so many is in memory at once.
BISECTED_IMAGES = 8


@dataclass(frozen=True)
class Choice:
    """A backend with the variant of the file that it is to run, and the threads of its pool."""

    backend: str
    variant: str = FLOAT32
    threads: int | None = None
    """None: the plan's."""


@dataclass(frozen=True)
class Plan:
    """What to run: with nothing else said, the parity alone.

    Attributes:
        bundles: what to run, in the same rounds; the first is what the others are compared with.
        backends: names, or None for all that are available here, but those that run on request only.
        variants: of the files; each backend runs those that the bundle has for it.
        choices: in place of `variants`, and of `backends` where these are None, each combination by itself. Nobody
            named them: one that can't run, or can't load its file, is a finding and not the end of the run.
        device: where no backend is named, only those on this device; None is all of them.
        control: the backends that also run the first bundle's unfolded file, if they run its folded one.
        rounds: how often every backend gets its turn at every batch size; 0 measures nothing and leaves the parity.
            None: until more rounds would tell little more (see `bench.summary.enough`), at most `MAX_ROUNDS`.
        bound: where it is given, and `rounds` isn't, rounds go on until every ratio against the first bundle lies on
            one side of it with its whole interval.
        survey: also measure the machine's peaks, for the roofline (some seconds).
        time_limit_s: no further round begins when the run has taken this long; None is no limit.
        block_s: how long one timed block lasts, in seconds.
        timeout_s: how long a worker may take for one answer.
        command: the command line, for the result.
        bisect: after which verdicts on an ONNX backend to look for the first node that diverges.
    """

    bundles: tuple[Path, ...]
    backends: tuple[str, ...] | None
    threads: int
    profile: Profile
    timeout_s: float
    control: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    rounds: int | None = 0
    bound: float | None = None
    survey: bool = False
    time_limit_s: float | None = None
    block_s: float = 0.0
    bisect: Literal["never", "failed", "always"] = "never"
    device: Device | None = None
    variants: tuple[str, ...] = (FLOAT32,)
    choices: tuple[Choice, ...] | None = None
    command: str | None = None


@dataclass(frozen=True)
class Subject:
    """A backend with the file it runs. `letter` tells the bundles of a run apart; None where there is but one."""

    backend: Backend
    bundle: Bundle
    letter: str | None
    options: Options
    label: str
    control: bool = False

    @property
    def entry(self) -> FileEntry | None:
        """The file; None for the backend that computes nothing."""
        return file_of(self.backend, self.bundle, self.options)


class Lane:
    """A subject's worker and what is known of it so far.

    `parity` and `warm_ups` are filled by who proves and measures; `failure` says why it takes no further part.
    """

    def __init__(self, subject: Subject, worker: Worker) -> None:
        self.subject = subject
        self.worker = worker
        self.placement: Placement | None = None
        self.settings: dict[str, Setting] = {}
        self.timer_overhead_ns: float | None = None
        self.peak_memory_bytes: int | None = None
        self.peak_gpu_memory_bytes: int | None = None
        self.warm_ups: list[WarmUpFacts] = []
        self.parity: ParityVerdict | None = None
        self.bisection: Bisection | None = None
        self.failure: Failure | None = None

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
    """What measuring starts from: the bundles, the machine before anything ran, and a loaded worker for each subject.

    `skipped` are the backends that nobody named and that can't run here.
    """

    bundles: tuple[BundleFacts, ...]
    environment: Environment
    lanes: list[Lane]
    skipped: tuple[Skipped, ...]


@contextmanager
def loaded(plan: Plan, progress: Progress) -> Iterator[Ready]:
    """Check the bundles of `plan`, choose the subjects, load each in a worker; however this ends, no worker is left.

    Raises BenchError: an unknown or unavailable backend, a bad bundle, a row that would lie.
    """
    progress("checking the bundle", 0.0)
    # Resolved once: a new export swaps the folder behind a link, and all of a run must see the same bundle.
    bundles = _letters([_open(path.resolve()) for path in plan.bundles])
    subjects, skipped = select(bundles, plan)
    environment = describe()
    progress("starting the backends", 0.01)
    with _workers(plan, subjects) as lanes:
        skipped += _load(lanes, asked=plan.backends is not None)
        facts = tuple(
            BundleFacts(
                letter=letter,
                path=str(path),
                name=bundle.manifest.name,
                digest=bundle.digest,
                fold=bundle.manifest.fold,
            )
            for path, (letter, bundle) in zip(plan.bundles, bundles, strict=True)
        )
        yield Ready(facts, environment, lanes, tuple(skipped))


def run(plan: Plan, progress: Progress) -> Result:
    """Do all of `plan` and return what was found; a failed parity or worker is part of the result, see `exit_code`.

    Raises BenchError where nothing was measured: an unknown or unavailable backend, a bad bundle, a row that would lie.
    """
    started_at = datetime.now(UTC)
    deadline = time.monotonic() + (math.inf if plan.time_limit_s is None else plan.time_limit_s)
    with loaded(plan, progress) as ready:
        surveyed = _survey(plan, ready.lanes, progress)
        before = sensors.read()
        samples = _prove_and_measure(plan, ready.lanes, deadline, progress)
        readings = before, sensors.read()
        results = tuple(subject_result(lane) for lane in ready.lanes)
        busy_at_end = cpu_busy_percent()
    progress("done", 1.0)
    return Result(
        schema_version=SCHEMA_VERSION,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        load_1min_at_end=load_1min(),
        cpu_busy_percent_at_end=busy_at_end,
        settings=Settings(
            profile=plan.profile,
            threads=plan.threads,
            batch_sizes=plan.batch_sizes,
            rounds=plan.rounds,
            time_limit_s=plan.time_limit_s,
            block_s=plan.block_s,
            timeout_s=plan.timeout_s,
        ),
        bundles=ready.bundles,
        environment=ready.environment,
        readings=readings,
        subjects=results,
        skipped=ready.skipped,
        samples=samples,
        rows=(found := rows(samples, results)),
        survey=surveyed,
        roofline=roofline(found, results, surveyed),
        ratios=ratios(samples, results),
        command=plan.command,
    )


def exit_code(result: Result) -> int:
    """0, or 1 when a parity failed or a backend did not finish."""
    failed = any(subject.failure or (subject.parity and not subject.parity.passed) for subject in result.subjects)
    return EXIT_NEGATIVE if failed else 0


def availability(threads: int, timeout_s: float) -> dict[str, str | None]:
    """Every backend's name with None where it can run here, else why it can't. Each has a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        jobs = [Job(name, reference, None, Options(threads)) for name, reference in BACKENDS.items()]
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


def _open(path: Path) -> Bundle:
    """The bundle with every hash checked. Raises BenchError (bad input)."""
    try:
        bundle = Bundle.open(path)
        bundle.verify()
    except BundleError as error:
        raise BenchError(str(error), EXIT_BAD_INPUT) from None
    return bundle


def _letters(bundles: list[Bundle]) -> list[tuple[str | None, Bundle]]:
    """A, B, C … before each bundle, None where there is but one."""
    return [(chr(ord("A") + place) if len(bundles) > 1 else None, bundle) for place, bundle in enumerate(bundles)]


def select(bundles: list[tuple[str | None, Bundle]], plan: Plan) -> tuple[list[Subject], list[Skipped]]:
    """The subjects of a run, and the backends that nobody named and a bundle has no file for. Raises BenchError."""
    choices = plan.choices or _choices(plan)
    subjects: list[Subject] = []
    skipped: list[Skipped] = []
    for (name, chosen), (letter, bundle) in itertools.product(_by_backend(choices).items(), bundles):
        backend = find_backend(name)
        first = letter == bundles[0][0]
        if not backend.formats:
            if first:
                subjects.append(_subject(chosen[0], bundle, None, plan, folded=False))
            continue
        found = [subject for choice in chosen for subject in _with_file(choice, bundle, letter, plan)]
        made = list({subject.label: subject for subject in found}.values())
        if not made:
            wanted = ", ".join(dict.fromkeys(choice.variant for choice in chosen))
            reason = (
                f"the bundle at {bundle.path} has no {' or '.join(backend.formats)} file ({wanted}). Export it again: "
                "python -m export --help says which options make one."
            )
            if plan.backends is not None:
                raise BenchError(f"{name}: {reason}", EXIT_BAD_INPUT)
            skipped.append(Skipped(backend=name, reason=reason))
        subjects += made
        control = _control(made, plan) if name in plan.control and first else None
        if control is not None:
            subjects.append(control)
    _require_variants(plan, subjects)
    if plan.control and not any(subject.control for subject in subjects):
        names = ", ".join(_by_backend(choices))
        raise BenchError(
            f"--control measures a folded file against its unfolded one, but none of the chosen backends ({names}) "
            "has both in this bundle. Choose onnx-cpu, for example.",
            EXIT_USAGE,
        )
    return subjects, skipped


def check_variants(variants: Sequence[str]) -> None:
    """Raises BenchError (usage) for a name that is no variant."""
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise BenchError(f"unknown variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}.", EXIT_USAGE)


def _choices(plan: Plan) -> tuple[Choice, ...]:
    """Every backend that was named, or that runs without being named, with every variant."""
    check_variants(plan.variants)
    names = plan.backends or tuple(name for name in BACKENDS if _runs_unasked(find_backend(name), plan.device))
    return tuple(Choice(name, variant) for name in names for variant in plan.variants)


def _runs_unasked(backend: Backend, device: Device | None) -> bool:
    return not backend.on_request and device in (None, backend.device)


def _by_backend(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    grouped: dict[str, list[Choice]] = {}
    for choice in dict.fromkeys(choices):
        grouped.setdefault(choice.backend, []).append(choice)
    return grouped


def _with_file(choice: Choice, bundle: Bundle, letter: str | None, plan: Plan) -> list[Subject]:
    """The subject of a choice, none where the bundle has no such file. The reference runs but its one file."""
    backend = find_backend(choice.backend)
    if backend.reference:
        choice = replace(choice, variant=FLOAT32)
    kinds = [False] if backend.reference else [True, False]
    made = [_subject(choice, bundle, letter, plan, folded) for folded in kinds]
    return [subject for subject in made if subject.entry is not None][:1]


def _subject(choice: Choice, bundle: Bundle, letter: str | None, plan: Plan, folded: bool) -> Subject:
    options = Options(choice.threads or plan.threads, plan.profile, folded, choice.variant)
    other_threads = None if options.threads == plan.threads else options.threads
    label = label_of(choice.backend, choice.variant, other_threads, letter)
    return Subject(find_backend(choice.backend), bundle, letter, options, label)


def _control(made: Sequence[Subject], plan: Plan) -> Subject | None:
    """The float32 file's unfolded twin, where both are there."""
    for subject in made:
        options = replace(subject.options, folded=False)
        if subject.options.folded and subject.options.variant == FLOAT32:
            twin = replace(subject, options=options, label=subject.label + CONTROL_SUFFIX, control=True)
            return twin if twin.entry is not None else None
    return None


def _require_variants(plan: Plan, subjects: Sequence[Subject]) -> None:
    """Raises BenchError (bad input) for a variant that was asked for and that no backend has a file of."""
    have = {subject.options.variant for subject in subjects}
    missing = [variant for variant in plan.variants if variant not in have]
    if missing and plan.choices is None and plan.variants != (FLOAT32,):
        raise BenchError(
            f"no backend that was chosen has a {missing[0]} file in this bundle. Export it again with --variant "
            f"{missing[0]}, or name a backend that runs such files with --backend.",
            EXIT_BAD_INPUT,
        )


@contextmanager
def _workers(plan: Plan, subjects: Sequence[Subject]) -> Iterator[list[Lane]]:
    """A started worker for each subject. All load at the same time: nothing is measured yet. However this ends, none is
    left.
    """
    lanes: list[Lane] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for subject in subjects:
                job = Job(subject.label, BACKENDS[subject.backend.name], subject.bundle.path, subject.options)
                lanes.append(Lane(subject, Worker(job, plan.timeout_s, Path(folder))))
            yield lanes
            for lane in lanes:
                if lane.failure is None:
                    lane.worker.send(Close())
            for lane in lanes:
                lane.worker.join()
        finally:
            for lane in lanes:
                lane.worker.kill()


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
                lane.worker.kill()
        elif isinstance(reply, BadBundle):
            raise BenchError(reply.message, EXIT_BAD_INPUT)
    if not lanes:
        problems = [f"{entry.backend}: {entry.reason}" for entry in skipped]
    if problems:
        raise BenchError(" ".join(problems), EXIT_UNAVAILABLE)
    return skipped


def _prove_and_measure(plan: Plan, lanes: list[Lane], deadline: float, progress: Progress) -> tuple[Sample, ...]:
    """Parity of every lane, then its warm-ups, then the rounds. One worker at a time does anything.

    After `deadline` (on the clock of `time.monotonic`) no round begins but the first.
    """
    rounds = MAX_ROUNDS if plan.rounds is None else plan.rounds
    began = time.monotonic()
    steps = len(lanes) * (1 + (len(plan.batch_sizes) * (1 + rounds) if rounds else 0))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        elapsed = (time.monotonic() - began) / (deadline - began) if deadline > began else 1.0
        progress(what, min(1.0, max(done / steps, elapsed)))
        done += 1

    for lane in lanes:
        step(f"parity of {lane.subject.label}")
        if lane.failure is not None or not lane.subject.backend.formats:
            continue
        evaluated = lane.ask(Evaluate(PARITY_BATCH_SIZE), Evaluated)
        if evaluated is not None:
            subject = lane.subject
            oracle = subject.bundle.oracle()
            lane.parity = verdict_of(subject, evaluated.logits, oracle)
            wanted = plan.bisect == "always" or (plan.bisect == "failed" and not lane.parity.passed)
            if wanted and bisectable(subject.backend, subject.options.variant):
                worst = worst_images(evaluated.logits, oracle, BISECTED_IMAGES)
                lane.bisection = lane.ask(Bisect(worst), Bisection)
    if not rounds:
        return ()
    for lane in lanes:
        for batch_size in plan.batch_sizes:
            step(f"warming up {lane.subject.label}, batch {batch_size}")
            if lane.failure is None and (prepared := lane.ask(Prepare(batch_size), Prepared)) is not None:
                lane.warm_ups.append(WarmUpFacts(batch_size=batch_size, **asdict(prepared.warm_up)))
    samples: list[Sample] = []
    for round_ in range(rounds):
        if round_ and time.monotonic() > deadline:
            break
        if plan.rounds is None and round_ >= MIN_ROUNDS and _enough(plan, lanes, samples):
            break
        # Each round starts with the next lane: who follows whom would otherwise favour the same one every time.
        turns = [lanes[(place + round_) % len(lanes)] for place in range(len(lanes))]
        for batch_size in plan.batch_sizes:
            for position, lane in enumerate(turns):
                step(f"round {round_ + 1}: {lane.subject.label}, batch {batch_size}")
                if lane.failure is None:
                    # The CPUs change when everyone has been the first on them.
                    cpus = cpus_for(round_ // len(lanes), lane.subject.options.threads)
                    samples += _turn(lane, Measure(batch_size, plan.block_s, cpus), round_, position)
    return tuple(samples)


def verdict_of(subject: Subject, logits: np.ndarray, oracle: Oracle) -> ParityVerdict:
    """The verdict on a subject's logits of all of its oracle's inputs."""
    precision = FLOAT32 if subject.entry is None else subject.entry.precision
    return judge(logits, oracle, subject.bundle.manifest.tolerances, subject.options.profile, precision)


def _survey(plan: Plan, lanes: list[Lane], progress: Progress) -> Survey | None:
    """The model's work (the first bundle's) and the peaks of the devices in use, while the workers wait."""
    devices = tuple(dict.fromkeys(d for lane in lanes if (d := lane.subject.backend.device) != "none"))
    if not plan.survey or not devices:
        return None
    progress("measuring the machine's peaks", 0.02)
    return survey(lanes[0].subject.bundle.path, devices, plan.threads, plan.profile, plan.timeout_s)


def _enough(plan: Plan, lanes: list[Lane], samples: list[Sample]) -> bool:
    """Whether another round is not needed, for the backends that still run."""
    alive = [subject_result(lane) for lane in lanes if lane.failure is None]
    labels = {subject.label for subject in alive}
    own = [sample for sample in samples if sample.subject in labels]
    return enough(own) if plan.bound is None else decided(own, alive, plan.bound)


def cpus_for(turn: int, threads: int) -> tuple[int, ...] | None:
    """The CPUs for everybody's `turn`-th turn; None where the threads need all of them, or the system can't be told.

    A process tends to stay on the CPU that it started on, and of a machine that others use too, one CPU is slower than
    another: who happened to start on it would look slower for the whole run. So all take turns on the same ones.
    """
    if not sys.platform.startswith("linux"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    if threads >= len(usable):
        return None
    return tuple(sorted(usable[(turn * threads + place) % len(usable)] for place in range(threads)))


def _turn(lane: Lane, request: Measure, round_: int, position: int) -> list[Sample]:
    measured = lane.ask(request, Measured)
    if measured is None:
        return []
    lane.peak_memory_bytes = measured.peak_memory_bytes
    if measured.gpu_memory_bytes is not None:
        lane.peak_gpu_memory_bytes = max(measured.gpu_memory_bytes, lane.peak_gpu_memory_bytes or 0)
    return [
        Sample(
            subject=lane.subject.label,
            batch_size=request.batch_size,
            round=round_,
            position=position,
            timing=block.timing,
            started_at_unix_s=block.started_at_unix_s,
            started_at_monotonic_ns=block.started_at_monotonic_ns,
            durations_ns=block.durations_ns,
            energy_j=block.energy_j,
            gpu_durations_ns=block.gpu_durations_ns,
            cpus=request.cpus,
            quiet_after_s=measured.quiet_after_s,
        )
        for block in measured.blocks
    ]


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

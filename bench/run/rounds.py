"""A run from beginning to end: prove parity, warm up, measure in interleaved rounds.

Owns the order of things. Knows no runtime: it speaks to workers (`bench.run.lanes`), about what the plan chose
(`bench.run.plan`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bench.machine import sensors
from bench.machine.environment import cpu_busy_percent, load_1min
from bench.results.derive import decided, enough, ratios, roofline, rows
from bench.results.parity import Bisection, ParityVerdict, judge, worst_images
from bench.results.roofline import Survey
from bench.results.schema import SCHEMA_VERSION, Result, Sample, Settings, WarmUpFacts
from bench.run.lanes import Lane, loaded, subject_result
from bench.run.plan import Plan, Progress, Subject
from bench.worker.bisect import bisectable
from bench.worker.messages import Bisect, Evaluate, Evaluated, Measure, Measured, Prepare, Prepared
from bench.worker.peaks import survey
from export.bundle import FLOAT32

if TYPE_CHECKING:
    import numpy as np

    from export.bundle import Oracle

# Any size would do; this one doesn't divide the usual counts of images, so that every backend is judged at two batch
# sizes.
PARITY_BATCH_SIZE = 192
# Rounds whose number is not given: the first look at them, and the last of all.
MIN_ROUNDS, MAX_ROUNDS = 10, 200
# Enough to tell a value from another; every intermediate of so many is in memory at once.
BISECTED_IMAGES = 8


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
        rows=(new_rows := rows(samples, results)),
        survey=surveyed,
        roofline=roofline(new_rows, results, surveyed),
        ratios=ratios(samples, results),
        command=plan.command,
    )


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
    their_samples = [sample for sample in samples if sample.subject in labels]
    return enough(their_samples) if plan.bound is None else decided(their_samples, alive, plan.bound)


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

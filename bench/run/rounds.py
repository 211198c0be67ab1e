"""A run from beginning to end: prove parity, warm up, measure in interleaved rounds, and that in several processes.

Owns the order of things. Knows no runtime: it speaks to workers (`bench.run.lanes`), about what the plan chose
(`bench.run.plan`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench.machine import sensors
from bench.machine.environment import cpu_busy_percent, load_1min, mostly_busy
from bench.results.derive import decided, enough, ratios, roofline, rows, stable
from bench.results.parity import Bisection, ParityVerdict, at_batch, judge, worst_images
from bench.results.roofline import Survey
from bench.results.schema import SCHEMA_VERSION, Result, Sample, Settings, WarmUpFacts
from bench.run.lanes import Lane, Ready, lanes_of, loaded, subject_result
from bench.run.plan import Listener, Plan, Progress, Rounds, Subject, has_torch_program
from bench.worker.bisect import bisectable
from bench.worker.messages import Bisect, Evaluate, Evaluated, Measure, Measured, Prepare, Prepared
from bench.worker.peaks import survey

if TYPE_CHECKING:
    from export.bundle import Arrays, Oracle

# Any size would do; this one doesn't divide the usual counts of images, so that every backend is judged at two batch
# sizes at least.
PARITY_BATCH_SIZE = 192
# Rounds whose number is not given: the first look at them, and the last of all, in one process.
MIN_ROUNDS, MAX_ROUNDS = 6, 200
# Processes whose number is not given: before that many nothing is decided.
MIN_PROCESSES = 5
# Enough to tell a value from another; every intermediate of so many is in memory at once.
BISECTED_IMAGES = 8


def run(plan: Plan, progress: Progress, listener: Listener | None = None) -> Result:
    """Do all of `plan` and return what was found; a failed parity or worker is part of the result, see `exit_code`.

    `listener` is told the rows that are known so far, in the first round of every process after each batch size.

    An interrupt (KeyboardInterrupt) after the first round ends the measuring and not the run: its result has
    `interrupted`, and the rounds that were done.

    Raises BenchError where nothing was measured: an unknown or unavailable backend, a bad bundle, a row that would lie.
    """
    started_at = datetime.now(UTC)
    began = time.monotonic()
    ready = lanes_of(plan)
    measuring = _Measuring(plan, ready, began, progress, listener)
    before = sensors.read()
    interrupted = False
    try:
        measuring.all_processes()
    except KeyboardInterrupt:
        if not measuring.samples:
            raise
        interrupted = True
    results, samples = tuple(map(subject_result, ready.lanes)), tuple(measuring.samples)
    progress("done", 1.0)
    rounds = plan.rounds
    return Result(
        schema_version=SCHEMA_VERSION,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        load_1min_at_end=load_1min(),
        cpu_busy_percents=tuple(measuring.busy),
        settings=Settings(
            profile=plan.profile,
            threads=plan.threads,
            batch_sizes=() if rounds is None else rounds.batch_sizes,
            processes=0 if rounds is None else rounds.processes,
            rounds=0 if rounds is None else rounds.count,
            time_limit_s=None if rounds is None else rounds.time_limit_s,
            block_s=0.0 if rounds is None else rounds.block_s,
            timeout_s=plan.timeout_s,
        ),
        bundles=ready.bundles,
        environment=ready.environment,
        readings=(before, *(measuring.readings or [sensors.read()])),
        subjects=results,
        skipped=tuple(ready.skipped),
        samples=samples,
        rows=(new_rows := rows(samples, results)),
        survey=measuring.survey,
        roofline=roofline(new_rows, results, measuring.survey),
        ratios=ratios(samples, results),
        command=plan.command,
        interrupted=interrupted,
    )


class _Measuring:
    """The processes of a run, one after another, and what came of them. One worker at a time does anything."""

    def __init__(self, plan: Plan, ready: Ready, began: float, progress: Progress, listener: Listener | None) -> None:
        self.plan, self.ready, self.began = plan, ready, began
        self.progress, self.listener = progress, listener
        limit_s = None if plan.rounds is None else plan.rounds.time_limit_s
        self.deadline = math.inf if limit_s is None else began + limit_s
        self.samples: list[Sample] = []
        self.busy: list[float] = []
        self.readings: list[sensors.Reading] = []
        self.survey: Survey | None = None
        self._oracles: dict[Path, Oracle] = {}

    def all_processes(self) -> None:
        """Process after process, until there were as many as the plan says, or nothing more is to be learnt."""
        rounds = self.plan.rounds
        number = 0
        while True:
            began = time.monotonic()
            limit = self.deadline
            if rounds is not None and rounds.count is None and rounds.processes is not None:
                # As much time for each process, with what it takes to start.
                limit = began + (self.deadline - began) / (rounds.processes - number)
            with loaded(self.ready, self.plan, again=number > 0) as lanes:
                if not number:
                    self.prove(lanes)
                if rounds is not None:
                    self.measure(lanes, rounds, number, limit)
                if not number and self.plan.survey:
                    self.survey = _survey(self.plan, lanes, self.show)
            # While no worker runs: whatever uses the CPUs now is not of this run.
            self.busy.append(cpu_busy_percent())
            number += 1
            if rounds is None or number == rounds.processes or all(lane.failure for lane in self.ready.lanes):
                return
            now = time.monotonic()
            # Another process needs half of what this one took at least, to start and for a round.
            if now + (now - began) / 2 > self.deadline or self.settled(rounds, number):
                return

    def settled(self, rounds: Rounds, number: int) -> bool:
        """Whether another process would tell nothing more, of the lanes that still run."""
        alive = [subject_result(lane) for lane in self.ready.lanes if lane.failure is None]
        labels = {subject.label for subject in alive}
        samples = [sample for sample in self.samples if sample.subject in labels]
        if rounds.bound is not None:
            busy = mostly_busy((self.ready.environment.cpu_busy_percent, *self.busy))
            # On a busy machine nothing would be called slower: it is worth waiting for a quiet one.
            return not busy and number >= MIN_PROCESSES and decided(samples, alive, rounds.bound)
        return rounds.count is None and stable(samples)

    def prove(self, lanes: list[Lane]) -> None:
        """The verdict on every lane, from the logits of all inputs."""
        for lane in lanes:
            self.show(f"parity of {lane.subject.label}")
            if lane.failure is not None or not lane.subject.backend.formats:
                continue
            evaluated = lane.ask(Evaluate(lane.subject.bundle.manifest.fixed_batch or PARITY_BATCH_SIZE), Evaluated)
            if evaluated is not None:
                subject, oracle = lane.subject, self.oracle(lane)
                lane.parity = verdict_of(subject, evaluated.outputs, oracle)
                self.bisect(lane, evaluated.outputs, oracle)

    def oracle(self, lane: Lane) -> Oracle:
        """That of the lane's bundle, read and checked once."""
        bundle = lane.subject.bundle
        if bundle.path not in self._oracles:
            self._oracles[bundle.path] = bundle.oracle()
        return self._oracles[bundle.path]

    def bisect(self, lane: Lane, outputs: Arrays, oracle: Oracle) -> None:
        """Look for the first node that diverges, where that was asked for."""
        when = self.plan.bisect
        wanted = when == "always" or (when == "failed" and lane.parity is not None and not lane.parity.passed)
        wanted = wanted and has_torch_program(lane.subject.bundle)
        if wanted and bisectable(lane.subject.backend, lane.subject.options.variant):
            lane.bisection = lane.ask(Bisect(worst_images(outputs[0], oracle, BISECTED_IMAGES)), Bisection)

    def measure(self, lanes: list[Lane], rounds: Rounds, process: int, limit: float) -> None:
        """Warm-ups, then the rounds of one process, of which none but the first begins after `limit`."""
        for lane in lanes:
            for batch_size in rounds.batch_sizes:
                self.show(f"process {process + 1}: warming up {lane.subject.label}, batch {batch_size}", process)
                self.prepare(lane, batch_size, process)
        most = MAX_ROUNDS if rounds.count is None else rounds.count
        done: list[Sample] = []
        for round_ in range(most):
            if round_ and time.monotonic() > limit:
                return
            if rounds.count is None and round_ >= MIN_ROUNDS and enough(done):
                return
            # Each round starts with the next lane: who follows whom would otherwise favour the same one every time.
            first = process + round_
            turns = [lanes[(place + first) % len(lanes)] for place in range(len(lanes))]
            for batch_size in rounds.batch_sizes:
                for position, lane in enumerate(turns):
                    what = f"process {process + 1}, round {round_ + 1}: {lane.subject.label}, batch {batch_size}"
                    self.show(what, process + round_ / most)
                    if lane.failure is None:
                        # The CPUs change when everyone has been the first on them.
                        cpus = cpus_for(first // len(lanes), lane.subject.options.threads)
                        request = Measure(batch_size, rounds.block_s, cpus)
                        done += (new := _turn(lane, request, process, round_, position))
                        self.samples += new
                if self.listener is not None and not round_:
                    self.listener(rows(self.samples, tuple(map(subject_result, self.ready.lanes))))
            self.readings.append(sensors.read())

    def prepare(self, lane: Lane, batch_size: int, process: int) -> None:
        """Warm a lane up at a batch size, and hold what it computes there to the oracle."""
        if lane.failure is not None or (prepared := lane.ask(Prepare(batch_size), Prepared)) is None:
            return
        lane.warm_ups.append(WarmUpFacts(batch_size=batch_size, process=process, **asdict(prepared.warm_up)))
        if lane.parity is None:
            return
        subject = lane.subject
        manifest, profile = subject.bundle.manifest, subject.options.profile
        problem = at_batch(prepared.outputs, self.oracle(lane), manifest, profile, subject.precision)
        if problem is not None and (failure := f"at {problem}") not in lane.parity.failures:
            lane.parity = replace(lane.parity, passed=False, failures=(*lane.parity.failures, failure))

    def show(self, what: str, processes: float = 0.0) -> None:
        """Say what is being done; `processes` are those that are done, with the share of the one that runs."""
        now = time.monotonic()
        share = 0.0
        if self.deadline < math.inf:
            share = (now - self.began) / max(self.deadline - self.began, 1e-9)
        elif self.plan.rounds is not None and self.plan.rounds.processes:
            share = processes / self.plan.rounds.processes
        self.progress(what, min(1.0, share))


def verdict_of(subject: Subject, outputs: Arrays, oracle: Oracle) -> ParityVerdict:
    """The verdict on a subject's outputs of all of its oracle's inputs."""
    return judge(outputs, oracle, subject.bundle.manifest, subject.options.profile, subject.precision)


def _survey(plan: Plan, lanes: list[Lane], show: Callable[[str], None]) -> Survey | None:
    """The model's work (the first bundle's) and the peaks of the devices in use, while the workers wait."""
    devices = tuple(dict.fromkeys(d for lane in lanes if (d := lane.subject.backend.device) != "none"))
    if not devices or not has_torch_program(lanes[0].subject.bundle):
        return None
    show("measuring the machine's peaks")
    return survey(lanes[0].subject.bundle.path, devices, plan.threads, plan.profile, plan.timeout_s)


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


def _turn(lane: Lane, request: Measure, process: int, round_: int, position: int) -> list[Sample]:
    measured = lane.ask(request, Measured)
    if measured is None:
        return []
    if measured.peak_memory_bytes is not None:
        lane.peak_memory_bytes = max(measured.peak_memory_bytes, lane.peak_memory_bytes or 0)
    if measured.gpu_memory_bytes is not None:
        lane.peak_gpu_memory_bytes = max(measured.gpu_memory_bytes, lane.peak_gpu_memory_bytes or 0)
    return [
        Sample(
            subject=lane.subject.label,
            batch_size=request.batch_size,
            process=process,
            round=round_,
            position=position,
            timing=block.timing,
            started_at_unix_s=block.started_at_unix_s,
            started_at_monotonic_ns=block.started_at_monotonic_ns,
            durations_ns=block.durations_ns,
            energy_j=block.energy_j,
            gpu_durations_ns=block.gpu_durations_ns,
            cpu_s=block.cpu_s,
            system_s=block.system_s,
            cpus=request.cpus,
            quiet_after_s=measured.quiet_after_s,
        )
        for block in measured.blocks
    ]

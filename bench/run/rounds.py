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
from bench.run.fit import Costs, Fitted, fit
from bench.run.lanes import Lane, Ready, lanes_of, loaded, subject_result
from bench.run.plan import Listener, Note, Plan, Progress, Rounds, Subject, has_torch_program
from bench.worker.bisect import bisectable
from bench.worker.messages import Bisect, Evaluate, Evaluated, Measure, Measured, Prepare, Prepared, Probe, Probed
from bench.worker.peaks import survey

if TYPE_CHECKING:
    from export.bundle import Arrays, Oracle

# Rounds whose number is not given: the first look at them, and the last of all, in one process.
MIN_ROUNDS, MAX_ROUNDS = 6, 200
# Processes whose number is not given: before that many nothing is decided.
MIN_PROCESSES = 5
# Of calls that take long: the first one and a warm-up; two timed blocks, with their lead-ins, and what is prepared.
PREPARE_CALLS, MEASURE_CALLS = 5, 8
# Enough to tell a value from another; every intermediate of so many is in memory at once.
BISECTED_IMAGES = 8


def run(plan: Plan, progress: Progress, listener: Listener | None = None, note: Note | None = None) -> Result:
    """Do all of `plan` and return what was found; a failed parity or worker is part of the result, see `exit_code`.

    `listener` is told the rows that are known so far, in the first round of every process after each batch size, or
    after each row where all takes long. `note` is told what is left out for lack of time, and how long a run takes that
    takes long.

    An interrupt (KeyboardInterrupt) after the first round ends the measuring and not the run: its result has
    `interrupted`, and the rounds that were done.

    Raises BenchError where nothing was measured: an unknown or unavailable backend, a bad bundle, a row that would lie.
    """
    started_at = datetime.now(UTC)
    began = time.monotonic()
    ready = lanes_of(plan)
    measuring = _Measuring(plan, ready, began, progress, listener, note)
    before = sensors.read()
    interrupted = False
    try:
        measuring.all_processes()
    except KeyboardInterrupt:
        if not measuring.samples:
            raise
        interrupted = True
    plan = measuring.plan  # what there was time for
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
            left_out=measuring.left_out,
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

    def __init__(
        self,
        plan: Plan,
        ready: Ready,
        began: float,
        progress: Progress,
        listener: Listener | None,
        note: Note | None,
    ) -> None:
        self.plan, self.ready, self.began = plan, ready, began
        self.progress, self.listener, self.note = progress, listener, note
        limit_s = None if plan.rounds is None else plan.rounds.time_limit_s
        self.deadline = math.inf if limit_s is None else began + limit_s
        self.samples: list[Sample] = []
        self.busy: list[float] = []
        self.readings: list[sensors.Reading] = []
        self.survey: Survey | None = None
        self.left_out: tuple[str, ...] = ()
        self._oracles: dict[Path, Oracle] = {}
        self._image_s: dict[str, float] = {}

    def all_processes(self) -> None:
        """Process after process, until there were as many as the plan says, or nothing more is to be learnt."""
        number = 0
        while True:
            began = time.monotonic()
            with loaded(self.ready, self.plan, again=number > 0) as lanes:
                if not number:
                    self.prove(lanes, self.fit(lanes, time.monotonic() - began))
                rounds = self.plan.rounds
                if rounds is not None:
                    self.measure(lanes, rounds, number, self.limit(rounds, number, began))
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

    def limit(self, rounds: Rounds, number: int, began: float) -> float:
        """Until when further rounds of a process begin: as much time for each, with what it takes to start."""
        if rounds.count is not None or rounds.processes is None:
            return self.deadline
        return began + (self.deadline - began) / (rounds.processes - number)

    def fit(self, lanes: list[Lane], start_s: float) -> Fitted:
        """See what an image costs, and leave out of the plan what there is no time for."""
        for lane in lanes:
            self.show(f"measuring what an image costs: {lane.subject.label}")
            if lane.failure is None and (probed := lane.ask(Probe(), Probed)) is not None:
                self._image_s[lane.subject.label] = probed.image_s
        kept = [lane.subject.label for lane in lanes if lane.subject.backend.reference]
        inputs = max((len(self.oracle(lane).logits) for lane in lanes), default=0)
        fitted = fit(self.plan, Costs(self._image_s, start_s), inputs, kept)
        self.plan, self.left_out = replace(self.plan, rounds=fitted.rounds), fitted.left_out
        for lane in [lane for lane in lanes if lane.subject.label in fitted.dropped]:
            lane.end()
            lanes.remove(lane)
            self.ready.lanes.remove(lane)
        if fitted.rounds is not None and fitted.rounds.time_limit_s is not None:
            self.deadline = self.began + fitted.rounds.time_limit_s
        if self.note is not None:
            for line in fitted.left_out:
                self.note(f"left out for lack of time: {line}")
            if fitted.costly:
                self.note(f"this takes about {fitted.estimate_s / 60:.0f} minutes")
        return fitted

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

    def prove(self, lanes: list[Lane], fitted: Fitted) -> None:
        """The verdict on every lane, from the outputs for all inputs, or for those that there is time for."""
        for lane in lanes:
            self.show(f"parity of {lane.subject.label}")
            if lane.failure is not None or not lane.subject.backend.formats:
                continue
            oracle, only = self.oracle(lane), lane.subject.bundle.manifest.fixed_batch
            count = min(fitted.parity_inputs, len(oracle.logits))
            if only is not None:
                count = max(1, count // only) * only
            expected_s = count * self._image_s[lane.subject.label]
            evaluated = lane.ask(Evaluate(only or fitted.parity_batch, 0, count, expected_s), Evaluated)
            if evaluated is not None:
                subject, oracle = lane.subject, oracle.first(count)
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
        if not rounds.early_rows:
            for lane in lanes:
                for batch_size in rounds.batch_sizes:
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
                    if rounds.early_rows and not round_:
                        self.prepare(lane, batch_size, process)
                    what = f"process {process + 1}, round {round_ + 1}: {lane.subject.label}, batch {batch_size}"
                    self.show(what, process + round_ / most)
                    if lane.failure is None:
                        # The CPUs change when everyone has been the first on them.
                        cpus = cpus_for(first // len(lanes), lane.subject.options.threads)
                        expected_s = MEASURE_CALLS * self.call_s(lane, batch_size)
                        request = Measure(batch_size, rounds.block_s, cpus, expected_s)
                        done += (new := _turn(lane, request, process, round_, position))
                        self.samples += new
                    last = position == len(turns) - 1
                    if self.listener is not None and not round_ and (last or rounds.early_rows):
                        self.listener(rows(self.samples, tuple(map(subject_result, self.ready.lanes))))
            self.readings.append(sensors.read())

    def prepare(self, lane: Lane, batch_size: int, process: int) -> None:
        """Warm a lane up at a batch size, and hold what it computes there to the oracle."""
        self.show(f"process {process + 1}: warming up {lane.subject.label}, batch {batch_size}", process)
        if lane.failure is not None:
            return
        request = Prepare(batch_size, PREPARE_CALLS * self.call_s(lane, batch_size))
        if (prepared := lane.ask(request, Prepared)) is None:
            return
        lane.warm_ups.append(WarmUpFacts(batch_size=batch_size, process=process, **asdict(prepared.warm_up)))
        if lane.parity is None:
            return
        subject = lane.subject
        manifest, profile = subject.bundle.manifest, subject.options.profile
        problem = at_batch(prepared.outputs, self.oracle(lane), manifest, profile, subject.precision)
        if problem is not None and (failure := f"at {problem}") not in lane.parity.failures:
            lane.parity = replace(lane.parity, passed=False, failures=(*lane.parity.failures, failure))

    def call_s(self, lane: Lane, batch_size: int) -> float:
        """What a call is likely to take."""
        return batch_size * self._image_s.get(lane.subject.label, 0.0)

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

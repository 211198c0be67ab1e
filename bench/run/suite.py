"""All that can be said of a bundle on one machine: the doctor's findings, then a run in each profile on each device.

Owns which runs there are and how they share the time. How a run works is `bench.run.rounds`.

Backends on the GPU and on the CPU have a run each. A ratio is formed on one device only, and a call of the CPU with as
many images as a GPU takes would leave no time for anything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from bench.backends.contract import Profile
from bench.backends.registry import find_backend, registered
from bench.errors import EXIT_UNAVAILABLE, BenchError
from bench.machine import sensors
from bench.machine.doctor import examine
from bench.results.schema import Result
from bench.results.studies import SUITE_VERSION, LeftOut, Suite, SuiteDevice, SuiteRun
from bench.run.plan import Plan, Progress, Rounds, Selection, batch_sizes, opened, select
from bench.run.rounds import run

# A call on the GPU gains from every image until thousands are in it; on a CPU the caches are full before that.
BATCH_SIZES: dict[SuiteDevice, tuple[int, ...]] = {
    "cuda": (1, 8, 64, 256, 1024, 4096, 16384),
    "cpu": (1, 8, 64, 256, 1024),
}
# Each run's part of the time. On the GPU there are more backends, controls and batch sizes; but starting the processes,
# parity and warming up took a minute of a run there, and 35 s of the CPU's (H100 machine, 16 cores).
SHARES: dict[SuiteDevice, float] = {"cuda": 1.5, "cpu": 1.0}
# What an interval needs. Of seven backends with their controls, each takes half a minute to start and to warm up.
PROCESSES = 3
NO_GPU = "this machine has no NVIDIA GPU that its driver shows, so that no CUDA backend can run"
FAST_ON_CPU = "the fast profile changes nothing there: TF32 is arithmetic of NVIDIA GPUs"
NOT_REACHED = "the suite was ended before its turn came"


@dataclass(frozen=True)
class SuiteRequest:
    """What was asked for. No backends: all that are available. No batch sizes: those of each device."""

    command: str
    bundle: Path
    backends: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    threads: int
    time_limit_s: float
    block_s: float
    timeout_s: float


Keep = Callable[[Suite], None]
"""Told of the suite whenever another run is finished."""


def run_suite(request: SuiteRequest, keep: Keep, progress: Progress) -> Suite:
    """Make every run in its turn, and hand over what there is after each.

    Raises BenchError: a bad bundle, an unknown backend, one that was asked for and can't run, or nothing at all that
    can. What was finished before has been handed over.
    """
    started_at, deadline = datetime.now(UTC), time.monotonic() + request.time_limit_s
    gpu = bool(sensors.gpus())
    parts = chosen_runs(request.backends, gpu)
    left_out = absent(request.backends, gpu)
    raw_bytes_per_image = sum(array[0].nbytes for array in opened(request.bundle).oracle().inputs)
    progress("looking at the machine", 0.0)
    findings = tuple(examine(request.threads))
    runs: list[Result] = []

    def suite(pending: Sequence[SuiteRun]) -> Suite:
        reached = [LeftOut(what=part.words, reason=NOT_REACHED, failed=True) for part in pending]
        return Suite(
            schema_version=SUITE_VERSION,
            kind="suite",
            started_at=started_at,
            finished_at=datetime.now(UTC),
            time_limit_s=request.time_limit_s,
            raw_bytes_per_image=raw_bytes_per_image,
            findings=findings,
            runs=tuple(runs),
            left_out=(*left_out, *reached),
        )

    for place, part in enumerate(parts):
        ahead = sum(SHARES[other.device] for other in parts[place:])
        seconds = max(0.0, deadline - time.monotonic()) * SHARES[part.device] / ahead
        try:
            runs.append(run(_plan(request, part, seconds), _part(progress, part, parts)))
        except BenchError as error:
            if error.exit_code != EXIT_UNAVAILABLE or request.backends or len(parts) == 1:
                raise
            left_out.append(LeftOut(what=part.words, reason=str(error), failed=True))
        if runs:
            keep(suite(parts[place + 1 :]))
    if not runs:
        raise BenchError(" ".join(entry.reason for entry in left_out if entry.failed), EXIT_UNAVAILABLE)
    return suite(())


def chosen_runs(backends: Sequence[str], gpu: bool) -> list[SuiteRun]:
    """The runs that have something to measure, the most important first: a suite that is cut off keeps those."""
    devices = {find_backend(name).device for name in backends or registered()}
    parts = [SuiteRun(Profile.STRICT, "cuda"), SuiteRun(Profile.FAST, "cuda"), SuiteRun(Profile.STRICT, "cpu")]
    # A GPU's backend that was named where there is no GPU is for `bench.run.rounds` to refuse.
    return [part for part in parts if part.device in devices and (part.device == "cpu" or gpu or backends)]


def absent(backends: Sequence[str], gpu: bool) -> list[LeftOut]:
    """What no run is made for, where nobody chose the backends."""
    if backends:
        return []
    left_out = [LeftOut(what="profile fast on the CPU", reason=FAST_ON_CPU, failed=False)]
    if not gpu:
        left_out.append(LeftOut(what="both profiles on the GPU", reason=NO_GPU, failed=False))
    return left_out


def _plan(request: SuiteRequest, part: SuiteRun, seconds: float) -> Plan:
    return _with_control(
        Plan(
            selection=Selection(
                bundles=(request.bundle,),
                backends=tuple(name for name in request.backends if find_backend(name).device == part.device) or None,
                device=part.device,
            ),
            threads=request.threads,
            profile=part.profile,
            timeout_s=request.timeout_s,
            rounds=Rounds(
                batch_sizes=batch_sizes([request.bundle], request.batch_sizes, BATCH_SIZES[part.device]),
                block_s=request.block_s,
                processes=PROCESSES,
                time_limit_s=seconds,
                fitted=not request.batch_sizes,
            ),
            survey=True,
            bisect="failed",
            command=request.command,
        )
    )


def _with_control(plan: Plan) -> Plan:
    """With the unfolded files beside the folded ones, where any backend has both."""
    names = tuple(name for name in registered() if find_backend(name).shows_fold)
    controlled = replace(plan, selection=replace(plan.selection, control=names))
    try:
        select([(None, opened(plan.selection.bundles[0], verified=False))], controlled)
    except BenchError:  # what else may be wrong the run itself says
        return plan
    return controlled


def _part(progress: Progress, part: SuiteRun, parts: Sequence[SuiteRun]) -> Progress:
    """The progress of one run as that of the whole suite."""
    total = sum(SHARES[other.device] for other in parts)
    before = sum(SHARES[other.device] for other in parts[: parts.index(part)])
    return lambda what, done: progress(f"{part.words}: {what}", (before + done * SHARES[part.device]) / total)

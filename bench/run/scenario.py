"""The scenarios of MLPerf Inference: backends under the load that MLPerf LoadGen makes, one at a time.

Owns what LoadGen is asked for (accuracy first, then speed), the search for the highest rate of the server scenario, and
where LoadGen's logs are kept. LoadGen says whether a run is valid, `bench.results.parity`
whether its outputs are right. Knows no runtime.
"""

from __future__ import annotations

import importlib
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench.errors import EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.machine.environment import cpu_busy_percent, load_1min
from bench.results.scenario import LoadGenLatency, LoadGenRun, ScenarioResult, ScenarioRow, ScenarioSettings
from bench.results.terms import Scenario
from bench.run.lanes import Lane, Ready, lanes_of, loaded, subject_result
from bench.run.plan import Plan, Progress
from bench.run.rounds import verdict_of
from bench.worker.loadgen import (
    P99_MIN_QUERIES,
    SHORTEST_IMAGE_S,
    SHORTEST_QUERY_S,
    Driven,
    Load,
    Summary,
    longest_s,
    read_outputs,
    read_summary,
    read_version,
)
from bench.worker.messages import Drive, Measure, Measured, Prepare, Prepared
from bench.worker.process import WorkerFailure

# The search for the highest rate ends when the rate that held and the one that didn't are this close.
RATE_PRECISION = 1.05
# To see how long a call takes, before LoadGen is told how many to expect.
PROBE_S = 0.15
# It starts at this share of the rate at which calls follow each other without a pause, where waiting is short. It gives
# up at the other, where a query hardly ever meets another: what doesn't hold there doesn't hold.
FIRST_SHARE, LAST_SHARE = 1 / 2, 1 / 16


@dataclass(frozen=True)
class ScenarioRequest:
    """Which load was asked for.

    Attributes:
        min_duration_s: how long each run of LoadGen that measures goes on at least.
        images_per_call: images of a query in multi-stream, of a call in offline; 1 elsewhere.
        latency_bound_s: server: what the 99th percentile must not exceed; None elsewhere.
    """

    scenario: Scenario
    min_duration_s: float
    images_per_call: int
    latency_bound_s: float | None


def run_scenario(plan: Plan, request: ScenarioRequest, target: Path, progress: Progress) -> ScenarioResult:
    """Put every backend of `plan` under the load, one after the other, and return what was found.

    LoadGen's logs are kept beside `target`, the file that the result will be written to (see `log_folder`), replacing
    those of an earlier run. The rounds of `plan` mean nothing here.

    Raises BenchError where nothing was measured: LoadGen is not installed, an unknown or unavailable backend, a bad
    bundle, a row that would lie.
    """
    _check_installed()
    started_at = datetime.now(UTC)
    rows: list[ScenarioRow] = []
    version = None
    target.parent.mkdir(parents=True, exist_ok=True)
    ready = lanes_of(plan)
    _require_batch(ready, request)
    with (
        loaded(ready, plan),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch,
    ):
        for place, lane in enumerate(ready.lanes):

            def show(what: str, done: float = place / len(ready.lanes), lane: Lane = lane) -> None:
                progress(f"{lane.subject.label}: {what}", done)

            test = _Test(plan, request, lane, Path(scratch) / _folder_name(lane), show)
            if lane.failure is None:
                test.run()
            kept = log_folder(target) / _folder_name(lane)
            rows.append(test.row(kept.relative_to(target.parent)))
            version = version or test.version
        busy_at_end = cpu_busy_percent()
        _publish(Path(scratch), log_folder(target))
    progress("done", 1.0)
    return ScenarioResult(
        schema_version=1,
        kind="scenario",
        official_mlperf_result=False,
        loadgen_version=version,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        load_1min_at_end=load_1min(),
        cpu_busy_percent_at_end=busy_at_end,
        settings=ScenarioSettings(
            scenario=request.scenario,
            profile=plan.profile,
            threads=plan.threads,
            min_duration_s=request.min_duration_s,
            batch_size=request.images_per_call,
            latency_bound_ms=None if request.latency_bound_s is None else 1000 * request.latency_bound_s,
            timeout_s=plan.timeout_s,
        ),
        bundles=ready.bundles,
        environment=ready.environment,
        rows=tuple(rows),
        skipped=tuple(ready.skipped),
    )


def _require_batch(ready: Ready, request: ScenarioRequest) -> None:
    """Raises BenchError (usage) where a bundle takes another number of images at a time than a query of this load."""
    for bundle in {lane.subject.bundle.path: lane.subject.bundle for lane in ready.lanes}.values():
        only = bundle.manifest.fixed_batch
        if only not in (None, request.images_per_call):
            raise BenchError(
                f"the files of the bundle at {bundle.path} take {only} inputs at a time and no other number, and a "
                f"call of {request.scenario} has {request.images_per_call}. Choose offline with --batch-size {only}.",
                EXIT_USAGE,
            )


def log_folder(target: Path) -> Path:
    """Where LoadGen's logs are kept for the result at `target`: a folder of the same name without its ending."""
    return target.with_suffix("") if target.suffix else target.with_name(f"{target.name}-logs")


def highest_rate(holds: Callable[[float], bool], first: float, lowest: float) -> tuple[float | None, float]:
    """The highest rate that holds, up to `RATE_PRECISION`, and the lowest above it that doesn't.

    Doubles from `first` on until a rate doesn't hold; where `first` doesn't, tries `lowest`, and nothing holds where
    that doesn't either. Then halves the gap, on a logarithmic scale. A rate is tried once.
    """
    held, missed = None, math.inf
    rate = first
    while held is None or missed > RATE_PRECISION * held:
        if holds(rate):
            held = rate
        elif rate <= lowest:
            return None, rate
        else:
            missed = rate
        if held is None:
            rate = lowest
        elif missed == math.inf:
            rate = 2 * held
        else:
            rate = math.sqrt(held * missed)
    return held, missed


class _Test:
    """All runs of LoadGen against one backend. Their logs go to `folder`."""

    def __init__(
        self, plan: Plan, request: ScenarioRequest, lane: Lane, folder: Path, show: Callable[[str], None]
    ) -> None:
        self._plan, self._request, self._lane, self._folder, self._show = plan, request, lane, folder, show
        self._runs: list[tuple[str, Load, Driven, Summary]] = []
        self._reported: int | None = None
        self._missed: float | None = None
        self.version: str | None = None

    def run(self) -> None:
        """Warm up, prove, measure. A failure of the worker ends this and is the lane's from then on."""
        try:
            fastest_s, usual_s = self._call_s()
            if self._lane.subject.backend.formats:
                self._prove(fastest_s, usual_s)
            self._measure(fastest_s, usual_s)
        except WorkerFailure as failure:
            self._lane.fail(failure)

    def row(self, kept: Path) -> ScenarioRow:
        """What was found, its logs being at `kept` in the end."""
        return ScenarioRow(
            subject=subject_result(self._lane),
            runs=tuple(
                LoadGenRun(
                    folder=(kept / name).as_posix(),
                    queries_per_s=load.queries_per_s if load.scenario is Scenario.SERVER else None,
                    verdict="VALID" if summary.valid else "INVALID",
                    unmet=summary.unmet,
                    latency_ms=LoadGenLatency(
                        p50=summary.latency_ns[50] * 1e-6,
                        p90=summary.latency_ns[90] * 1e-6,
                        p99=summary.latency_ns[99] * 1e-6,
                        p999=summary.latency_ns[99.9] * 1e-6,
                    ),
                    images_per_s=summary.images_per_s,
                    queries=driven.queries,
                    images=driven.images,
                    seconds=driven.seconds,
                )
                for name, load, driven, summary in self._runs
            ),
            reported=self._reported,
            missed_queries_per_s=self._missed,
        )

    def _call_s(self) -> tuple[float, float]:
        """Warm up, and time calls from raw input to logits for a moment: the fastest and the median, in seconds."""
        self._show("warming up")
        size = self._request.images_per_call
        self._lane.worker.ask(Prepare(size), Prepared)
        measured = self._lane.worker.ask(Measure(size, PROBE_S), Measured)
        durations = [d for block in measured.blocks if block.timing == "end_to_end" for d in block.durations_ns]
        return min(durations) * 1e-9, median(durations) * 1e-9

    def _prove(self, fastest_s: float, usual_s: float) -> None:
        self._show("LoadGen's accuracy mode")
        oracle = self._lane.subject.bundle.oracle()
        folder = self._folder / "accuracy"
        load = self._load(1 / max(fastest_s, SHORTEST_QUERY_S), accuracy=True)
        self._drive(load, folder, usual_s * len(oracle.logits) / load.images_per_call)
        outputs = read_outputs(folder, oracle.outputs, self._lane.subject.bundle.manifest.outputs)
        self._lane.parity = verdict_of(self._lane.subject, outputs, oracle)

    def _measure(self, fastest_s: float, usual_s: float) -> None:
        request = self._request
        if request.scenario is Scenario.SERVER:
            possible = 1 / max(usual_s, SHORTEST_QUERY_S)
            held, missed = highest_rate(self._holds, FIRST_SHARE * possible, LAST_SHARE * possible)
            self._missed = missed
            reported = missed if held is None else held
            self._reported = [load.queries_per_s for _, load, _, _ in self._runs].index(reported)
        elif request.scenario is Scenario.OFFLINE:
            rate = 1 / max(fastest_s / request.images_per_call, SHORTEST_IMAGE_S)
            self._show(f"offline, at least {request.min_duration_s:g} s")
            self._perform(self._load(rate), request.min_duration_s * usual_s / fastest_s)
            self._reported = 0
        else:
            rate = 1 / max(fastest_s, SHORTEST_QUERY_S)
            self._show(f"{request.scenario}, at least {request.min_duration_s:g} s")
            self._perform(self._load(rate), max(request.min_duration_s, usual_s * P99_MIN_QUERIES))
            self._reported = 0

    def _holds(self, queries_per_s: float) -> bool:
        self._show(f"server, {queries_per_s:.4g} queries/s")
        load = self._load(queries_per_s)
        return self._perform(load, longest_s(load)).valid

    def _load(self, queries_per_s: float, accuracy: bool = False) -> Load:
        request = self._request
        return Load(
            scenario=request.scenario,
            accuracy=accuracy,
            min_duration_s=request.min_duration_s,
            images_per_call=request.images_per_call,
            queries_per_s=queries_per_s,
            latency_bound_s=request.latency_bound_s,
        )

    def _perform(self, load: Load, seconds: float) -> Summary:
        name = f"performance/run_{len(self._runs) + 1}"
        driven = self._drive(load, self._folder / name, seconds)
        summary = read_summary(self._folder / name)
        self._runs.append((name, load, driven, summary))
        return summary

    def _drive(self, load: Load, folder: Path, seconds: float) -> Driven:
        driven = self._lane.worker.ask(Drive(load, folder, seconds), Driven)
        self.version = read_version(folder)
        return driven


def _check_installed() -> None:
    """Raises BenchError (unavailable) where LoadGen can't be imported."""
    try:
        importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise BenchError(
            f"the scenarios are driven by MLPerf LoadGen, which can't be imported here ({error}). Install it with: "
            "pip install 'ninefold[mlperf]'",
            EXIT_UNAVAILABLE,
        ) from None


def _folder_name(lane: Lane) -> str:
    return lane.subject.label.replace(":", "-")  # which Windows forbids


def _publish(made: Path, kept: Path) -> None:
    """Move the logs to where they are kept. Of an earlier run nothing is left for the backends that ran."""
    for folder in made.iterdir():
        for part in ("accuracy", "performance"):
            shutil.rmtree(kept / folder.name / part, ignore_errors=True)
            if (folder / part).exists():
                (kept / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.move(folder / part, kept / folder.name / part)

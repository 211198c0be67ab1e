"""What a scenario of MLPerf Inference found."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from bench.backends.contract import Profile
from bench.machine.environment import Environment
from bench.results.schema import BundleFacts, Frozen, Skipped, SubjectResult
from bench.results.terms import Scenario

OFFICIAL_MIN_DURATION_S = 600.0


class LoadGenLatency(Frozen):
    """LoadGen's percentiles of the time from when a query was due to its answer, in ms."""

    p50: float
    p90: float
    p99: float
    p999: float


class LoadGenRun(Frozen):
    """A run of LoadGen that measured.

    Attributes:
        folder: its logs, relative to the folder of this file.
        queries_per_s: the rate at which queries were due, in the server scenario; None elsewhere.
        verdict, unmet: LoadGen's, and the constraints that it calls not satisfied.
        images_per_s: what LoadGen calls completed, in offline and server; None elsewhere.
        seconds: how long all of it took, LoadGen's own preparation included.
    """

    folder: str
    queries_per_s: float | None
    verdict: Literal["VALID", "INVALID"]
    unmet: tuple[str, ...]
    latency_ms: LoadGenLatency
    images_per_s: float | None
    queries: int
    images: int
    seconds: float


class ScenarioRow(Frozen):
    """A backend under the load. `subject.parity` judges the outputs that LoadGen's accuracy mode collected.

    Attributes:
        runs: all that measured, in their order; more than one in the server scenario only.
        reported: the place in `runs` of the run that counts: of the highest rate that held, or of the lowest that was
            tried where none did. None where no run came to its end.
        missed_queries_per_s: the lowest rate above it that did not hold, in the server scenario; None elsewhere.
    """

    subject: SubjectResult
    runs: tuple[LoadGenRun, ...]
    reported: int | None
    missed_queries_per_s: float | None


class ScenarioSettings(Frozen):
    """What was asked for. `batch_size` is the images of one call: those of a query, except in offline."""

    scenario: Scenario
    profile: Profile
    threads: int
    min_duration_s: float
    batch_size: int
    latency_bound_ms: float | None
    timeout_s: float


class ScenarioResult(Frozen):
    """The whole file. It is no official MLPerf result: see `bench.report.terminal.scenario.print_scenario` for why."""

    schema_version: Literal[1]
    kind: Literal["scenario"]
    official_mlperf_result: Literal[False]
    loadgen_version: str | None
    started_at: datetime
    finished_at: datetime
    load_1min_at_end: float | None
    cpu_busy_percent_at_end: float
    settings: ScenarioSettings
    bundles: tuple[BundleFacts, ...]
    environment: Environment
    rows: tuple[ScenarioRow, ...]
    skipped: tuple[Skipped, ...]

"""The result of a run: raw samples first, and what was derived from them. Units stand in the names of its fields.

Writing it is `bench.results.files`, reading it `bench.results.load`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.backends.contract import Device, Emulation, Placement, Profile, Setting
from bench.machine.environment import Environment
from bench.machine.sensors import Reading
from bench.results.parity import Bisection, ParityVerdict
from bench.results.roofline import Point, Survey
from bench.results.statistics import PairedRatio, Spread
from bench.results.terms import FailureKind, Timing
from export.bundle import FoldReport

SCHEMA_VERSION: Literal[3] = 3


class Frozen(BaseModel):
    """What every file of `bench` is made of: never changed once it is made, and with no field that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BundleFacts(Frozen):
    """Which bundle was measured. `digest` is the SHA-256 of its manifest, which holds the hash of every file.

    `letter` tells the bundles of a run apart; None where there was but one. `fold` says what became of each BatchNorm.
    """

    letter: str | None
    path: str
    name: str
    digest: str
    fold: FoldReport | None = None


class FileFacts(Frozen):
    """The bundle's file that a backend loaded."""

    path: str
    sha256: str
    folded: bool
    precision: str
    opset: int | None
    bytes: int | None = None


class Failure(Frozen):
    """Why a backend did not finish. `trace` is its traceback, or the last that its process printed."""

    kind: FailureKind
    message: str
    trace: str


class WarmUpFacts(Frozen):
    """What a process ran before its first timed block. `settled` is False where the calls were still not alike."""

    batch_size: int
    process: int = 0
    calls: int
    seconds: float
    settled: bool


class SubjectResult(Frozen):
    """A backend with the file that it ran.

    `label` is the backend's name, with the variant of its file unless it is float32, its threads where they are not the
    run's, ``@`` and the letter of its bundle in a run of several, and ``:unfolded`` for the control.
    `timer_overhead_ns` is what the clock adds to a call's duration in its process; `peak_memory_bytes` the largest
    resident memory of that process, and `peak_gpu_memory_bytes` what it held of its GPU's.
    """

    label: str
    backend: str
    variant: str = "float32"
    threads: int | None = None
    letter: str | None
    device: Device
    file: FileFacts | None
    placement: Placement | None
    settings: dict[str, Setting]
    timer_overhead_ns: float | None
    peak_memory_bytes: int | None
    peak_gpu_memory_bytes: int | None
    warm_ups: tuple[WarmUpFacts, ...]
    parity: ParityVerdict | None
    bisection: Bisection | None = None
    failure: Failure | None

    @property
    def computes(self) -> bool:
        """False for the backend that computes nothing: it prices the harness, and is neither judged nor ranked."""
        return self.device != "none"

    @property
    def emulated(self) -> Emulation | None:
        """Why its float16 or bfloat16 layers were computed in float32; None where they were not, or an earlier bench
        didn't ask.
        """
        return None if self.placement is None else self.placement.emulated


class Sample(Frozen):
    """A timed block: calls timed one after the other without a pause, each on `batch_size` images.

    `round` counts within its `process`; `position` is the place of the block's turn within its round; `quiet_after_s`
    is how long the runtime's threads kept using the CPU after the turn, which the next turn waited for. `energy_j` is
    what the machine's counters counted during the block, everything that ran included. `gpu_durations_ns` are some
    further calls, timed by the GPU's own clock; empty for end-to-end blocks and where there is no GPU. `cpus` are those
    that the turn was kept to, if any. `cpu_s` is the CPU time that its process used during the block, and `system_s`
    how much of that the operating system did for it; None where they were not counted.
    """

    subject: str
    batch_size: int
    process: int = 0
    round: int
    position: int
    timing: Timing
    started_at_unix_s: float
    started_at_monotonic_ns: int
    durations_ns: tuple[int, ...]
    energy_j: dict[str, float]
    gpu_durations_ns: tuple[int, ...] = ()
    cpus: tuple[int, ...] | None = None
    quiet_after_s: float
    cpu_s: float | None = None
    system_s: float | None = None


class Percentiles(Frozen):
    """Order statistics over every call of every round, in ms; None where the samples are too few to have it.

    The true percentile does not exceed its `_upper` with 95 % confidence.
    """

    p50: float | None
    p50_upper: float | None
    p90: float | None
    p90_upper: float | None
    p99: float | None
    p99_upper: float | None


class Row(Frozen):
    """What was found for a subject at a batch size. Throughputs are those of the rounds' blocks.

    `system_share_percent` is the part of its CPU time, end to end, that the operating system took: mapping memory,
    above all; None where it was not counted. `timer_share_percent` is how much of a call on the device is the clock's
    own. `gpu_latency_p50_ms` is the median of the device-resident calls that the GPU's clock timed: what is missing to
    the host's median is the time to launch and to notice the end. `energy_per_image_j` is by counter, and empty where
    the machine has none.
    """

    subject: str
    batch_size: int
    device_resident_throughput_images_per_s: Spread
    end_to_end_throughput_images_per_s: Spread
    device_resident_latency_ms: Percentiles
    end_to_end_latency_ms: Percentiles
    gpu_latency_p50_ms: float | None = None
    system_share_percent: float | None = None
    timer_share_percent: float | None
    energy_per_image_j: dict[str, float]

    def throughput(self, timing: Timing) -> Spread:
        """Images per second of that timing."""
        device = timing == "device_resident"
        return self.device_resident_throughput_images_per_s if device else self.end_to_end_throughput_images_per_s

    def latency(self, timing: Timing) -> Percentiles:
        """Milliseconds of that timing's calls."""
        return self.device_resident_latency_ms if timing == "device_resident" else self.end_to_end_latency_ms


Against = Literal["torch", "control", "base"]
"""torch on the same device; the unfolded file on the same backend; the first bundle on the same backend."""


class Ratio(Frozen):
    """Throughput of `numerator` over that of `denominator`, paired by round: above 1, the numerator is faster."""

    against: Against
    numerator: str
    denominator: str
    batch_size: int
    timing: Timing
    throughput_ratio: PairedRatio


def find_ratio(
    ratios: Iterable[Ratio], against: Against, numerator: str, batch_size: int, timing: Timing
) -> PairedRatio | None:
    """The ratio of that backend at that batch size; None where there is none."""
    key = (against, numerator, batch_size, timing)
    matching = (r.throughput_ratio for r in ratios if (r.against, r.numerator, r.batch_size, r.timing) == key)
    return next(matching, None)


class Skipped(Frozen):
    """A backend that nobody named and that can't run here."""

    backend: str
    reason: str


class Settings(Frozen):
    """What the run was asked for. There were fewer `processes`, with fewer `rounds` in each, where `time_limit_s` was
    reached before; where they are None, they went on until more would tell nothing new, or until that limit.
    """

    profile: Profile
    threads: int
    batch_sizes: tuple[int, ...]
    processes: int | None
    rounds: int | None
    time_limit_s: float | None
    block_s: float
    timeout_s: float
    left_out: tuple[str, ...] = ()
    """In words, what was not run for lack of time, and what would bring it back."""


class Result(Frozen):
    """The whole file. `rows` and `ratios` can be derived again from `samples`.

    `survey` is what `roofline` compares the rows with; None where it was not made. `readings` are the machine's clocks,
    temperatures and power before the first round and after each. `cpu_busy_percents` is the share of the CPUs that
    others used after each process. `interrupted`: somebody ended it before it was done. `command` is the command line
    that made it.
    """

    schema_version: Literal[3]
    started_at: datetime
    finished_at: datetime
    load_1min_at_end: float | None
    cpu_busy_percents: tuple[float, ...]
    settings: Settings
    bundles: tuple[BundleFacts, ...]
    environment: Environment
    readings: tuple[Reading, ...]
    subjects: tuple[SubjectResult, ...]
    skipped: tuple[Skipped, ...]
    samples: tuple[Sample, ...]
    rows: tuple[Row, ...]
    survey: Survey | None
    roofline: tuple[Point, ...]
    ratios: tuple[Ratio, ...]
    command: str | None = None
    interrupted: bool = False

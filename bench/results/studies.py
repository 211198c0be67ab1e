"""What several runs make together: a suite, a sweep, and what is recommended of one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from bench.backends.contract import Device, Profile
from bench.machine.findings import Finding
from bench.results.schema import BundleFacts, Frozen, Percentiles, Result
from bench.results.statistics import PairedRatio, Spread
from export.bundle import Output, Preprocessing, TensorSpec

SUITE_VERSION: Literal[1] = 1
SuiteDevice = Literal["cuda", "cpu"]


class LeftOut(Frozen):
    """Something that was not measured, and why. `failed`: it was to be, and could not."""

    what: str
    reason: str
    failed: bool


class Suite(Frozen):
    """The whole file. `runs` are whole results, each with its raw samples; `raw_bytes_per_image` is what crosses to the
    device at least for each image end to end.
    """

    schema_version: Literal[1]
    kind: Literal["suite"]
    started_at: datetime
    finished_at: datetime
    time_limit_s: float
    raw_bytes_per_image: int
    findings: tuple[Finding, ...]
    runs: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class SuiteRun:
    """A run of the suite."""

    profile: Profile
    device: SuiteDevice

    @property
    def name(self) -> str:
        """As in the name of a file."""
        return f"{self.profile}-{self.device}"

    @property
    def words(self) -> str:
        """As in a sentence."""
        return f"profile {self.profile} on the {'GPU' if self.device == 'cuda' else 'CPU'}"


def suite_run_of(result: Result) -> SuiteRun:
    """Which of the suite's runs made this result."""
    on_gpu = any(subject.device == "cuda" for subject in result.subjects)
    return SuiteRun(result.settings.profile, "cuda" if on_gpu else "cpu")


SWEEP_FILE = "sweep.json"
SWEEP_VERSION: Literal[1] = 1


class Sweep(Frozen):
    """The whole file. `runs` are the full ones, `looks` the short ones that chose who is in those; all with their raw
    samples. `skipped` is everything that is not in `runs`, and why. Inputs, outputs and preprocessing are the
    bundle's: what is needed to use a file of it.
    """

    schema_version: Literal[1]
    kind: Literal["sweep"]
    started_at: datetime
    finished_at: datetime
    command: str
    time_limit_s: float
    bundle: BundleFacts
    input: TensorSpec
    output: Output
    more_inputs: tuple[TensorSpec, ...] = ()
    more_outputs: tuple[Output, ...] = ()
    preprocessing: Preprocessing
    runs: tuple[Result, ...]
    looks: tuple[Result, ...]
    skipped: tuple[LeftOut, ...]


RECOMMENDATION_VERSION: Literal[1] = 1


class Candidate(Frozen):
    """A file on a runtime, with so many threads, in batches of that size.

    `times_torch` is the throughput over the eager reference's with all threads, on the same device and in the same
    rounds; None for the reference itself. `exact`: it says of every image what the oracle says. `memory_bytes` is what
    its process held at most, host and GPU together, with all batch sizes that were measured in it.
    """

    label: str
    backend: str
    variant: str
    threads: int
    batch_size: int
    device: Device
    file: str
    file_bytes: int
    throughput_images_per_s: Spread
    latency_ms: Percentiles
    times_torch: PairedRatio | None
    top1_percent: float | None
    flips: int | None
    exact: bool
    memory_bytes: int


class Pick(Frozen):
    """The best in one respect. `command` measures it again; `program` runs that very file as it was measured, without
    ninefold.
    """

    respect: str
    candidate: Candidate
    command: str
    program: str


class Recommendation(Frozen):
    """The whole file. `front` is every candidate that none other beats in throughput, p99, top-1, file size and memory
    at once; `lacking` says which respects nobody is the best in, `left_out` who is right and no candidate.
    """

    schema_version: Literal[1]
    kind: Literal["recommendation"]
    bundle: BundleFacts
    max_p99_ms: float | None
    batch_size: int | None
    candidates: int
    front: tuple[Candidate, ...]
    picks: tuple[Pick, ...]
    lacking: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

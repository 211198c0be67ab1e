"""The result of a run as a file: raw samples first, and what was derived from them.

Owns the schema of the JSON, with units in the names of its fields, writing it whole or not at all, and reading it.
Knows neither how the samples were taken nor how they are shown.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.backends.contract import Device, Placement, Profile, Setting
from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.machine.environment import Environment
from bench.machine.sensors import Reading
from bench.results.parity import ParityVerdict
from bench.results.roofline import Point, Survey
from bench.results.statistics import PairedRatio, Spread
from bench.worker.bisect import Bisection
from bench.worker.clock import Timing
from bench.worker.process import FailureKind
from export.bundle import FoldReport

SCHEMA_VERSION: Literal[2] = 2
REMEDY = "Name a file that bench run (without --scenario) or bench ab wrote with --json."
M = TypeVar("M", bound=BaseModel)


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
    """What was run before the first timed block. `settled` is False where the calls were still not alike."""

    batch_size: int
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


class Sample(Frozen):
    """A timed block: calls timed one after the other without a pause, each on `batch_size` images.

    `position` is the place of the block's turn within its round; `quiet_after_s` is how long the runtime's threads kept
    using the CPU after the turn, which the next turn waited for. `energy_j` is what the machine's counters counted
    during the block, everything that ran included. `gpu_durations_ns` are some further calls, timed by the GPU's own
    clock; empty for end-to-end blocks and where there is no GPU. `cpus` are those that the turn was kept to, if any.
    """

    subject: str
    batch_size: int
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

    `verdict` is stable where both medians are known to within 1 %. `timer_share_percent` is how much of a call on the
    device is the clock's own. `gpu_latency_p50_ms` is the median of the device-resident calls that the GPU's clock
    timed: what is missing to the host's median is the time to launch and to notice the end. `energy_per_image_j` is by
    counter, and empty where the machine has none.
    """

    subject: str
    batch_size: int
    device_resident_throughput_images_per_s: Spread
    end_to_end_throughput_images_per_s: Spread
    device_resident_latency_ms: Percentiles
    end_to_end_latency_ms: Percentiles
    gpu_latency_p50_ms: float | None = None
    verdict: Literal["stable", "unstable"]
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
    found = (r.throughput_ratio for r in ratios if (r.against, r.numerator, r.batch_size, r.timing) == key)
    return next(found, None)


class Skipped(Frozen):
    """A backend that nobody named and that can't run here."""

    backend: str
    reason: str


class Settings(Frozen):
    """What the run was asked for. Fewer rounds than `rounds` were done where `time_limit_s` was reached before; where
    it is None, rounds went on until they told nothing new, or until that limit.
    """

    profile: Profile
    threads: int
    batch_sizes: tuple[int, ...]
    rounds: int | None
    time_limit_s: float | None
    block_s: float
    timeout_s: float


class Result(Frozen):
    """The whole file. `rows` and `ratios` can be derived again from `samples`.

    `survey` is what `roofline` compares the rows with; None where it was not made. `readings` are the machine's clocks,
    temperatures and power before the first block and after the last. `command` is the command line that made it.
    """

    schema_version: Literal[2]
    started_at: datetime
    finished_at: datetime
    load_1min_at_end: float | None
    cpu_busy_percent_at_end: float
    settings: Settings
    bundles: tuple[BundleFacts, ...]
    environment: Environment
    readings: tuple[Reading, Reading]
    subjects: tuple[SubjectResult, ...]
    skipped: tuple[Skipped, ...]
    samples: tuple[Sample, ...]
    rows: tuple[Row, ...]
    survey: Survey | None
    roofline: tuple[Point, ...]
    ratios: tuple[Ratio, ...]
    command: str | None = None


def check_writable(path: Path, option: str = "--json") -> None:
    """Find out before anything is measured that a result can be written. Makes the folder. Raises BenchError (bad
    input), which names the `option` that names another place.
    """
    target = path.resolve()  # the file that a link points to is replaced, not the link
    if target.exists() and not target.is_file():
        raise BenchError(
            f"the result can't be written to {path}: it is not a regular file. Name another place with {option}.",
            EXIT_BAD_INPUT,
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise BenchError(
            f"the result can't be written to {path}: {error.strerror}. Name another place with {option}.",
            EXIT_BAD_INPUT,
        ) from None


def write_result(result: BaseModel, path: Path, option: str = "--json") -> None:
    """Write the JSON as `write_whole` does."""
    write_whole(indented_json(json.loads(result.model_dump_json())) + "\n", path, option)


def write_whole(content: str, path: Path, option: str) -> None:
    """Write a text file: a reader sees the old one or the new one. Raises BenchError (bad input), the old one intact;
    it names the `option` that names another place.
    """
    target = path.resolve()
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f".{target.name}.", delete=False, encoding="utf-8"
        ) as file:
            scratch = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~_umask())  # a temporary file is private; a result is like any other file
        scratch.replace(target)
    except OSError as error:
        raise BenchError(
            f"the result could not be written to {path}: {error.strerror}. What was there before is unchanged; name "
            f"another place with {option}.",
            EXIT_BAD_INPUT,
        ) from None
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def indented_json(value: Any, indent: str = "") -> str:
    """The JSON of what `json.loads` returns, a line for each field, and one for a whole list of numbers: the durations
    of a block are read together, and compared together.
    """
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{_json(key)}: {indented_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        items = [deeper + indented_json(item, deeper) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_result(path: Path) -> Result:
    """The result in a file. Raises BenchError (bad input) for one that is missing, cut off, no JSON, of another
    version of the schema, or no result.
    """
    return result_of(read_fields(path), path)


def result_of(fields: dict[str, Any], path: Path) -> Result:
    """The result in what `read_fields` found at `path`. Raises BenchError (bad input), as `read_result` does."""
    others = {
        "scenario": "is what LoadGen found in a scenario: it has no rounds",
        "suite": "is a suite of several runs: bench report shows it, but there is no one result in it",
        "sweep": "is a sweep of several runs: bench recommend reads it, but there is no one result in it",
    }
    if (kind := fields.get("kind")) in others:
        raise BenchError(f"{path} {others[kind]}. {REMEDY}", EXIT_BAD_INPUT)
    return validated(Result, fields, SCHEMA_VERSION, path)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a file that `write_result` wrote, of whatever kind. Raises BenchError (bad input) for another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(f"no result can be read at {path}: {error.strerror}. {REMEDY}", EXIT_BAD_INPUT) from None
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise BenchError(
            f"{path} is not JSON, or only the beginning of it: {error}. {REMEDY}", EXIT_BAD_INPUT
        ) from None
    if not isinstance(fields, dict) or "schema_version" not in fields:
        raise BenchError(f"{path} is JSON, but no result: it has no schema_version. {REMEDY}", EXIT_BAD_INPUT)
    return fields


def validated(model: type[M], fields: dict[str, Any], version: int, path: Path) -> M:
    """What `read_fields` found in the file at `path`, as `model`. Raises BenchError (bad input)."""
    if fields["schema_version"] != version:
        raise BenchError(
            f"{path} has schema version {fields['schema_version']!r}; this bench reads version {version}. "
            "Measure again, or read the file with the ninefold that wrote it.",
            EXIT_BAD_INPUT,
        )
    try:
        # As JSON, not as Python's values: only there is a list a tuple, and a text a date.
        return model.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BenchError(
            f"{path} is not a whole result: {field}: {first['msg']}. {REMEDY}",
            EXIT_BAD_INPUT,
        ) from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

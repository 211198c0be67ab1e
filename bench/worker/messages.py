"""What a worker is asked, and what it answers: frozen values that cross the pipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.backends.contract import Options, Placement, Setting
from bench.results.parity import Bisection
from bench.worker.clock import Block, WarmUp
from bench.worker.loadgen import Driven, Load

if TYPE_CHECKING:
    from export.bundle import Arrays


@dataclass(frozen=True)
class Job:
    """What a worker is started with. Without a bundle it only says whether the backend is available, and then whether
    each of those at `also` is.
    """

    label: str
    reference: str
    bundle: Path | None
    options: Options
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Ask what an image costs."""


@dataclass(frozen=True)
class Evaluate:
    """Ask for the outputs for the oracle's inputs from `start` to before `stop`; None: to the last.

    `expected_s` is what that is likely to take: no sign of a hang, however long.
    """

    batch_size: int
    start: int = 0
    stop: int | None = None
    expected_s: float = 0.0


@dataclass(frozen=True)
class Bisect:
    """Ask an ONNX backend for the first node that diverges from the torch graph, on these of the oracle's images."""

    images: tuple[int, ...]


@dataclass(frozen=True)
class Prepare:
    """Ask for the warm-up at a batch size. `expected_s` is as in `Evaluate`."""

    batch_size: int
    expected_s: float = 0.0


@dataclass(frozen=True)
class Measure:
    """Ask for one timed block of each kind at a batch size. `seconds` is the time of one block, `cpus` are those to run
    on; None: as before. `expected_s` is as in `Evaluate`.
    """

    batch_size: int
    seconds: float
    cpus: tuple[int, ...] | None = None
    expected_s: float = 0.0


@dataclass(frozen=True)
class Drive:
    """Ask for one run of MLPerf LoadGen, which writes its logs to `folder`. `seconds` is how long it should take."""

    load: Load
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Close:
    """Ask the worker to end."""


Request = Probe | Evaluate | Bisect | Prepare | Measure | Drive | Close


@dataclass(frozen=True)
class Available:
    """The backend can run here; said by a worker that has no bundle to load."""


@dataclass(frozen=True)
class Unavailable:
    """The backend can't run here: the reason and the remedy."""

    reason: str


@dataclass(frozen=True)
class Loaded:
    """The model is loaded, placed and ready. `timer_overhead_ns` is what the clock adds to a call in this process."""

    placement: Placement
    settings: dict[str, Setting]
    timer_overhead_ns: float


@dataclass(frozen=True)
class Misplaced:
    """The runtime loaded the model, but not on the device that the backend's name says."""

    placement: Placement


@dataclass(frozen=True)
class BadBundle:
    """The bundle lacks the file, or the file is not what the manifest says."""

    message: str


@dataclass(frozen=True)
class Broken:
    """The backend raised. `loading` tells a backend that can't load the file from one that failed later."""

    message: str
    trace: str
    loading: bool


@dataclass(frozen=True)
class Probed:
    """What an image takes, end to end: in a call by itself or in a larger one, whichever is less."""

    image_s: float


@dataclass(frozen=True)
class Evaluated:
    """Each output [N, …], floats in float32, in the oracle's order."""

    outputs: Arrays


@dataclass(frozen=True)
class Prepared:
    """The warm-up is done. `outputs` are the first call's, [batch, …], floats in float32: of the first images of the
    oracle, and of those again where it has fewer.
    """

    warm_up: WarmUp
    outputs: Arrays


@dataclass(frozen=True)
class Measured:
    """The timed blocks, in the order in which they ran, how long the runtime's threads took to stop afterwards, and the
    largest memory that the process has held so far, on the host and on its GPU.
    """

    blocks: tuple[Block, ...]
    quiet_after_s: float
    peak_memory_bytes: int | None
    gpu_memory_bytes: int | None


Reply = (
    Available
    | Unavailable
    | Loaded
    | Misplaced
    | BadBundle
    | Broken
    | Probed
    | Evaluated
    | Bisection
    | Prepared
    | Measured
    | Driven
)

"""What a backend is: the contract that adapts one runtime on one device, and all that others may know of a runtime.

Which backends there are is `bench.backends.registry`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bench.backends.profile import Profile as Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

    from export.bundle import Arrays, Bundle, FileEntry, Format, Preprocessing, TensorSpec

Device = Literal["cpu", "cuda", "none"]
Setting = str | int | float | bool
Emulation = Literal["no instructions", "no kernels", "float32 asked for"]
"""Why the layers of a float16 or bfloat16 file are computed in float32 on a CPU: it has no instructions for them that
the runtime uses, the runtime has no kernels for them there, or the profile asks the runtime for float32."""
HALVES = frozenset({"float16", "bfloat16"})
"""The precisions that a CPU may have to emulate."""


@dataclass(frozen=True)
class Options:
    """How a backend is to run. `threads` is the size of the runtime's own pool for one operator; `folded` and `variant`
    pick the file.
    """

    threads: int
    profile: Profile = Profile.STRICT
    folded: bool = True
    variant: str = "float32"


@dataclass(frozen=True)
class Placement:
    """Which provider or device runs which of the model's compute nodes, and how that is known.

    Attributes:
        nodes: how many compute nodes each provider or device runs.
        stray: the compute nodes (or their tensors) that are elsewhere than the backend's name says. A backend with any
            is refused: its row would lie.
        exempt: shape arithmetic that sits on the CPU by the runtime's design. It touches no image.
        evidence: what was looked at.
        emulated: why its layers are computed in float32 though the file's are in a narrower type; None where they are
            not, or where nobody knows.
    """

    nodes: dict[str, int]
    evidence: str
    stray: tuple[str, ...] = ()
    exempt: tuple[str, ...] = field(default=())
    emulated: Emulation | None = None


class Session(Protocol):
    """A model loaded on a runtime. The three steps from raw input to outputs are apart, so that each can be timed."""

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Any:
        """Raw input [N, …], C-contiguous and writable, as the bundle's preprocessing describes it, and the model's
        further inputs as they are → what the file takes, on the device: the first preprocessed, or as it is where the
        file does that itself. What it returns stays valid until `prepare` is called with as many images again; it may
        still be under way, which `run` waits for."""

    def run(self, prepared: Any) -> Any:
        """The model on what `prepare` returned. Returns when the result exists on the device, not when queued."""

    def fetch(self, output: Any) -> Arrays:
        """What `run` returned → each output [N, …] in host memory: float32, or the whole numbers that it has."""

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        """What `call`, which uses this session, takes by the GPU's own clock, where several are queued one after the
        other. None where there is no GPU in use.
        """

    def placement(self) -> Placement:
        """Where the compute nodes run, found out and not assumed."""

    def settings(self) -> dict[str, Setting]:
        """The settings in effect, read back from the runtime where it tells them: versions, threads, arithmetic,
        options.
        """

    def close(self) -> None:
        """Give the model and its memory back."""


@dataclass(frozen=True)
class Runnable:
    """A file and how it is run. `input` is what it takes: the raw input itself where that is `preprocessing.raw`.
    `settings` are those that the measured session said were in effect.
    """

    device: Device
    path: str
    threads: int
    input: TensorSpec
    output: TensorSpec
    preprocessing: Preprocessing
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Lines of Python that need the runtime and NumPy (`np`) alone, and do what the backend's session does.

    Attributes:
        load: loads the file.
        run: the body of a function that makes the logits, as a float32 array, of `raw`, the raw input, and of what
            `prepare` made of it.
        prepare: makes `x` of `raw`: what the file takes. None: the bundle's preprocessing in NumPy.
        differs: what the measured session does otherwise, for a comment.
    """

    load: list[str]
    run: list[str]
    prepare: list[str] | None = None
    differs: str = ""


@dataclass(frozen=True)
class Server:
    """How Triton Inference Server runs a runtime's files: its backend, the names of the files there, its parameters.

    `indexed`: the files have no names for what goes in and out, so that the server takes the place from the name.
    """

    backend: str
    suffixes: dict[str, str]
    threads_parameter: str
    further: tuple[tuple[str, str], ...] = ()
    indexed: bool = False


class Backend(Protocol):
    """One runtime on one device."""

    @property
    def name(self) -> str:
        """``<format>-<device>``, e.g. ``onnx-cuda``; a preset adds its own name: ``onnx-cpu-parallel``."""

    @property
    def device(self) -> Device:
        """Where it runs; ``none`` for the backend that computes nothing."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """The kinds of file that it loads, the one it prefers first; none for the backend that computes nothing."""

    @property
    def reference(self) -> bool:
        """Whether it always runs the unfolded float32 file: it is what the others are compared with."""

    @property
    def on_request(self) -> bool:
        """Whether it runs only where somebody names it: a preset of another, or one that takes long to start."""

    @property
    def shows_fold(self) -> bool:
        """Whether a suite runs its unfolded file too, to show what folding is worth there."""

    @property
    def server(self) -> Server | None:
        """How Triton Inference Server runs its files; None where it can't, or can't as this backend does."""

    def unavailable_reason(self) -> str | None:
        """None where this backend can run, else why it can't here and what would change that.

        Imports the runtime and tries the device: what a package says of itself is not believed.
        """

    def load(self, bundle: Bundle, options: Options) -> Session:
        """Load the bundle's file for this backend. Raises BundleError, or whatever the runtime raises."""

    def program(self, file: Runnable) -> Program | None:
        """What a user copies to run a file as this backend does in profile strict; None where there is no such text."""


def text(value: str) -> str:
    """A string of Python, for a program."""
    return json.dumps(value, ensure_ascii=False)


def python(values: Mapping[str, Setting]) -> str:
    """A dictionary of Python, for a program."""
    pairs = (f"{text(name)}: {text(value) if isinstance(value, str) else value}" for name, value in values.items())
    return "{" + ", ".join(pairs) + "}"


def shaped(file: Runnable, given: str) -> str:
    """The raw input `given`, an array or a tensor, in the shape of what the file takes: an expression of Python."""
    taken, raw = file.input.shape, file.preprocessing.raw.shape
    if all(isinstance(size, int) for size in taken[1:]):
        return f"{given}.reshape({', '.join(map(str, (-1, *taken[1:])))})"
    ones = "1, " * (len(taken) - len(raw))
    return f"{given}.reshape(len(raw), {ones}*raw.shape[1:])"


def inputs_of(bundle: Bundle, options: Options) -> tuple[TensorSpec, ...]:
    """What the file that `options` pick takes, in its order."""
    from export.bundle import takes_raw

    manifest = bundle.manifest
    return (manifest.preprocessing.raw, *manifest.more_inputs) if takes_raw(options.variant) else manifest.inputs


def preparation(bundle: Bundle, options: Options) -> Callable[[np.ndarray], np.ndarray]:
    """From the first input, raw, to what the file takes, in NumPy: the bundle's own preprocessing, or nothing."""
    from export.bundle import takes_raw

    if takes_raw(options.variant):
        return lambda raw: raw
    preprocessing, shape = bundle.manifest.preprocessing, bundle.manifest.input.shape
    return lambda raw: preprocessing.apply(raw, shape)


def in_float32(output: np.ndarray) -> np.ndarray:
    """Narrower floats in float32, which holds them exactly; whole numbers as they are."""
    return output.astype("float32", copy=False) if output.dtype.kind == "f" else output


def file_of(backend: Backend, bundle: Bundle, options: Options) -> FileEntry | None:
    """The bundle's file that `backend` runs with these options; None where it has none."""
    entries = (bundle.find(format, options.variant, options.folded) for format in backend.formats)
    return next((entry for entry in entries if entry is not None), None)


def file_path(backend: Backend, bundle: Bundle, options: Options) -> Path:
    """The path of `file_of`, after its hash was checked. Raises BundleError, also where there is no such file."""
    from export.bundle import BundleError

    entry = file_of(backend, bundle, options)
    if entry is None:
        raise BundleError(
            f"the bundle at {bundle.path} has no {options.variant} file for {backend.name} "
            f"({', '.join(backend.formats)}, {'folded' if options.folded else 'unfolded'}). Export it again with that "
            "variant."
        )
    return bundle.locate(entry)

"""The bundle: a directory that can be carried to another machine, checked and run there.

Owns the contract between whoever exports and whoever runs: the manifest (`bundle.json`), the places and hashes of the
files, and the oracle. Knows neither how a file was made nor which runtime
will load it, and imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
from pydantic import Field, ValidationError, model_validator

from export.bundle.frozen import Frozen, NotNegative
from export.bundle.int8 import CpuVerdict as CpuVerdict
from export.bundle.int8 import Int8Layer as Int8Layer
from export.bundle.int8 import Int8Layers as Int8Layers
from export.bundle.rows import Rows
from export.fold.report import FoldReport as FoldReport  # part of the contract: readers take it from here
from trainer.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"

Format = Literal["pt2", "torchscript", "onnx", "openvino", "aoti-cpu", "aoti-cuda"]
"""`aoti-…` is torch's program compiled ahead of time, for the kind of machine that exported it."""
Precision = Literal["float32", "float16", "bfloat16", "int8"]
Takes = Literal["preprocessed", "raw"]
"""What a file takes: the model's input, or the raw input, and then the preprocessing is inside."""
Dimension = int | str
OutputKind = Literal["scores", "values", "choices", "boxes", "box_scores", "box_classes"]
"""What an output is made of: class scores along axis 1, whose largest is the prediction; numbers; or whole numbers that
name something, of which none lies between two others. The last three are what a detector says of one image: as many
rows as it finds things, each with two corners (x, y, x, y), a score and a class."""
BOX_KINDS = frozenset({"boxes", "box_scores", "box_classes"})
Arrays = tuple[np.ndarray, ...]
"""One array for each of a model's inputs, or outputs, in their order."""
COARSER: dict[Precision, float] = {"float32": 1.0, "float16": 2.0**13, "bfloat16": 2.0**16, "int8": 2.0**16}
"""How much coarser than float32 a rounding is: float16 keeps 10 bits of a significand where float32 keeps 23, bfloat16
7. A step of int8 is 2^-8 of the largest value, whatever the value."""
RAW_SUFFIX = "-raw"
FLOAT32: Literal["float32"] = "float32"
VARIANTS = tuple(precision + suffix for suffix in ("", RAW_SUFFIX) for precision in get_args(Precision))
"""Every name that `FileEntry.variant` can have."""


def takes_raw(variant: str) -> bool:
    """Whether files of that variant take the raw input."""
    return variant.endswith(RAW_SUFFIX)


def precision_of(variant: str) -> Precision:
    """The precision of the files of a variant."""
    return cast(Precision, variant.removesuffix(RAW_SUFFIX))


class BundleError(UserError):
    """A bundle that is missing, damaged, incomplete or of another schema. The message names the file and the remedy."""


class TensorSpec(Frozen):
    """A named tensor; a dimension that is a string (``"batch"``) is symbolic."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class Output(TensorSpec):
    """A named output. `kind` is None where its numbers say what it is: `export.bundle.limits.kind_of`."""

    kind: OutputKind | None = None


class ImageSteps(Frozen):
    """How an image file becomes raw pixels, which no file of a bundle does: decoded, resized, and its centre taken.

    `resize` in pixels: one number is for the shorter side, two are height and width; None: the size stays. `crop` is
    height and width. `interpolation` is torchvision's name for how it is resized. `words` say all of it.
    """

    colour: Literal["L", "RGB"]
    resize: tuple[int, ...] | None
    crop: tuple[int, int] | None
    interpolation: str | None
    words: str


class Preprocessing(Frozen):
    """From the raw input as a user has it to what the model takes: ``(raw * scale - mean) / std``, in float32.

    `raw` describes the raw array; it is reshaped to the model's input shape, `mean` and `std` hold one value, or one
    for each channel (axis 1 of the model's input). Every backend computes this very expression, so that two runtimes
    differ in the model and not in its input. `outside` says how images became raw pixels; None where there were none.
    """

    raw: TensorSpec
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    outside: ImageSteps | None = None

    def apply(self, raw: np.ndarray, input_shape: tuple[Dimension, ...]) -> np.ndarray:
        """Raw array [N, …] → float32 array [N, *input_shape[1:]], the reference in NumPy."""
        sizes = tuple(
            have if isinstance(want, str) else want
            for want, have in zip(input_shape[1:], _pad(raw.shape[1:], len(input_shape) - 1), strict=True)
        )
        x = raw.reshape(raw.shape[0], *sizes).astype(np.float32)
        axis = (1, -1, *([1] * (x.ndim - 2))) if x.ndim > 1 else (-1,)
        mean = np.asarray(self.mean, np.float32).reshape(axis)
        std = np.asarray(self.std, np.float32).reshape(axis)
        return (x * np.float32(self.scale) - mean) / std


def _pad(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (1,) * (length - len(shape)) + shape


class DataFile(Frozen):
    """A file of the bundle: its place relative to the bundle, and what must be found there."""

    path: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: int

    @classmethod
    def of(cls, path: Path) -> DataFile:
        """The file as it is now."""
        return DataFile(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)


class FileEntry(DataFile):
    """A file that a runtime loads. `folded` is False for the control: the same model exported without folding.

    `companions` are files that must lie beside it, such as the weights of an OpenVINO model. Of an int8 file `cpus` say
    for which kinds of CPU it is proved right, and `int8` which layers its error comes from.
    """

    format: Format
    precision: Precision
    folded: bool
    takes: Takes = "preprocessed"
    opset: int | None = None
    companions: tuple[DataFile, ...] = ()
    cpus: tuple[CpuVerdict, ...] = ()
    int8: Int8Layers | None = None

    @property
    def variant(self) -> str:
        """Its kind by what changes the numbers: its precision and what it takes, for example ``int8-raw``."""
        return self.precision + (RAW_SUFFIX if self.takes == "raw" else "")


class Source(Frozen):
    """Where the weights come from. What is not known (a user's own model has no recipe) is None."""

    factory: str
    checkpoint_sha256: str
    recipe: str | None = None
    seed: int | None = None
    steps: int | None = None
    test_top1: float | None = None


class Limits(Frozen):
    """How far from the oracle a precision coarser than float32 may be; `export.bundle.limits` says why so far.

    `rms_percent` is the largest RMS error, in percent of the spread of the oracle's outputs. `top1_loss_points` is by
    how much top-1 may be lower, in points of 100, with 95 % confidence.
    """

    rms_percent: NotNegative
    top1_loss_points: NotNegative


RETIRED_TOLERANCES = frozenset(
    {
        "fast_top1_points",
        "fast_flips_percent",
        "int8_top1_points",
        "int8_p_value",
        "int8_flips_percent_without_labels",
    }
)
"""Limits on shares of flips and on differences of top-1, which no rule asks for any more. Older bundles state them."""


class Tolerances(Frozen):
    """What parity must hold to, stated by the exporter. The defaults are the project's own.

    `fast` is for float32 that a runtime may compute in TF32. A manifest that states a retired limit is read without it.
    """

    strict_rms_factor: NotNegative = 4.0
    strict_flip_margin: NotNegative = 1e-4
    fast: Limits = Limits(rms_percent=1.0, top1_loss_points=0.1)
    float16: Limits = Limits(rms_percent=1.0, top1_loss_points=0.1)
    bfloat16: Limits = Limits(rms_percent=8.0, top1_loss_points=0.25)
    int8: Limits = Limits(rms_percent=20.0, top1_loss_points=0.5)
    float32_rms_error: NotNegative
    """RMS error of the logits that float32 on the CPU makes against the oracle on the exporting machine: of a model of
    torch by torch, of an ONNX file by onnxruntime without optimisations.
    """
    more_float32_rms_errors: tuple[NotNegative, ...] = ()
    """The same of every further output; 0 of whole numbers."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name not in RETIRED_TOLERANCES}


class Environment(Frozen):
    """The exporting machine."""

    python: str
    platform: str
    versions: dict[str, str]
    git_commit: str | None


class LeftOut(Frozen):
    """A file, or more, that the bundle might have and has not: why, and what would change that. `asked_for` by its
    variant's name, and not as a part of all.
    """

    what: str
    reason: str
    asked_for: bool


class Proof(Frozen):
    """On how much a bundle was proved, where it was fitted to what the model costs.

    `inputs` of the `given` ones, drawn evenly, are the oracle's. Each float32 file was run on `checked` of these at the
    first of `batch_sizes`, on a few at the second; files of other precisions on all. In float64 the folded network was
    compared with the unfolded one on `compared` of them, on as many random ones and on as many borders.
    """

    given: int
    inputs: int
    checked: int
    compared: int
    batch_sizes: tuple[int, ...]


class Manifest(Frozen):
    """`bundle.json`."""

    schema_version: Literal[1]
    name: str
    source: Source
    input: TensorSpec
    output: Output
    more_inputs: tuple[TensorSpec, ...] = ()
    """Beside `input`, which the preprocessing makes: a file takes these as a user has them."""
    more_outputs: tuple[Output, ...] = ()
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    files: tuple[FileEntry, ...]
    left_out: tuple[LeftOut, ...] = ()
    checkpoint: DataFile | None = None
    """The weights as trained; None where the bundle is lean, and `model.unfolded.pt2` alone has them."""
    oracle: DataFile
    proof: Proof | None = None
    """None in bundles of before it was written down."""
    fold: FoldReport
    fold_for_torch: FoldReport | None = None
    """Of the files that torch runs, where another way is cheaper there; None where it is as in `fold`."""
    tolerances: Tolerances
    environment: Environment
    fingerprint: str
    """SHA-256 over everything that determined this bundle; equal means that exporting again would change nothing."""

    @property
    def fixed_batch(self) -> int | None:
        """The one batch size that the files take; None where they take any."""
        batch = self.input.shape[0]
        return batch if isinstance(batch, int) else None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in the order in which the files take them."""
        return (self.input, *self.more_inputs)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All outputs, in the order in which the files give them."""
        return (self.output, *self.more_outputs)


@dataclass(frozen=True)
class Oracle:
    """The truth: what the unfolded model makes in float64 of some inputs.

    `raw` [N, …] is the first input, as it is before the preprocessing, and `more_raw` the others; `logits` is the first
    output, float64 [N, …], and `more_outputs` the others, float64 or whole numbers. `labels` are int64 [N] or None.

    `raw` of a bundle are in memory; while one is made they may still lie in the user's file.
    """

    raw: Rows
    labels: np.ndarray | None
    logits: np.ndarray
    more_raw: tuple[Rows, ...] = ()
    more_outputs: Arrays = ()

    @property
    def inputs(self) -> tuple[Rows, ...]:
        """What the model was asked, all inputs."""
        return (self.raw, *self.more_raw)

    @property
    def outputs(self) -> Arrays:
        """What it answered, all outputs."""
        return (self.logits, *self.more_outputs)

    def first(self, count: int) -> Oracle:
        """That of the first `count` inputs."""
        return Oracle(
            self.raw[:count],
            None if self.labels is None else self.labels[:count],
            self.logits[:count],
            tuple(raw[:count] for raw in self.more_raw),
            tuple(output[:count] for output in self.more_outputs),
        )


def _kind(format: Format, variant: str, folded: bool) -> str:
    return f"{format}/{variant}/{'folded' if folded else 'unfolded'}"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `path` is the folder, `manifest` what `bundle.json` says, `digest` the hash of `bundle.json`.

    The manifest holds every file's hash, so `digest` identifies the whole bundle.
    """

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Parse and validate `bundle.json`; no other file is read. Raises BundleError."""
        folder = Path(path)
        manifest_path = folder / MANIFEST_NAME
        try:
            text = manifest_path.read_bytes()
        except OSError as error:
            raise BundleError(
                f"no bundle at {folder}: {MANIFEST_NAME} can't be read ({error.strerror}). "
                "Make one with `python -m export`, or name one with --bundle."
            ) from None
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{manifest_path} is not JSON ({error}). Export the bundle again.") from None
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{manifest_path} has schema_version {version!r}, this ninefold reads {SCHEMA_VERSION}. "
                "Export the bundle again."
            )
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(
                f"{manifest_path} is not a valid manifest: {where}: {first['msg']}. Export the bundle again."
            ) from None
        return cls(folder, manifest, hashlib.sha256(text).hexdigest())

    def verify(self) -> None:
        """Check every file's size and hash. Raises BundleError at the first that differs."""
        for entry in (*self.manifest.files, self.manifest.checkpoint, self.manifest.oracle):
            if entry is not None:
                self.locate(entry)

    def find(self, format: Format, variant: str = FLOAT32, folded: bool = True) -> FileEntry | None:
        """The one file of that kind, None where the bundle has none."""
        for file in self.manifest.files:
            if (file.format, file.variant, file.folded) == (format, variant, folded):
                return file
        return None

    def entry(self, format: Format, variant: str = FLOAT32, folded: bool = True) -> FileEntry:
        """The one file of that kind. Raises BundleError where the bundle has none."""
        found = self.find(format, variant, folded)
        if found is None:
            have = ", ".join(_kind(file.format, file.variant, file.folded) for file in self.manifest.files)
            wanted = _kind(format, variant, folded)
            raise BundleError(f"the bundle at {self.path} has no {wanted} file; it has {have}. Export it again.")
        return found

    def locate(self, entry: DataFile) -> Path:
        """The file's path, after its size and hash were checked, and those of its companions. Raises BundleError."""
        if isinstance(entry, FileEntry):
            for companion in entry.companions:
                self.locate(companion)
        path = self.path / entry.path
        try:
            size, found = path.stat().st_size, sha256_file(path)
        except OSError as error:
            raise BundleError(
                f"{path} can't be read ({error.strerror}), but the manifest lists it. Export the bundle again."
            ) from None
        if size != entry.bytes or found != entry.sha256:
            raise BundleError(
                f"{path} was altered: {size} bytes with SHA-256 {found[:16]}…, the manifest says {entry.bytes} bytes "
                f"with {entry.sha256[:16]}…. Export the bundle again, or copy it again from where it came."
            )
        return path

    def oracle(self) -> Oracle:
        """The oracle, after its hash was checked. Raises BundleError."""
        from safetensors.numpy import load_file

        tensors = load_file(self.locate(self.manifest.oracle))
        more_raw = tuple(tensors[f"raw.{spec.name}"] for spec in self.manifest.more_inputs)
        more_outputs = tuple(tensors[f"output.{spec.name}"] for spec in self.manifest.more_outputs)
        return Oracle(tensors["raw"], tensors.get("labels"), tensors["logits"], more_raw, more_outputs)

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of each output for the oracle's inputs, the batch left out. Raises BundleError."""
        from safetensors import safe_open

        names = ["logits", *(f"output.{spec.name}" for spec in self.manifest.more_outputs)]
        with safe_open(self.locate(self.manifest.oracle), framework="numpy") as file:
            return tuple(tuple(file.get_slice(name).get_shape()[1:]) for name in names)

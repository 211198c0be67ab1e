"""Variants: the same network in other precisions, or with the preprocessing inside.

Owns which variant is made in which formats, and what this machine can't make of them. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from export.bundle import (
    FLOAT32,
    VARIANTS,
    Format,
    LeftOut,
    Precision,
    Preprocessing,
    Takes,
    precision_of,
    takes_raw,
)
from export.fold.report import Runtime
from export.formats import openvino_file
from trainer.errors import EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_USAGE, UserError

if TYPE_CHECKING:
    pass

Kind = Runtime | Literal["int8"]
ALL = "all"
"""What `--variant` takes for everything that this machine can make."""

FORMATS: dict[Precision, tuple[Format, ...]] = {
    "float32": ("pt2", "onnx"),
    "float16": ("pt2", "onnx"),
    "bfloat16": ("pt2",),  # onnxruntime's CPU provider has no bfloat16 layers (1.31), so the file could not be checked
    "int8": ("onnx", "openvino"),
}
"""What a precision is written as."""

SUFFIXES: dict[Format, str] = {
    "pt2": ".pt2",
    "onnx": ".onnx",
    "openvino": ".xml",
    "aoti-cpu": ".aoti-cpu.pt2",
    "aoti-cuda": ".aoti-cuda.pt2",
}


@dataclass(frozen=True)
class File:
    """A file that is to be made beside those that every bundle has."""

    format: Format
    variant: str

    @property
    def precision(self) -> Precision:
        return precision_of(self.variant)

    @property
    def takes(self) -> Takes:
        return "raw" if takes_raw(self.variant) else "preprocessed"

    @property
    def kind(self) -> Kind:
        """Which network it is made from: folded for the runtime that runs it, or for int8 on any."""
        if self.precision == "int8":
            return "int8"
        return "onnxruntime" if self.format == "onnx" else "torch"

    @property
    def name(self) -> str:
        return f"model{'' if self.variant == FLOAT32 else '.' + self.variant}{SUFFIXES[self.format]}"


@dataclass(frozen=True)
class Plan:
    """The files to be made, which of them were asked for by name, and what of everything is not made.

    `max_drop` is by how many points of 100 the top-1 of int8 may drop on calibration inputs; None: it isn't looked at.
    """

    files: tuple[File, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    by_name: frozenset[str] = frozenset()
    max_drop: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether a file needs inputs to calibrate with."""
        return any(file.precision == "int8" for file in self.files)

    @property
    def compiled(self) -> bool:
        """Whether a file is machine code."""
        return any(file.format.startswith("aoti") for file in self.files)


def plan(
    asked: Sequence[str],
    aoti: bool,
    raw_refusal: str | None,
    calibration_refusal: str | None,
    max_drop: float | None = None,
    formats: Sequence[Format] | None = None,
) -> Plan:
    """What to make for `--variant` as it was given, and `--aoti`, in those of `formats`; None for all that there are.

    The refusals say why there can be no variant that takes the raw input, or none of int8; None where there can. What
    was asked for by name and can't be made raises UserError; of `all` it is left out, and the plan says so.
    """
    unknown = [name for name in asked if name not in (*VARIANTS, ALL)]
    if unknown:
        raise UserError(f"--variant {unknown[0]} is not known; there are {', '.join((*VARIANTS, ALL))}.", EXIT_USAGE)
    files: list[File] = []
    left_out: dict[str, list[str]] = {}
    for variant in VARIANTS:
        if variant == FLOAT32 or (variant not in asked and ALL not in asked):
            continue
        made_as = FORMATS[precision_of(variant)]
        possible = [format for format in made_as if formats is None or format in formats]
        for file in (File(format, variant) for format in possible or made_as):  # the reason is said of the latter
            reason, exit_code = _refusal(file, raw_refusal, calibration_refusal, formats)
            if reason is None:
                files.append(file)
            elif variant in asked:
                raise UserError(f"--variant {variant} can't be made: {reason}.", exit_code)
            else:
                what = f"{variant} as {file.format}" if exit_code == EXIT_UNAVAILABLE else variant
                left_out[reason] = list(dict.fromkeys([*left_out.get(reason, []), what]))
    if aoti:
        from export.formats import aoti as compiler

        programs = [FLOAT32, *(file.variant for file in files if file.format == "pt2")]
        for device in compiler.devices():
            files += [File(_compiled_for(device), variant) for variant in programs]
    named = {file.name for file in files if file.variant in asked or (aoti and file.format.startswith("aoti"))}
    absent = (LeftOut(what=", ".join(what), reason=why, asked_for=False) for why, what in left_out.items())
    made = Plan(tuple(files), tuple(absent), frozenset(named), max_drop)
    if max_drop is not None and not made.calibrated:
        raise UserError("--max-drop is for int8, which is not made. Leave it out, or add --variant int8.", EXIT_USAGE)
    return made


def _refusal(
    file: File, raw_refusal: str | None, calibration_refusal: str | None, formats: Sequence[Format] | None
) -> tuple[str | None, int]:
    """Why a file can't be made, None where it can, and the exit code that this is worth."""
    if formats is not None and file.format not in formats:
        return f"it is written as {file.format} alone, which takes a model of torch: --model", EXIT_BAD_INPUT
    if file.takes == "raw" and raw_refusal is not None:
        return raw_refusal, EXIT_BAD_INPUT
    if file.precision == "int8" and calibration_refusal is not None:
        return calibration_refusal, EXIT_BAD_INPUT
    if file.format == "openvino" and (missing := openvino_file.missing()) is not None:
        return missing, EXIT_UNAVAILABLE
    return None, EXIT_BAD_INPUT


def raw_refusal(preprocessing: Preprocessing) -> str | None:
    """Why no file that takes the raw input can be made, or None where one can."""
    if preprocessing.raw.dtype.startswith(("uint", "int")):
        return None
    unchanged = preprocessing.scale == 1 and set(preprocessing.mean) == {0.0} and set(preprocessing.std) == {1.0}
    if unchanged:
        return "the raw input already is what the model takes, so there is no preprocessing to put into the file"
    return f"the raw input is {preprocessing.raw.dtype}, and what is gained comes of whole numbers"


def _compiled_for(device: Literal["cpu", "cuda"]) -> Format:
    return "aoti-cpu" if device == "cpu" else "aoti-cuda"

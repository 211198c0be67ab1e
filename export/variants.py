"""Variants: the same network in other precisions, or with the preprocessing inside.

Owns which variant is made in which formats, what this machine can't make of them, and the networks that they are made
from. Knows neither how a file is checked nor how a format is written. Importing this imports no torch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export.bundle import FLOAT32, VARIANTS, Format, Precision, Preprocessing, Takes, precision_of, takes_raw
from export.fold.report import Runtime, Strategy
from export.formats import openvino_file
from trainer.errors import EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_USAGE, UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from export.fold import Folded
    from export.source import Material

Kind = Runtime | Literal["int8"]
Networks = Mapping[Kind, "nn.Module"]
"""float64 networks, by the kind of files that are made from them."""

ALL = "all"
"""What `--variant` takes for everything that this machine can make."""

FORMATS: dict[Precision, tuple[Format, ...]] = {
    "float32": ("pt2", "onnx"),
    "float16": ("pt2", "onnx"),
    "bfloat16": ("pt2",),  # onnxruntime's CPU provider has no bfloat16 layers (1.31), so the file could not be checked
    "int8": ("onnx", "openvino"),
}
"""What a precision is written as; each format of int8 has a quantiser of its own, onnxruntime and NNCF."""

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
    """The files to be made, and in words what of everything is not."""

    files: tuple[File, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether a file needs inputs to calibrate with."""
        return any(file.precision == "int8" for file in self.files)

    @property
    def compiled(self) -> bool:
        """Whether a file is machine code."""
        return any(file.format.startswith("aoti") for file in self.files)


def plan(asked: Sequence[str], aoti: bool, raw_refusal: str | None, calibration_refusal: str | None) -> Plan:
    """What to make for `--variant` as it was given, and `--aoti`.

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
        for file in (File(format, variant) for format in FORMATS[precision_of(variant)]):
            reason, exit_code = _refusal(file, raw_refusal, calibration_refusal)
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
    return Plan(tuple(files), tuple(f"{', '.join(names)}: {reason}" for reason, names in left_out.items()))


def _refusal(file: File, raw_refusal: str | None, calibration_refusal: str | None) -> tuple[str | None, int]:
    """Why a file can't be made, None where it can, and the exit code that this is worth."""
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


# -- the networks ----------------------------------------------------------------------------------------------------


def networks(
    plan: Plan, model64: nn.Module, folded: Mapping[Runtime, Folded], example64: torch.Tensor, strategy: Strategy
) -> Networks:
    """What the plan's files are made from; it shares nothing with `folded`, the float32 network of each runtime."""
    kinds = {file.kind for file in plan.files}
    made: dict[Kind, nn.Module] = {
        runtime: copy.deepcopy(way.module) for runtime, way in folded.items() if runtime in kinds
    }
    if "int8" in kinds:
        made["int8"] = _for_int8(model64, folded["onnxruntime"], example64, strategy)
    return made


def _for_int8(model64: nn.Module, folded: Folded, example64: torch.Tensor, strategy: Strategy) -> nn.Module:
    """The network as int8 runs it fastest: activations before pooling, and channels of ones where `auto` may choose.

    A ReLU that follows a layer directly is part of that layer's quantisation, and pooling after it works on int8; after
    pooling it keeps both in float32. A bias map is added in float32. Measured with the article's network, int8 from raw
    pixels (OpenVINO 2026.4, two AVX-512 cores, batch 256, paired rounds): 3.42 times eager torch's images/s like this,
    3.10 with a bias map and ReLU after pooling.
    """
    from export.fold import fold_batchnorm
    from export.fold.batchnorm import any_batch

    if strategy in ("auto", "all"):
        with_ones = fold_batchnorm(model64, (example64,), dynamic_shapes=any_batch(), strategy="ones")
        if len(with_ones.report.kept) <= len(folded.report.kept):
            return _activations_first(with_ones.module)
    return _activations_first(copy.deepcopy(folded.module))


def _activations_first(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`module` with relu(max_pool(x)) as max_pool(relu(x)), which is the same to the last bit."""
    import torch

    aten = torch.ops.aten
    pools = {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default}
    graph = module.graph
    for relu in list(graph.nodes):
        pool = relu.args[0] if relu.target in (aten.relu.default, aten.relu_.default) else None
        if not isinstance(pool, torch.fx.Node) or pool.target not in pools or len(pool.users) > 1:
            continue
        with graph.inserting_before(pool):
            earlier = graph.call_function(aten.relu.default, (pool.args[0],))
        pool.update_arg(0, earlier)
        relu.replace_all_uses_with(pool)
        graph.erase_node(relu)
    module.recompile()
    return module


def _narrow(network64: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in a narrower floating-point type, float32 at both ends."""
    from torch import nn

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(network64).to(dtype)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(x.to(dtype)).float()
            return output

    return Narrow().eval()


# -- the files -------------------------------------------------------------------------------------------------------


def write(
    plan: Plan,
    made_from: Networks,
    material: Material,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[tuple[File, int | None]]:
    """Write the plan's files into `folder`, and yield each with its opset where it has one."""
    from export.formats import aoti, onnx_file, onnx_int8, pt2

    programs: dict[tuple[Kind, str], torch.export.ExportedProgram] = {}
    names = {"raw": material.preprocessing.raw.name, "preprocessed": material.input.name}
    with tempfile.TemporaryDirectory() as scratch:
        for file in plan.files:
            say(f"making {file.name}")
            path, opset = folder / file.name, None
            made = file.kind, file.variant
            if made not in programs:
                programs[made] = _program(file, made_from[file.kind], material)
            program = programs[made]
            ends = names[file.takes], material.output.name
            if file.precision == "int8":
                float32_file = Path(scratch) / f"{file.variant}.onnx"
                if not float32_file.exists():
                    onnx_file.write(program, float32_file, *ends, optimize=True)
                quantiser = onnx_int8 if file.format == "onnx" else openvino_file
                opset = quantiser.write(float32_file, path, _calibration_inputs(file, material))
            elif file.format == "pt2":
                pt2.write(program, path)
            elif file.format == "onnx":
                opset = onnx_file.write(program, path, *ends, optimize=True)
            else:
                aoti.write(program, path, "cpu" if file.format == "aoti-cpu" else "cuda")
            yield file, opset


def _program(file: File, network64: nn.Module, material: Material) -> torch.export.ExportedProgram:
    """The program that the file is made from; that of an int8 file is in float32."""
    import torch

    from export.fold.batchnorm import any_batch, export_program
    from export.raw_input import FromRaw

    narrower = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(file.precision)
    network = copy.deepcopy(network64).float() if narrower is None else _narrow(network64, narrower)
    example = torch.from_numpy(material.example)
    if file.takes == "raw":
        network = FromRaw(network, material.preprocessing, material.input, torch.float32)
        example = torch.from_numpy(material.raw[:2].copy())
    return export_program(network.eval(), (example,), any_batch())


def _calibration_inputs(file: File, material: Material) -> np.ndarray:
    assert material.calibration is not None
    raw = material.calibration.raw
    return raw if file.takes == "raw" else material.preprocessing.apply(raw, material.input.shape)

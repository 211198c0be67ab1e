"""Writing the files of a plan: the networks that they are made from, and each in its format.

Owns which network a file is made from, and what int8 is calibrated with. Knows neither how a file is checked nor how a
format is written.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from export.bundle import Int8Layers, Output, Preprocessing, TensorSpec, Tolerances
from export.bundle.rows import Rows
from export.columns import laid_on_side
from export.fold import Folded, fold_batchnorm
from export.fold.batchnorm import export_program
from export.fold.report import Runtime, Strategy
from export.formats import aoti, onnx_file, onnx_int8, openvino_file, pt2
from export.int8.ranking import Ranked
from export.raw_input import FromRaw
from export.sources.material import ModelInputs
from export.variants import File, Kind, Plan

if TYPE_CHECKING:
    from export.sources.material import Calibration, Material

Networks = Mapping[Kind, nn.Module]
"""float64 networks, by the kind of files that are made from them."""

LIMIT_PERCENT = Tolerances(float32_rms_error=0.0).int8.rms_percent
"""The largest RMS error of an int8 file, in percent of the spread of the outputs."""
FEW = 50
"""Calibration inputs that are too few to keep some apart."""


def networks(
    plan: Plan,
    model64: nn.Module,
    folded: Mapping[Runtime, Folded],
    examples64: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    strategy: Strategy,
) -> Networks:
    """What the plan's files are made from; it shares nothing with `folded`, the float32 network of each runtime."""
    kinds = {file.kind for file in plan.files}
    made: dict[Kind, nn.Module] = {
        runtime: copy.deepcopy(way.module) for runtime, way in folded.items() if runtime in kinds
    }
    if "int8" in kinds:
        made["int8"] = _for_int8(model64, folded["onnxruntime"], examples64, dynamic_shapes, strategy)
    return made


def _for_int8(
    model64: nn.Module,
    folded: Folded,
    examples64: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    strategy: Strategy,
) -> nn.Module:
    """The network as int8 runs it fastest: activations before pooling, and channels of ones where `auto` may choose.

    A ReLU that follows a layer directly is part of that layer's quantisation, and pooling after it works on int8; after
    pooling it keeps both in float32. A bias map is added in float32. Measured with the article's network, int8 from raw
    pixels (OpenVINO 2026.4, two AVX-512 cores, batch 256, paired rounds): 3.42 times eager torch's images/s like this,
    3.10 with a bias map and ReLU after pooling.
    """
    if strategy in ("auto", "all"):
        with_ones = fold_batchnorm(model64, examples64, dynamic_shapes=dynamic_shapes, strategy="ones")
        if len(with_ones.report.kept) <= len(folded.report.kept):
            return _activations_first(laid_on_side(with_ones.module))
    return _activations_first(copy.deepcopy(folded.module))


def _activations_first(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`module` with relu(max_pool(x)) as max_pool(relu(x)), which is the same to the last bit."""
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
    """The network in a narrower floating-point type, float32 at all its ends."""
    narrow = copy.deepcopy(network64).to(dtype)
    assert isinstance(narrow, torch.fx.GraphModule), "as folding makes them"
    graph = narrow.graph
    (result,) = graph.find_nodes(op="output")
    given = [node for node in graph.find_nodes(op="placeholder") if _is_float(node)]
    made = [node for node in result.all_input_nodes if _is_float(node)]
    for node in given:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            inside = graph.call_method("to", (node, dtype))
        node.replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
    for node in made:
        with graph.inserting_before(result):
            outside = graph.call_method("to", (node, torch.float32))
        result.replace_input_with(node, outside)
    narrow.recompile()
    return narrow.eval()


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


class Calibrated(Protocol):
    """What a source has of inputs to calibrate with."""

    @property
    def calibration(self) -> Calibration | None: ...
    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def input(self) -> TensorSpec: ...
    @property
    def more_inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[Output, ...]: ...


@dataclass(frozen=True)
class Written:
    """What is known of a file beside its bytes: the opset of ONNX, and where the error of int8 comes from."""

    opset: int | None = None
    int8: Int8Layers | None = None


class Writer:
    """Writes the files of a plan into `folder`, from float64 networks, and keeps what several of them are made of.

    What the quantiser takes ranges from is four fifths of the calibration inputs; the rest shows the error. Of fewer
    than `FEW` all are for both. `max_drop` is by how many points top-1 may drop on that rest.
    """

    def __init__(self, made_from: Networks, material: Material, folder: Path, max_drop: float | None) -> None:
        self._max_drop = max_drop
        self._made_from, self._material, self._folder = made_from, material, folder
        self._programs: dict[tuple[Kind, str], torch.export.ExportedProgram] = {}
        self._int8: dict[str, tuple[Path, Int8Layers, int]] = {}

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory()
        return self

    def int8_layers(self, file: File) -> Int8Layers | None:
        """Where the error of an int8 file comes from, once that is known."""
        made = self._int8.get(file.variant)
        return None if made is None else made[1]

    def __exit__(self, *exception: object) -> None:
        self._scratch.cleanup()

    def write(self, file: File) -> Written:
        """Write one file; raises whatever its format's writer does."""
        path, program = self._folder / file.name, self._program(file)
        ends = self._material.names(file.takes)
        if file.precision == "int8":
            return self._write_int8(file, program, path, ends)
        if file.format == "onnx":
            return Written(onnx_file.write(program, path, *ends, optimize=True))
        if file.format == "pt2":
            pt2.write(program, path)
        else:
            aoti.write(program, path, "cpu" if file.format == "aoti-cpu" else "cuda")
        return Written()

    def _program(self, file: File) -> torch.export.ExportedProgram:
        made = file.kind, file.variant
        if made not in self._programs:
            self._programs[made] = _program(file, self._made_from[file.kind], self._material)
        return self._programs[made]

    def _write_int8(
        self, file: File, program: torch.export.ExportedProgram, path: Path, ends: tuple[list[str], list[str]]
    ) -> Written:
        quantised, layers, opset = self._quantised(file, program, ends)
        if file.format == "onnx":
            shutil.copyfile(quantised, path)
            return Written(opset, layers)
        openvino_file.write(quantised, path)
        return Written(None, layers)

    def _quantised(
        self, file: File, program: torch.export.ExportedProgram, ends: tuple[list[str], list[str]]
    ) -> tuple[Path, Int8Layers, int]:
        """The int8 ONNX file of a variant, where its error comes from, and its opset; made once."""
        if file.variant not in self._int8:
            scratch = Path(tempfile.mkdtemp(dir=self._scratch.name))
            float32_file, quantised = scratch / "float32.onnx", scratch / "int8.onnx"
            onnx_file.write(program, float32_file, *ends, optimize=True, quantised=True)
            inputs = calibration_inputs(file, self._material)
            layers, opset = quantise(float32_file, quantised, inputs, self._max_drop, scratch)
            self._int8[file.variant] = quantised, layers, opset
        return self._int8[file.variant]


def _program(file: File, network64: nn.Module, material: Material) -> torch.export.ExportedProgram:
    """The program that the file is made from; that of an int8 file is in float32."""
    narrower = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(file.precision)
    network = copy.deepcopy(network64).float() if narrower is None else _narrow(network64, narrower)
    examples = tuple(map(torch.from_numpy, material.examples))
    if file.takes == "raw":
        network = FromRaw(network, material.preprocessing, material.input, torch.float32)
        examples = (torch.from_numpy(np.array(material.raw[:2])),)
    return export_program(network.eval(), examples, material.dynamic_shapes(file.takes))


@dataclass(frozen=True)
class CalibrationInputs:
    """What a file's ranges are taken from, what its error is seen with, both as the file takes them, and the labels of
    the latter.
    """

    ranges: Rows
    apart: Rows
    labels: np.ndarray | None


def calibration_inputs(file: File, material: Calibrated) -> CalibrationInputs:
    """The calibration inputs of a source, for a file: four fifths for its ranges, of few all."""
    assert material.calibration is not None
    raw, labels = material.calibration.raw, material.calibration.labels
    inputs: Rows = raw if file.takes == "raw" else ModelInputs(raw, material.preprocessing, material.input)
    ranges = len(inputs) * 4 // 5 if len(inputs) >= FEW else 0
    return CalibrationInputs(inputs[: ranges or None], inputs[ranges:], None if labels is None else labels[ranges:])


def quantise(
    float32_file: Path, target: Path, inputs: CalibrationInputs, max_drop: float | None, scratch: Path
) -> tuple[Int8Layers, int]:
    """Write the int8 file of a float32 one; → where its error comes from, and its opset. `scratch` is a folder."""
    quantiser = onnx_int8.Quantiser(float32_file, inputs.ranges, scratch)
    ranked = Ranked(quantiser, float32_file, inputs.apart, inputs.labels, scratch)
    layers = ranked.layers(LIMIT_PERCENT, max_drop)
    opset = quantiser.write(target, [layer.name for layer in layers.layers if layer.in_float])
    return layers, opset

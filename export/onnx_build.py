"""Making a bundle of an ONNX file: the control is the file as it is, and everything else is made from it.

Owns the order of things for such a source; what holds for every source is `export.build`'s. There are no files for
torch in such a bundle, since there is no model of torch.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnx.version_converter
import torch

from export import oracle_file
from export.build import (
    NO_VARIANTS,
    environment_of,
    fingerprint,
    variants_of,
)
from export.bundle import (
    BOX_KINDS,
    MANIFEST_NAME,
    Arrays,
    Bundle,
    DataFile,
    FileEntry,
    Int8Layers,
    Manifest,
    Oracle,
    Output,
    Tolerances,
)
from export.bundle.limits import rms
from export.bundle.rows import Rows
from export.checks import Checks, float32_errors, runner
from export.effort import usual
from export.errors import ExportRefused
from export.fold.from_onnx.file import has_external_data
from export.fold.onnx_model import fold_onnx
from export.fold.report import FoldReport, Runtime, Strategy
from export.folding import summary
from export.formats import onnx_float64, onnx_raw, openvino_file, torchscript
from export.formats.onnx_float64 import Float64File
from export.formats.running import run_in_batches
from export.oracle import outputs64
from export.progress import Progress, Say
from export.sources.onnx_source import OnnxMaterial
from export.variants import File, Plan
from export.writing import Written, calibration_inputs, quantise
from trainer.errors import UserError
from trainer.publish import building, refuse_foreign

CONTROL, FOLDED = "model.unfolded.onnx", "model.onnx"
ORACLE_BATCH = 4
"""Images at a time for the oracle: every value that a node still needs is in memory, in float64."""
SCALES_BY_CHANNEL = 13
"""The opset from which QuantizeLinear and DequantizeLinear have an axis."""
ROUNDING_PERCENT = 1.0
"""How far, in percent of the RMS of an output, float32 may be from float64 and it is still taken for rounding.
More is a fault of one of the two, or a network whose outputs float32 can't tell: nothing could be held to such a
truth. ResNet-18 is at 0.00003."""


def build(
    material: OnnxMaterial,
    target: Path,
    strategy: Strategy,
    say: Say,
    plan: Plan = NO_VARIANTS,
) -> Bundle:
    """Make a bundle of `material` and publish it at `target`, as `export.build.build` does for a model of torch.

    The unit of errors, `float32_rms_error`, is what onnxruntime makes of the file with its optimisations off.
    """
    refuse_foreign(target, MANIFEST_NAME)
    inputs = material.inputs
    with building(target, MANIFEST_NAME) as folder:
        control, folded = folder / CONTROL, folder / FOLDED
        _copy(material.file, control)
        say("folding")
        report = fold_onnx(control, folded, strategy).report
        say(summary(report))
        say(f"computing the float64 oracle of {len(material.raw)} inputs")
        logits, *more = _outputs64(control, inputs, material)
        oracle = Oracle(material.raw, material.labels, logits, more_outputs=tuple(more))
        oracle_file.write(folder / "oracle.safetensors", oracle, (), material.outputs[1:])
        entries = [_entry(folded, True), _entry(control, False), *_scripts(folder, material)]
        say("checking every file with optimisations off")
        effort = usual(len(material.raw), material.batch)
        found = run_in_batches(runner(folder, entries[1]), inputs, effort.batches[0], material.outputs)
        error, *more_errors = errors = float32_errors(found, oracle, material.outputs)
        _require_rounding(errors, oracle, material.outputs)
        tolerances = Tolerances(float32_rms_error=error, more_float32_rms_errors=tuple(more_errors))
        kept: dict[Runtime, int] = {"onnxruntime": len(report.kept)}
        checks = Checks(folder, oracle, inputs, material.outputs, kept, tolerances, effort)
        for entry in entries:
            if (problem := checks.check(entry).problem) is not None:
                raise ExportRefused(f"{entry.path} is not right: {problem}.")
        with OnnxWriter(material, folder, report, strategy, plan.max_drop) as writer:
            made, lacking = variants_of(plan, writer, checks, Progress(say))
        calibration = None if material.calibration is None else material.calibration.identity
        manifest = Manifest(
            schema_version=1,
            name=target.name,
            source=material.source,
            input=material.input,
            output=material.outputs[0],
            more_outputs=material.outputs[1:],
            preprocessing=material.preprocessing,
            class_names=material.class_names,
            files=(*entries, *made),
            left_out=(*plan.left_out, *lacking),
            checkpoint=DataFile.of(control),
            oracle=DataFile.of(folder / "oracle.safetensors"),
            fold=report,
            tolerances=tolerances,
            environment=environment_of(plan),
            fingerprint=fingerprint(material.source, strategy, plan, calibration),
        )
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Bundle.open(target)


class OnnxWriter:
    """Writes the files of a plan into `folder`, from the folded file there."""

    def __init__(
        self,
        material: OnnxMaterial,
        folder: Path,
        report: FoldReport,
        strategy: Strategy,
        max_drop: float | None,
    ) -> None:
        self._material, self._folder, self._max_drop = material, folder, max_drop
        self._report, self._strategy = report, strategy
        self._int8: dict[str, tuple[Path, Int8Layers, int]] = {}

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *exception: object) -> None:
        self._scratch.cleanup()

    def int8_layers(self, file: File) -> Int8Layers | None:
        """Where the error of an int8 file comes from, once that is known."""
        made = self._int8.get(file.variant)
        return None if made is None else made[1]

    def write(self, file: File) -> Written:
        """Write one file; raises whatever its format's writer does."""
        path = self._folder / file.name
        if file.precision == "int8":
            quantised, layers, opset = self._quantised(file)
            if file.format == "onnx":
                shutil.copyfile(quantised, path)
                return Written(opset, layers)
            openvino_file.write(quantised, path)
            return Written(None, layers)
        model = onnx.load(str(self._folder / FOLDED))
        if file.precision == "float16":
            model = _narrow(model)
        if file.takes == "raw":
            model = onnx_raw.from_raw(model, self._material.preprocessing, self._material.input)
        onnx.save(model, str(path))
        return Written(opset_of(model))

    def _quantised(self, file: File) -> tuple[Path, Int8Layers, int]:
        """The int8 file of a variant, where its error comes from, and its opset; made once."""
        if file.variant not in self._int8:
            scratch = Path(tempfile.mkdtemp(dir=self._scratch.name))
            float32_file, quantised = scratch / "float32.onnx", scratch / "int8.onnx"
            self._for_int8(float32_file)
            if file.takes == "raw":
                model = onnx.load(str(float32_file))
                model = onnx_raw.from_raw(model, self._material.preprocessing, self._material.input)
                onnx.save(model, str(float32_file))
            inputs = calibration_inputs(file, self._material)
            layers, opset = quantise(float32_file, quantised, inputs, self._max_drop, scratch)
            self._int8[file.variant] = quantised, layers, opset
        return self._int8[file.variant]

    def _for_int8(self, path: Path) -> None:
        """The file as int8 runs it fastest, as a quantiser takes it: in an opset that has a scale for each channel, and
        with a name for each node, by which it is told what stays in float.
        """
        self._fold_for_int8(path)
        model = onnx.load(str(path))
        if opset_of(model) < SCALES_BY_CHANNEL:
            model = onnx.version_converter.convert_version(model, SCALES_BY_CHANNEL)
        taken: set[str] = set()
        for place, node in enumerate(model.graph.node):
            if not node.name or node.name in taken:
                node.name = f"{node.op_type}_{place}"
            taken.add(node.name)
        onnx.save(model, str(path))

    def _fold_for_int8(self, path: Path) -> None:
        """With channels of ones where `auto` may choose, see `export.writing`."""
        if self._strategy in ("auto", "all"):
            with_ones = fold_onnx(self._folder / CONTROL, path, "ones").report
            if len(with_ones.kept) <= len(self._report.kept):
                return
        shutil.copyfile(self._folder / FOLDED, path)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that the file uses."""
    return max((int(used.version) for used in model.opset_import if used.domain in ("", "ai.onnx")), default=0)


def _entry(path: Path, folded: bool) -> FileEntry:
    opset = opset_of(onnx.load(str(path), load_external_data=False))
    facts = DataFile.of(path).model_dump()
    return FileEntry(**facts, format="onnx", precision="float32", folded=folded, opset=opset)


def _copy(source: Path, target: Path) -> None:
    """The file as it is; with what lies beside it inside, if anything does."""
    if has_external_data(source):
        onnx.save(onnx.load(str(source)), str(target))
    else:
        shutil.copyfile(source, target)


def _narrow(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` in float16, float32 at both ends."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    narrow: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    return narrow


def _scripts(folder: Path, material: OnnxMaterial) -> list[FileEntry]:
    """TorchScript of the model that the file was traced from, where there is one: unfolded, since it is the file that
    is folded.
    """
    if material.module is None or not torchscript.available():
        return []
    path = folder / "model.unfolded.ts"
    examples = (torch.from_numpy(np.asarray(rows[: material.batch or 2])) for rows in material.inputs)
    torchscript.write(material.module, tuple(examples), path)
    return [FileEntry(**DataFile.of(path).model_dump(), format="torchscript", precision="float32", folded=False)]


def _outputs64(control: Path, inputs: tuple[Rows, ...], material: OnnxMaterial) -> Arrays:
    """Every output for all inputs, in float64: of the model that the file was traced from, or of the file. Raises
    UserError where they can't be computed.
    """
    batch = material.batch or ORACLE_BATCH
    try:
        if material.module is not None:
            outputs = outputs64(copy.deepcopy(material.module).double(), inputs, batch, material.outputs)
        else:
            outputs = run_in_batches(Float64File(control), inputs, batch, material.outputs)
    except onnx_float64.NotComputable as error:
        raise UserError(
            f"{material.file} can't be computed in float64, so there is no truth to hold its files to: {error}. "
            "Without one it can still be folded: python -m export fold FILE --out FOLDED."
        ) from error
    for spec, output in zip(material.outputs, outputs, strict=True):
        if spec.kind in BOX_KINDS:
            continue
        expected = (len(material.raw), *spec.shape[1:])
        if output.shape != expected:
            raise ExportRefused(
                f"{material.file}: {spec.name} has shape {list(output.shape)} in float64, and {list(expected)} with "
                "onnxruntime: its size depends on the numbers."
            )
        if not np.isfinite(output).all():
            raise ExportRefused(f"{material.file}: {spec.name} is not finite (NaN or infinity) for some inputs.")
    return outputs


def _require_rounding(errors: Sequence[float], oracle: Oracle, outputs: Sequence[Output]) -> None:
    """Raises ExportRefused where float32 and float64 differ by more than rounding does."""
    for error, truth, spec in zip(errors, oracle.outputs, outputs, strict=True):
        limit = ROUNDING_PERCENT / 100 * rms(truth)
        if not error <= limit:
            raise ExportRefused(
                f"{spec.name}: onnxruntime in float32 and ONNX's reference in float64 differ by {error:.3g} (RMS), and "
                f"{limit:.3g} is the most that is taken for rounding: one of the two computes something else, or "
                "float32 is not enough for this network."
            )

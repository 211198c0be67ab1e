"""Making a bundle: every file written, loaded again and checked before anything is published.

Owns the order of things and what must hold: no BatchNorm in a folded file but those that the report keeps, the folded
network equal to the unfolded one in float64, every file right when run with optimisations off. Knows neither the
rules of folding nor the details of a format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import export
from export.bundle import (
    MANIFEST_NAME,
    Arrays,
    Bundle,
    BundleError,
    DataFile,
    Environment,
    FileEntry,
    LeftOut,
    Manifest,
    Oracle,
    Source,
    Tolerances,
)
from export.bundle.int8 import Int8Layers
from export.checks import Checked, Checks, float32_errors, runner
from export.effort import LARGE_BYTES, Asked, Cost, Effort, fitted, measured, weight_bytes
from export.errors import ExportRefused
from export.fold.report import Runtime, Strategy
from export.formats.running import run_in_batches
from export.progress import Progress, Say
from export.variants import File, Plan
from trainer.errors import UserError, no_interrupt_lost
from trainer.provenance import cpu_name, git_commit, installed
from trainer.publish import building, refuse_foreign

if TYPE_CHECKING:
    import torch

    from export.float32_files import Programs
    from export.fold import Folded
    from export.sources.material import Material
    from export.writing import Written

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "safetensors")
INT8_LIBRARIES = ("openvino",)
NO_VARIANTS, FITTED = Plan(), Asked()


def fingerprint(
    source: Source,
    strategy: str,
    plan: Plan = NO_VARIANTS,
    calibration: str | None = None,
    asked: Asked = FITTED,
) -> str:
    """SHA-256 over everything that determines a bundle: weights, options, versions, and this package's own code.

    `calibration` identifies the inputs that int8 files are calibrated with. Machine code is for one processor.
    """
    root = Path(export.__file__).parent
    code = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root.parent / "trainer").glob("*.py")]):
        code.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    facts = {
        "source": source.model_dump(),
        "strategy": strategy,
        "versions": _versions(plan),
        "code": code.hexdigest(),
        "files": [file.name for file in plan.files],
        "calibration": calibration if plan.calibrated else None,
        "max_drop": plan.max_drop,
        "effort": asdict(asked),
        "processor": cpu_name() if plan.compiled else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def up_to_date(target: Path, wanted: str) -> Bundle | None:
    """The bundle at `target`, if it is whole and exporting again would change nothing."""
    try:
        bundle = Bundle.open(target)
        if bundle.manifest.fingerprint != wanted:
            return None
        bundle.verify()
    except BundleError:
        return None
    return bundle


def _versions(plan: Plan) -> dict[str, str]:
    return installed(*LIBRARIES, *(INT8_LIBRARIES if plan.calibrated else ()))


def build(
    material: Material, target: Path, strategy: Strategy, say: Say, plan: Plan = NO_VARIANTS, asked: Asked = FITTED
) -> Bundle:
    """Make a bundle of `material` and publish it at `target`: the float32 files, and those of `plan`.

    `say` is told of each step, from other threads too. How much the files are held to is fitted to what the model
    costs, where `asked` does not say it. Raises ExportRefused (exit code 1) when the fold or a float32 file is not
    right, UserError when the place can't be written; in both cases what was at `target` before is untouched. A file of
    `plan` that is not right is left out, and the manifest says why.
    """
    import torch

    from export import float32_files, oracle_file, writing
    from export import oracle as truth
    from export.fold.batchnorm import as_module, export_program
    from export.folding import fold_and_compare
    from export.memory import give_back

    refuse_foreign(target, MANIFEST_NAME)  # here too: nobody should wait for a fold to learn that
    progress, given = Progress(say), len(material.raw)
    calibration = None if material.calibration is None else material.calibration.identity
    wanted = fingerprint(material.source, strategy, plan, calibration, asked)
    with contextlib.ExitStack() as stack:
        # A large model is in memory often enough.
        large = weight_bytes(material.module) >= LARGE_BYTES
        apart = None if large else stack.enter_context(truth.Outputs64())
        with progress.step("measuring what an input costs"):
            cost = measured(material.module, material.examples)
        effort = fitted(cost, given, _bytes_per_input(material), asked)
        if effort.inputs < given:
            say(_fewer(effort, given, cost))
        material = material.drawn(effort.inputs)
        examples = tuple(map(torch.from_numpy, material.examples))
        sizes = material.dynamic_shapes()
        with progress.step("exporting the model's graph"):
            program = export_program(material.module, examples, sizes)
        if apart is not None:
            apart.submit(as_module(program), material.inputs, effort.chunk)
        made = fold_and_compare(material, strategy, plan, effort, progress, with_outputs=apart is None)
        reports = {runtime: way.report for runtime, way in made.ways.items()}
        if large:
            give_back()  # the float64 model
        with building(target, MANIFEST_NAME) as folder:
            programs = _programs(program, made.ways, examples, sizes)
            entries = float32_files.write(folder, material, programs, effort.files, progress)
            made.ways.clear()
            del program, programs
            if effort.files == "full":
                (folder / float32_files.CHECKPOINT).write_bytes(material.weights())
            outputs = made.outputs
            if apart is not None:
                with progress.step(f"computing the float64 oracle of {effort.inputs} inputs", effort.inputs) as advance:
                    outputs = apart.wait(advance)
            assert outputs is not None
            oracle = _oracle(material, outputs)
            oracle_file.write(folder / "oracle.safetensors", oracle, material.more_inputs, material.more_outputs)
            kept: dict[Runtime, int] = {runtime: len(report.kept) for runtime, report in reports.items()}
            after_each = give_back if large else _nothing
            checks = _checked(folder, material, oracle, made.elsewhere, kept, entries, effort, progress, after_each)
            with writing.Writer(made.networks, material, folder, plan.max_drop) as writer:
                variants, lacking = variants_of(plan, writer, checks, progress)
            entries += variants
            left_out = (*float32_files.left_out(effort.files, cost.weight_bytes), *plan.left_out, *lacking)
            full = effort.files == "full"
            manifest = Manifest(
                schema_version=1,
                name=target.name,
                source=material.source,
                input=material.input,
                output=material.output,
                more_inputs=material.more_inputs,
                more_outputs=material.more_outputs,
                preprocessing=material.preprocessing,
                class_names=material.class_names,
                files=tuple(entries),
                left_out=left_out,
                checkpoint=DataFile.of(folder / float32_files.CHECKPOINT) if full else None,
                oracle=DataFile.of(folder / "oracle.safetensors"),
                proof=effort.proof(given),
                fold=reports["onnxruntime"],
                fold_for_torch=None if reports["torch"] is reports["onnxruntime"] else reports["torch"],
                tolerances=checks.tolerances,
                environment=environment_of(plan),
                fingerprint=wanted,
            )
            (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Bundle.open(target)


def _nothing() -> None:
    """For a model that is in memory as often as it likes."""


def _programs(
    program: torch.export.ExportedProgram,
    ways: Mapping[Runtime, Folded],
    examples: tuple[torch.Tensor, ...],
    sizes: tuple[dict[int, Any], ...],
) -> Programs:
    """The networks in float32, to which those folded in float64 are changed in place."""
    from export.columns import laid_on_side
    from export.float32_files import Programs
    from export.fold.batchnorm import as_module, export_program

    folded, for_torch = ways["onnxruntime"], ways["torch"]
    onnx_program = export_program(folded.module.float(), examples, sizes)
    torch_program = onnx_program
    if for_torch is not folded:
        torch_program = export_program(for_torch.module.float(), examples, sizes)
    as_trained = as_module(program)
    control = laid_on_side(as_trained)
    control_program = program if control is as_trained else export_program(control, examples, sizes)
    return Programs(program, control_program, onnx_program, torch_program, for_torch.module)


def _bytes_per_input(material: Material) -> int:
    """What an input takes in the oracle's file."""
    rows = (material.raw, *material.more_raw)
    return sum(int(np.prod(each.shape[1:], dtype=np.int64)) * each.dtype.itemsize for each in rows)


def _fewer(effort: Effort, given: int, cost: Cost) -> str:
    return (
        f"held to {effort.inputs} of the {given} inputs, drawn evenly: one takes {cost.seconds32:.2g} s in float32 and "
        f"{cost.seconds64:.2g} s in float64; --samples {given} takes all"
    )


def _oracle(material: Material, outputs: Arrays) -> Oracle:
    """Raises ExportRefused where the outputs are not finite."""
    if not all(np.isfinite(output).all() for output in outputs):
        raise ExportRefused("The model's float64 outputs are not finite (NaN or infinity) for some inputs.")
    logits, *more = outputs
    return Oracle(material.raw, material.labels, logits, material.more_raw, tuple(more))


def _checked(
    folder: Path,
    material: Material,
    oracle: Oracle,
    elsewhere: tuple[Arrays, Arrays] | None,
    kept: dict[Runtime, int],
    entries: list[FileEntry],
    effort: Effort,
    progress: Progress,
    after_each: Callable[[], None],
) -> Checks:
    """What files are held to, once the float32 files were.

    `after_each` is called after each of them. Raises ExportRefused for the first that is not right.
    """
    (reference,) = (entry for entry in entries if entry.format == "pt2" and not entry.folded)
    whole, odd = effort.batches
    with progress.step(f"running {reference.path} on {effort.inputs} inputs", effort.inputs) as advance:
        found = run_in_batches(runner(folder, reference), material.inputs, whole, material.outputs, advance)
    after_each()
    error, *more_errors = float32_errors(found, oracle, material.outputs)
    if not np.isfinite([error, *more_errors]).all():
        raise ExportRefused("The unfolded model's float32 outputs are not finite: it overflows.")
    tolerances = Tolerances(float32_rms_error=error, more_float32_rms_errors=tuple(more_errors))
    others = None
    if elsewhere is not None:
        inputs, (logits, *more) = elsewhere
        others = inputs, Oracle(inputs[0], None, logits, inputs[1:], tuple(more))
    checks = Checks(folder, oracle, material.inputs, material.outputs, kept, tolerances, effort, others)
    progress.say(
        f"checking each file with optimisations off, on {effort.checked} inputs at batch {whole}"
        + ("" if odd is None else f" and {min(3 * odd, effort.inputs)} at batch {odd}")
    )
    for entry in entries:
        with progress.step(f"checking {entry.path}", checks.calls(entry)) as advance:
            problem = checks.check(entry, advance).problem
        after_each()
        if problem is not None:
            raise ExportRefused(f"{entry.path} is not right: {problem}.")
    return checks


class FileWriter(Protocol):
    """What writes the files of a plan: `export.writing.Writer`, or that of another source."""

    def write(self, file: File) -> Written:
        """Write one file into the bundle's folder; raises whatever its format's writer does."""

    def int8_layers(self, file: File) -> Int8Layers | None:
        """Where the error of an int8 file comes from, once that is known."""


def variants_of(
    plan: Plan, writer: FileWriter, checks: Checks, progress: Progress
) -> tuple[list[FileEntry], list[LeftOut]]:
    """The files of a plan that are right, and why the others are not."""
    entries, left_out = [], []
    for file in plan.files:
        made = variant_of(file, writer, checks, progress)
        if isinstance(made, FileEntry):
            entries.append(made)
            continue
        left_out.append(LeftOut(what=file.name, reason=made, asked_for=file.name in plan.by_name))
        progress.say(f"left out {file.name}: {made}")
    return entries, left_out


def variant_of(file: File, writer: FileWriter, checks: Checks, progress: Progress) -> FileEntry | str:
    """A file of the plan, written and checked; or why it is not right, in words, and then nothing of it is left."""
    from export.formats import openvino_file

    path = checks.folder / file.name
    companions = (openvino_file.weights(path),) if file.format == "openvino" else ()
    try:
        with no_interrupt_lost():
            with progress.step(f"making {file.name}"):
                written = writer.write(file)
            entry = FileEntry(
                **DataFile.of(path).model_dump(),
                format=file.format,
                precision=file.precision,
                folded=True,
                takes=file.takes,
                opset=written.opset,
                companions=tuple(map(DataFile.of, companions)),
                int8=written.int8,
            )
            with progress.step(f"checking {file.name}", checks.calls(entry)) as advance:
                checked = checks.check(entry, advance)
    except (UserError, OSError):  # a full disk is no fault of this file's
        raise
    except Exception as error:  # quantisers and compilers raise whatever they like; the other files are none the worse
        text = str(error).strip()
        checked = Checked(
            f"it can't be made ({type(error).__name__}: {text.splitlines()[0] if text else 'no message'})"
        )
    if checked.problem is None:
        return entry.model_copy(update={"cpus": checked.cpus})
    for each in (path, *companions):
        each.unlink(missing_ok=True)
    return checked.problem + (f". {worst}" if (worst := _worst_layers(writer.int8_layers(file))) else "")


def _worst_layers(ranking: Int8Layers | None) -> str | None:
    """Which layers the error of an int8 file comes from, in words; None where that is not known."""
    if ranking is None or not ranking.layers:
        return None
    layers = [
        f"{layer.name} ({layer.error_percent:.2g} %)"
        for layer in ranking.layers[:3]
        if layer.error_percent < 0.9 * ranking.all_int8_error_percent
    ]
    if not layers:
        return None
    return (
        f"Its error would be less than {ranking.all_int8_error_percent:.2g} % with these in float: {', '.join(layers)}"
    )


def environment_of(plan: Plan) -> Environment:
    """This machine, with the versions that the files of a plan depend on."""
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=_versions(plan),
        git_commit=git_commit(Path(export.__file__)),
    )

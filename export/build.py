"""Making a bundle: every file written, loaded again and checked before anything is published.

Owns the order of things and what must hold: no BatchNorm in a folded file but those that the report keeps, the folded
network equal to the unfolded one in float64, every file right when run with optimisations off. Knows neither the
rules of folding nor the details of a format.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import export
from export.bundle import (
    MANIFEST_NAME,
    Bundle,
    BundleError,
    DataFile,
    Environment,
    FileEntry,
    Format,
    LeftOut,
    Manifest,
    Oracle,
    Source,
    Tolerances,
    sha256_file,
)
from export.bundle.int8 import Int8Layers
from export.bundle.rows import Rows
from export.checks import CHECK_BATCHES, Checked, Checks, first, float32_errors
from export.fold.report import FoldReport, Runtime, Strategy
from export.sources.ends import other_sizes
from export.variants import File, Plan
from trainer.errors import EXIT_NEGATIVE, UserError, no_interrupt_lost
from trainer.provenance import cpu_name, git_commit, installed
from trainer.publish import building, refuse_foreign

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.fold import Folded
    from export.sources.material import Material
    from export.writing import Networks, Written

EXACT = 1e-12
"""Largest relative difference, in float64, between the folded network and the unfolded one."""

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "safetensors")
INT8_LIBRARIES = ("openvino",)
NO_VARIANTS = Plan()


class ExportRefused(UserError):
    """The export made something that isn't right, so nothing was published."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} Nothing was published.", EXIT_NEGATIVE)


def fingerprint(source: Source, strategy: str, plan: Plan = NO_VARIANTS, calibration: str | None = None) -> str:
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
    material: Material, target: Path, strategy: Strategy, say: Callable[[str], None], plan: Plan = NO_VARIANTS
) -> Bundle:
    """Make a bundle of `material` and publish it at `target`: the float32 files, and those of `plan`.

    `say` is told of each step. Raises ExportRefused (exit code 1) when the fold or a float32 file is not right,
    UserError when the place can't be written; in both cases what was at `target` before is untouched. A file of `plan`
    that is not right is left out, and the manifest says why.
    """
    import torch

    from export import oracle as truth
    from export import oracle_file, writing
    from export.columns import laid_on_side
    from export.fold.batchnorm import as_module, export_program

    refuse_foreign(target, MANIFEST_NAME)  # here too: nobody should wait for a fold to learn that
    with truth.Outputs64() as oracle_process:
        inputs = material.inputs
        calibration = None if material.calibration is None else material.calibration.identity
        examples = tuple(map(torch.from_numpy, material.examples))
        few = tuple(np.asarray(rows) for rows in first(inputs, CHECK_BATCHES[1]))
        examples64 = tuple(map(truth.in_float64, examples))
        sizes = material.dynamic_shapes()
        say("folding")
        program = export_program(material.module, examples, sizes)
        oracle_process.submit(as_module(program), inputs)
        # In float64, so that the fold itself is held to float64's precision; the files get weights rounded once.
        model64 = copy.deepcopy(material.module).double()
        folded = _folded(model64, examples64, sizes, strategy, "onnxruntime")
        say(summary(folded.report))
        larger = other_sizes((material.input, *material.more_inputs), few)
        for given in (inputs, larger):
            if given is not None:
                _require_equal(model64, folded.module, given)
        chosen = strategy in ("auto", "all")
        for_torch = _folded_for_torch(model64, examples64, sizes, folded, strategy) if chosen else folded
        if for_torch is not folded:
            say("for torch:\n" + summary(for_torch.report))
            _require_equal(model64, for_torch.module, inputs)
        ways: dict[Runtime, Folded] = {"onnxruntime": folded, "torch": for_torch}
        networks = writing.networks(plan, model64, ways, examples64, sizes, strategy)
        for network in networks.values():
            _require_equal(model64, network, inputs)
        if any(file.takes == "raw" for file in plan.files):
            _require_equal_from_raw(model64, networks, material)
        with building(target, MANIFEST_NAME) as folder:
            say(f"writing, and computing the float64 oracle of {len(material.raw)} inputs")
            onnx_program = export_program(folded.module.float(), examples, sizes)
            torch_program = onnx_program
            if for_torch is not folded:
                torch_program = export_program(for_torch.module.float(), examples, sizes)
            as_trained = as_module(program)
            control = laid_on_side(as_trained)
            control_program = program if control is as_trained else export_program(control, examples, sizes)
            entries = _write_files(
                folder, material, program, control_program, onnx_program, torch_program, for_torch.module, say
            )
            (folder / "checkpoint.safetensors").write_bytes(material.weights)
            logits, *more_outputs = oracle_process.wait()
            if not all(np.isfinite(output).all() for output in (logits, *more_outputs)):
                raise ExportRefused("The model's float64 outputs are not finite (NaN or infinity) for some inputs.")
            oracle = Oracle(material.raw, material.labels, logits, material.more_raw, tuple(more_outputs))
            oracle_file.write(folder / "oracle.safetensors", oracle, material.more_inputs, material.more_outputs)
            say("checking every file with optimisations off")
            (reference,) = (entry for entry in entries if entry.format == "pt2" and not entry.folded)
            error, *more_errors = float32_errors(reference, folder, oracle, inputs, material.outputs)
            if not np.isfinite([error, *more_errors]).all():
                raise ExportRefused("The unfolded model's float32 outputs are not finite: it overflows.")
            kept: dict[Runtime, int] = {runtime: len(way.report.kept) for runtime, way in ways.items()}
            tolerances = Tolerances(float32_rms_error=error, more_float32_rms_errors=tuple(more_errors))
            elsewhere = None
            if larger is not None:
                logits, *more_outputs = truth.outputs64(model64, larger)
                elsewhere = larger, Oracle(larger[0], None, logits, larger[1:], tuple(more_outputs))
            checks = Checks(folder, oracle, inputs, material.outputs, kept, tolerances, elsewhere)
            for entry in entries:
                if (problem := checks.check(entry).problem) is not None:
                    raise ExportRefused(f"{entry.path} is not right: {problem}.")
            with writing.Writer(networks, material, folder, plan.max_drop) as writer:
                made, lacking = variants_of(plan, writer, checks, say)
            entries += made
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
                left_out=(*plan.left_out, *lacking),
                checkpoint=data_file(folder / "checkpoint.safetensors"),
                oracle=data_file(folder / "oracle.safetensors"),
                fold=folded.report,
                fold_for_torch=None if for_torch is folded else for_torch.report,
                tolerances=tolerances,
                environment=environment_of(plan),
                fingerprint=fingerprint(material.source, strategy, plan, calibration),
            )
            (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Bundle.open(target)


def _folded(
    model64: nn.Module,
    examples64: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    strategy: Strategy,
    runtime: Runtime,
) -> Folded:
    """The network as `strategy` folds it for a runtime, with columns on their side."""
    from export.columns import laid_on_side
    from export.fold import Folded, fold_batchnorm

    folded = fold_batchnorm(model64, examples64, dynamic_shapes=dynamic_shapes, strategy=strategy, runtime=runtime)
    return Folded(laid_on_side(folded.module), folded.report)


def _folded_for_torch(
    model64: nn.Module,
    examples64: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    folded: Folded,
    strategy: Strategy,
) -> Folded:
    """The network as `strategy` folds it for torch; `folded` itself where that is the same."""
    other = _folded(model64, examples64, dynamic_shapes, strategy, "torch")
    return folded if _ways(other.report) == _ways(folded.report) else other


def _write_files(
    folder: Path,
    material: Material,
    program: torch.export.ExportedProgram,
    control_program: torch.export.ExportedProgram,
    onnx_program: torch.export.ExportedProgram,
    torch_program: torch.export.ExportedProgram,
    for_torch: torch.fx.GraphModule,
    say: Callable[[str], None],
) -> list[FileEntry]:
    """The float32 files: of `program`, which is not folded, and of the network folded for each runtime.

    `control_program` is not folded either, and in all else as the folded ones are.
    """
    import torch

    from export.formats import onnx_file, pt2, torchscript

    examples = tuple(map(torch.from_numpy, material.examples))
    names = material.names("preprocessed")
    pt2.write(program, folder / "model.unfolded.pt2")
    pt2.write(torch_program, folder / "model.pt2")
    opset = onnx_file.write(onnx_program, folder / "model.onnx", *names, optimize=True)
    # torch's own optimiser would fold what it can, and the control would be none.
    onnx_file.write(control_program, folder / "model.unfolded.onnx", *names, optimize=False)

    def entry(name: str, format: Format, folded: bool, opset: int | None = None) -> FileEntry:
        return FileEntry(
            **data_file(folder / name).model_dump(), format=format, precision="float32", folded=folded, opset=opset
        )

    entries = [
        entry("model.onnx", "onnx", True, opset),
        entry("model.unfolded.onnx", "onnx", False, opset),
        entry("model.pt2", "pt2", True),
        entry("model.unfolded.pt2", "pt2", False),
    ]
    if torchscript.available():
        torchscript.write(for_torch, examples, folder / "model.ts")
        torchscript.write(material.module, examples, folder / "model.unfolded.ts")
        entries += [entry("model.ts", "torchscript", True), entry("model.unfolded.ts", "torchscript", False)]
    else:
        say(f"torch {torch.__version__} has no TorchScript any more, so none is written")
    return entries


class FileWriter(Protocol):
    """What writes the files of a plan: `export.writing.Writer`, or that of another source."""

    def write(self, file: File) -> Written:
        """Write one file into the bundle's folder; raises whatever its format's writer does."""

    def int8_layers(self, file: File) -> Int8Layers | None:
        """Where the error of an int8 file comes from, once that is known."""


def variants_of(
    plan: Plan, writer: FileWriter, checks: Checks, say: Callable[[str], None]
) -> tuple[list[FileEntry], list[LeftOut]]:
    """The files of a plan that are right, and why the others are not."""
    entries, left_out = [], []
    for file in plan.files:
        made = variant_of(file, writer, checks, say)
        if isinstance(made, FileEntry):
            entries.append(made)
            continue
        left_out.append(LeftOut(what=file.name, reason=made, asked_for=file.name in plan.by_name))
        say(f"left out {file.name}: {made}")
    return entries, left_out


def variant_of(file: File, writer: FileWriter, checks: Checks, say: Callable[[str], None]) -> FileEntry | str:
    """A file of the plan, written and checked; or why it is not right, in words, and then nothing of it is left."""
    from export.formats import openvino_file

    say(f"making {file.name}")
    path = checks.folder / file.name
    companions = (openvino_file.weights(path),) if file.format == "openvino" else ()
    try:
        with no_interrupt_lost():
            written = writer.write(file)
            entry = FileEntry(
                **data_file(path).model_dump(),
                format=file.format,
                precision=file.precision,
                folded=True,
                takes=file.takes,
                opset=written.opset,
                companions=tuple(data_file(companion) for companion in companions),
                int8=written.int8,
            )
            checked = checks.check(entry)
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


def _require_equal(model64: nn.Module, folded64: nn.Module, inputs: tuple[Rows, ...]) -> None:
    """The folded network against the unfolded one, both float64, on real and random inputs and on borders alone."""
    import torch

    from export.oracle import in_float64

    real = [in_float64(torch.from_numpy(np.asarray(rows))) for rows in first(inputs, 100)]
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64) if x.is_floating_point() else x for x in real
    ]
    border = [_border_of(x, x.dim() - 2) if x.is_floating_point() else x for x in noise]
    for what, given in (("real", real), ("random", noise), ("border", border)):
        with torch.no_grad():
            wanted, found = model64(*given), folded64(*given)
        _require_exact(found, wanted, f"The folded network differs from the unfolded one on {what} inputs")


def _require_equal_from_raw(model64: nn.Module, networks: Networks, material: Material) -> None:
    """The same for the networks with the preprocessing in front, on raw inputs, the darkest and the brightest too."""
    import torch

    from export.raw_input import FromRaw, reference

    preprocessing = material.preprocessing
    real = torch.from_numpy(np.array(material.raw[:100]))
    limits = torch.iinfo(real.dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(limits.min, limits.max + 1, real.shape, generator=generator, dtype=real.dtype)
    flat = torch.stack([torch.full_like(real[0], value) for value in (limits.min, limits.max)])
    border = _border_of(noise, min(len(material.input.shape) - 2, noise.dim() - 1))
    for network in networks.values():
        from_raw = FromRaw(network, preprocessing, material.input, torch.float64)
        for what, x in (("real", real), ("random", noise), ("border", border), ("flat", flat)):
            with torch.no_grad():
                wanted, found = reference(model64, preprocessing, material.input, x), from_raw(x)
            _require_exact(
                found, wanted, f"The network with the preprocessing inside is not right on {what} raw inputs"
            )


def _border_of(x: torch.Tensor, spatial: int) -> torch.Tensor:
    """`x` with zeros inside; the last `spatial` dimensions are those that have a border."""
    border = x.clone()
    if spatial > 0:
        border[tuple([slice(None)] * (x.dim() - spatial) + [slice(1, -1)] * spatial)] = 0
    return border


def _require_exact(found: object, wanted: object, complaint: str) -> None:
    from export.formats.running import tensors_of

    for output, truth in zip(tensors_of(found), tensors_of(wanted), strict=True):
        if not truth.is_floating_point():  # what names something has no size, and ties may go either way
            continue
        error = float((output - truth).abs().max() / truth.abs().max())
        if not error <= EXACT:
            raise ExportRefused(f"{complaint}: off by {error:.1e} (relative, float64).")


def data_file(path: Path) -> DataFile:
    """What the manifest says of a file of the bundle that lies at `path`."""
    return DataFile(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)


def _ways(report: FoldReport) -> list[tuple[str, str]]:
    return [(norm.name, norm.method) for norm in report.folded]


def summary(report: FoldReport) -> str:
    """What became of each BatchNorm, a line each."""
    lines = [f"folded {norm.name}: {norm.method}, into {', '.join(norm.into)}" for norm in report.folded]
    lines += [f"kept {norm.name}: {norm.reason}" for norm in report.kept]
    lines += [f"simplified {other.name}: {other.method}, into {', '.join(other.into)}" for other in report.simplified]
    return "\n".join(lines or ["the model has no BatchNorm"])


def environment_of(plan: Plan) -> Environment:
    """This machine, with the versions that the files of a plan depend on."""
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=_versions(plan),
        git_commit=git_commit(Path(export.__file__)),
    )

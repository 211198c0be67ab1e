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
from typing import TYPE_CHECKING

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
    Manifest,
    Oracle,
    Source,
    Tolerances,
    sha256_file,
)
from export.fold.report import FoldReport, Strategy
from trainer.errors import EXIT_NEGATIVE, UserError
from trainer.provenance import git_commit, installed
from trainer.publish import building

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.source import Material

EXACT = 1e-12
"""Largest relative difference, in float64, between the folded network and the unfolded one."""

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "safetensors")
CHECK_BATCHES = (500, 7)
"""Two batch sizes, for what is written for one batch size alone; the odd one is run on a few images."""
CHECK_INPUTS = 2_500
"""Files are checked on so many of the oracle's inputs; the reference runs all of them, its error being the unit."""


class ExportRefused(UserError):
    """The export made something that isn't right, so nothing was published."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} Nothing was published.", EXIT_NEGATIVE)


def fingerprint(source: Source, strategy: str) -> str:
    """SHA-256 over everything that determines a bundle: weights, options, versions, and this package's own code."""
    root = Path(export.__file__).parent
    code = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root.parent / "trainer").glob("*.py")]):
        code.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    facts = {
        "source": source.model_dump(),
        "strategy": strategy,
        "versions": installed(*LIBRARIES),
        "code": code.hexdigest(),
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


def build(material: Material, target: Path, strategy: Strategy, say: Callable[[str], None]) -> Bundle:
    """Make a bundle of `material` and publish it at `target`.

    `say` is told of each step. Raises ExportRefused (exit code 1) when a check fails, UserError when the place can't be
    written; in both cases what was at `target` before is untouched.
    """
    import torch

    from export import oracle as truth
    from export.fold import fold_batchnorm
    from export.fold.batchnorm import as_module, export_program

    with truth.Logits64() as oracle_process:
        inputs = material.inputs
        example = torch.from_numpy(inputs[:2])
        batch = ({0: torch.export.Dim("batch")},)
        say("folding")
        program = export_program(material.module, (example,), batch)
        oracle_process.submit(as_module(program), inputs)
        # In float64, so that the fold itself is held to float64's precision; the files get weights rounded once.
        model64 = copy.deepcopy(material.module).double()
        folded = fold_batchnorm(model64, (example.double(),), dynamic_shapes=batch, strategy=strategy)
        say(_summary(folded.report))
        _require_equal(model64, folded.module, inputs)
        with building(target, MANIFEST_NAME) as folder:
            say(f"writing, and computing the float64 oracle of {len(material.raw)} inputs")
            entries = _write_files(folder, material, program, folded.module.float(), example)
            (folder / "checkpoint.safetensors").write_bytes(material.weights)
            logits = oracle_process.wait()
            if not np.isfinite(logits).all():
                raise ExportRefused("The model's float64 logits are not finite (NaN or infinity) for some inputs.")
            oracle = Oracle(material.raw, material.labels, logits)
            _write_oracle(folder / "oracle.safetensors", oracle)
            say("checking every file with optimisations off")
            tolerances = _check_files(folder, entries, oracle, inputs, len(folded.report.kept))
            manifest = Manifest(
                schema_version=1,
                name=target.name,
                source=material.source,
                input=material.input,
                output=material.output,
                preprocessing=material.preprocessing,
                class_names=material.class_names,
                files=tuple(entries),
                checkpoint=_data_file(folder / "checkpoint.safetensors"),
                oracle=_data_file(folder / "oracle.safetensors"),
                fold=folded.report,
                tolerances=tolerances,
                environment=_environment(),
                fingerprint=fingerprint(material.source, strategy),
            )
            (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Bundle.open(target)


def _write_files(
    folder: Path,
    material: Material,
    program: torch.export.ExportedProgram,
    folded: torch.fx.GraphModule,
    example: torch.Tensor,
) -> list[FileEntry]:
    import torch

    from export.fold.batchnorm import export_program
    from export.formats import onnx_file, pt2, torchscript

    names = material.input.name, material.output.name
    folded_program = export_program(folded, (example,), ({0: torch.export.Dim("batch")},))
    pt2.write(program, folder / "model.unfolded.pt2")
    pt2.write(folded_program, folder / "model.pt2")
    opset = onnx_file.write(folded_program, folder / "model.onnx", *names, optimize=True)
    # torch's own optimiser would fold what it can, and the control would be none.
    onnx_file.write(program, folder / "model.unfolded.onnx", *names, optimize=False)
    torchscript.write(folded, example, folder / "model.ts")
    torchscript.write(material.module, example, folder / "model.unfolded.ts")

    def entry(name: str, format: Format, folded: bool, opset: int | None = None) -> FileEntry:
        return FileEntry(
            **_data_file(folder / name).model_dump(), format=format, precision="float32", folded=folded, opset=opset
        )

    return [
        entry("model.onnx", "onnx", True, opset),
        entry("model.unfolded.onnx", "onnx", False, opset),
        entry("model.ts", "torchscript", True),
        entry("model.unfolded.ts", "torchscript", False),
        entry("model.pt2", "pt2", True),
        entry("model.unfolded.pt2", "pt2", False),
    ]


def _check_files(folder: Path, entries: list[FileEntry], oracle: Oracle, inputs: np.ndarray, kept: int) -> Tolerances:
    """Load every file again and hold it to the oracle; returns the tolerances, whose unit is torch's own error."""
    from export import oracle as truth
    from export.formats import onnx_file, pt2, torchscript

    modules = {"onnx": onnx_file, "torchscript": torchscript, "pt2": pt2}
    tolerances: Tolerances | None = None
    # The reference first: its error is the unit that the others are measured in.
    for entry in sorted(entries, key=lambda entry: (entry.format != "pt2", entry.folded)):
        path, module = folder / entry.path, modules[entry.format]
        if entry.folded and module.batchnorms(path) != kept:
            raise ExportRefused(
                f"{entry.path} holds {module.batchnorms(path)} BatchNorms, the fold report keeps {kept}."
            )
        run = module.runner(path)
        whole, odd = CHECK_BATCHES
        reference = tolerances is None
        logits = truth.run_in_batches(run, inputs if reference else inputs[:CHECK_INPUTS], whole)
        if tolerances is None:
            unit = truth.rms_error(logits, oracle.logits)
            if not np.isfinite(unit):
                raise ExportRefused("The unfolded model's float32 logits are not finite: it overflows.")
            tolerances = Tolerances(float32_rms_error=unit)
        for checked in (logits, truth.run_in_batches(run, inputs[: 3 * odd], odd)):
            problem = truth.strict_failure(checked, oracle, tolerances)
            if problem is not None:
                raise ExportRefused(f"{entry.path} is not right: {problem}.")
    assert tolerances is not None
    return tolerances


def _require_equal(model64: nn.Module, folded64: nn.Module, inputs: np.ndarray) -> None:
    """The folded network against the unfolded one, both float64, on real and random inputs and on borders alone."""
    import torch

    real = torch.from_numpy(inputs[:100]).double()
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    border = noise.clone()
    if border.dim() > 2:
        border[(slice(None), slice(None), *[slice(1, -1)] * (border.dim() - 2))] = 0
    for what, x in (("real", real), ("random", noise), ("border", border)):
        with torch.no_grad():
            wanted, found = model64(x), folded64(x)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= EXACT:
            raise ExportRefused(
                f"The folded network differs from the unfolded one by {error:.1e} (relative, float64) on {what} inputs."
            )


def _write_oracle(path: Path, oracle: Oracle) -> None:
    from safetensors.numpy import save

    tensors = {"raw": np.ascontiguousarray(oracle.raw), "logits": oracle.logits}
    if oracle.labels is not None:
        tensors["labels"] = oracle.labels
    path.write_bytes(save(tensors))


def _data_file(path: Path) -> DataFile:
    return DataFile(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)


def _summary(report: FoldReport) -> str:
    lines = [f"folded {norm.name}: {norm.method}, into {', '.join(norm.into)}" for norm in report.folded]
    lines += [f"kept {norm.name}: {norm.reason}" for norm in report.kept]
    return "\n".join(lines or ["the model has no BatchNorm"])


def _environment() -> Environment:
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=installed(*LIBRARIES),
        git_commit=git_commit(Path(export.__file__)),
    )

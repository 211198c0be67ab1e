"""Holding each file of a bundle to the oracle, as soon as it is written.

Owns what a file is run with, and on which of the inputs; how many these are, and at which batch sizes, says
`export.effort`. The verdict is `export.bundle.verdict`'s; what becomes of a file that is not right is up to whoever
asks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from export.bundle import BOX_KINDS, FLOAT32, Arrays, CpuVerdict, FileEntry, Oracle, Output, Tolerances
from export.bundle.rows import Rows
from export.bundle.verdict import all_at_batch, departure, judge_all, rms_error
from export.effort import Effort
from export.fold.report import Runtime
from export.formats.running import Run, run_in_batches
from export.progress import Advance, unheard


@dataclass(frozen=True)
class Checked:
    """What came of a file: why it is not right, in words, or None; of int8 that is right, what is proved elsewhere."""

    problem: str | None
    cpus: tuple[CpuVerdict, ...] = ()


@dataclass(frozen=True)
class Checks:
    """What the files in a folder are held to: the oracle, whose inputs the model takes as `inputs`, [N, …] each, and
    whose outputs are `outputs`.

    `kept` is how many BatchNorms the network has left that is folded for each runtime. `effort` says how many inputs
    are run, and at which batch sizes. `elsewhere` are inputs of other sizes with their oracle, where sizes may vary.
    """

    folder: Path
    oracle: Oracle
    inputs: tuple[Rows, ...]
    outputs: tuple[Output, ...]
    kept: dict[Runtime, int]
    tolerances: Tolerances
    effort: Effort
    elsewhere: tuple[Arrays, Oracle] | None = None

    def calls(self, entry: FileEntry) -> int:
        """How many inputs `check` runs through a file."""
        whole = self.effort.checked if entry.precision == FLOAT32 else len(self.oracle.logits)
        return whole + min(3 * (self.effort.batches[1] or 0), len(self.oracle.logits))

    def check(self, entry: FileEntry, advance: Advance = unheard) -> Checked:
        """Load a file again, run it, and judge what it gives. `advance` is told of each batch."""
        whole, odd = self.effort.batches
        problem = self._unfolded(entry)
        if problem is not None:
            return Checked(problem)
        run = runner(self.folder, entry)
        taken = self.oracle.inputs if entry.takes == "raw" else self.inputs
        strict = entry.precision == FLOAT32
        taken_whole = first(taken, self.effort.checked) if strict else taken
        outputs = run_in_batches(run, taken_whole, whole, self.outputs, advance)
        problem = self._failure(outputs, entry)
        if problem is None and odd is not None:
            few = run_in_batches(run, first(taken, 3 * odd), odd, self.outputs, advance)
            problem = self._failure(few, entry) if strict else departure(few, outputs, self.oracle)
        if problem is None and entry.takes == "preprocessed":
            problem = self._other_sizes(run, entry)
        cpus = self._cpus(entry, taken[0], outputs[0]) if problem is None and entry.precision == "int8" else ()
        broken = [f"on a CPU of the kind {each.cpu} {'; '.join(each.failures)}" for each in cpus if each.failures]
        return Checked(problem or "; ".join(broken) or None, cpus)

    def _other_sizes(self, run: Run, entry: FileEntry) -> str | None:
        if self.elsewhere is None:
            return None
        inputs, truth = self.elsewhere
        outputs = run_in_batches(run, inputs, len(inputs[0]), self.outputs)
        problem = all_at_batch(outputs, truth, self.outputs, self.tolerances, entry.precision)
        return None if problem is None else f"at other sizes, {problem}"

    def _failure(self, outputs: Arrays, entry: FileEntry) -> str | None:
        truth = self.oracle.first(len(outputs[0]))
        verdict = judge_all(outputs, truth, self.outputs, self.tolerances, entry.precision)
        return None if verdict.passed else "; ".join(verdict.failures)

    def _unfolded(self, entry: FileEntry) -> str | None:
        """No BatchNorm in a folded file but those that the report keeps.

        A quantiser or torch's own exporter may fold more, into the layer before, where they see what torch.export's
        graph does not show; a compiled program has no graph to count them in.
        """
        if not entry.folded or entry.format.startswith("aoti"):
            return None
        kept = self.kept["torch" if entry.format in ("pt2", "torchscript") else "onnxruntime"]
        found = _module(entry).batchnorms(self.folder / entry.path)
        return f"it holds {found} BatchNorms, the fold report keeps {kept}" if found > kept else None

    def _cpus(self, entry: FileEntry, taken: Rows, outputs: np.ndarray) -> tuple[CpuVerdict, ...]:
        from export.int8 import cpus

        of = cpus.of_onnx if entry.format == "onnx" else cpus.of_openvino
        found = of(self.folder / entry.path, taken, outputs)
        return tuple(cpus.verdict(kind, there, self.oracle, self.tolerances) for kind, there in found)


def first(inputs: tuple[Rows, ...], count: int) -> tuple[Rows, ...]:
    """The first `count` of each."""
    return tuple(rows[:count] for rows in inputs)


def float32_errors(found: Arrays, oracle: Oracle, specs: tuple[Output, ...]) -> tuple[float, ...]:
    """The RMS error of each output that float32 gave for the oracle's inputs, the unit of all others; infinite where it
    overflows, and 0 of whole numbers and of lists.
    """
    return tuple(
        rms_error(output, truth) if truth.dtype.kind == "f" and spec.kind not in BOX_KINDS else 0.0
        for spec, output, truth in zip(specs, found, oracle.outputs, strict=True)
    )


def runner(folder: Path, entry: FileEntry) -> Run:
    """The file as a function. int8 runs as it will be run: without its optimisations onnxruntime computes in float32,
    and would never see what an int8 kernel gets wrong.
    """
    optimised = {"optimised": True} if entry.format == "onnx" and entry.precision == "int8" else {}
    run: Run = _module(entry).runner(folder / entry.path, **optimised)
    return run


def _module(entry: FileEntry) -> ModuleType:
    modules = {"onnx": "onnx_file", "openvino": "openvino_file", "aoti-cpu": "aoti", "aoti-cuda": "aoti"}
    return importlib.import_module(f"export.formats.{modules.get(entry.format, entry.format)}")

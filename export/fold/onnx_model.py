"""Folding an ONNX file: read it, fold it, prove it, write it.

Owns `fold_onnx` and what is published. The cases stand in `search`, the file format in `from_onnx`. Where there is
nothing to fold, neither torch nor onnxruntime is needed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from export.fold.errors import FoldError
from export.fold.from_onnx import sizes, survey, trial
from export.fold.from_onnx.compare import BASE, Original
from export.fold.from_onnx.constants import Constants
from export.fold.from_onnx.file import has_external_data, load, save, sparse
from export.fold.from_onnx.nodes import Made, NotFinite
from export.fold.report import FoldReport, Strategy
from trainer.errors import EXIT_NEGATIVE

if TYPE_CHECKING:
    from export.fold.graph import Graph
    from export.fold.search import Limits

__all__ = ["LARGEST_FILE", "FoldedFile", "explain_onnx", "fold_onnx", "load"]

LARGEST_FILE = trial.LARGEST_FILE


@dataclass(frozen=True)
class FoldedFile:
    """What became of an ONNX file.

    `difference` is the largest relative difference between the outputs of the two files, run by onnxruntime in their
    own precision with optimisations off; None where they could not be compared (`not_run` says why).
    """

    report: FoldReport
    difference: float | None
    not_run: str


@dataclass(frozen=True)
class _Attempt:
    """A folded file that is not published yet."""

    report: FoldReport
    path: Path


def fold_onnx(source: Path, target: Path, strategy: Strategy = "auto", *, unchecked: bool = False) -> FoldedFile:
    """Fold the BatchNorms of the ONNX file `source` and write the result to `target`, whole or not at all.

    Names of inputs and outputs, metadata, and nodes that have nothing to do with a fold stay as they were. A fold that
    makes the file's outputs wrong is left out, and reported as kept.

    Args:
        source: the file, with its external data, if any, beside it.
        target: where the result goes.
        strategy: how a shift gets over a border of zeros, see `fold_batchnorm`.
        unchecked: write the file too where it can't be compared with the original.

    Raises:
        FoldError: `source` is missing, no valid ONNX model, has weights that are no numbers, has external data outside
            its folder, or has more weights than one file can hold; `target` can't be written; or the two files can't be
            compared (exit code 1; then nothing is written).
    """
    opened = _open(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            if not opened.has_something_to_fold:
                _copy(opened.model, source, Path(folder) / target.name)
                os.replace(Path(folder) / target.name, target)
                return FoldedFile(opened.nothing_folded, 0.0, "")
            folding = _Folding(source, Path(folder), strategy, opened)
            del opened
            result = folding.right(unchecked)
            os.replace(result.path, target)
    except OSError as error:
        raise FoldError(f"can't write {target} ({error.strerror or error}). Name another file with --out.") from error
    return FoldedFile(result.report, folding.difference, folding.not_compared)


def explain_onnx(source: Path, strategy: Strategy = "auto") -> FoldReport:
    """What `fold_onnx` would do, without writing anything. Raises FoldError."""
    opened = _open(source)
    if not opened.has_something_to_fold:
        return opened.nothing_folded
    from export.fold import search

    graph, _ = _read(opened, source)
    return search.fold(graph, strategy)


@dataclass(frozen=True)
class _Opened:
    """A model, and what is known of it without torch and onnxruntime."""

    model: ir.Model
    known: sizes.Known
    skeleton: onnx.ModelProto
    constants: Constants

    @property
    def has_something_to_fold(self) -> bool:
        return survey.has_something_to_fold(self.model, self.constants)

    @property
    def nothing_folded(self) -> FoldReport:
        return FoldReport(kept=survey.out_of_reach(self.model))


def _open(source: Path) -> _Opened:
    model = load(source)
    known, skeleton = sizes.infer(model)
    return _Opened(model, known, skeleton, Constants(model, known.dtype, sparse(model)))


def _read(opened: _Opened, source: Path) -> tuple[Graph, Original]:
    """The graph, and how the file is to be run for a comparison. Raises FoldError."""
    from export.fold.from_onnx.read import read

    known = opened.known
    sizes.complete(known, opened.skeleton, opened.model, opened.constants)
    try:
        graph = read(opened.model, opened.constants, known)
    except NotFinite as error:
        raise FoldError(f"{source}: {error}. Export other weights.") from None
    values = {value for node in graph.nodes for value in (*node.inputs, *node.outputs)}
    types = {value.origin.dtype for value in values if isinstance(value.origin, Made)}
    coarsest = max((dtype for dtype in BASE if dtype in types), key=BASE.__getitem__, default=ir.DataType.FLOAT)
    tried = [size for size in trial.SIZES if size >= known.size]
    return graph, Original(source, known.inputs, tried, coarsest)


class _Folding:
    """Attempts at one file, and what came of their comparison.

    `difference` and `not_compared` are those of the last one that was looked at.
    """

    def __init__(self, source: Path, folder: Path, strategy: Strategy, opened: _Opened) -> None:
        self.source, self.folder, self.strategy = source, folder, strategy
        self.opened: _Opened | None = opened  # until the first attempt, which changes it
        self.original: Original | None = None
        self.difference: float | None = None
        self.not_compared = ""
        self.attempts = 0

    def right(self, unchecked: bool) -> _Attempt:
        """The file with all folds that hold. Raises FoldError where it can't be compared and is not `unchecked`."""
        from export.fold.whole import until_right

        attempt = until_right(self.attempt, self.problem, lambda attempt: attempt.report)
        if self.difference is None and not unchecked:
            raise FoldError(
                f"{self.source} can't be compared with the folded file: {self.not_compared}. Nothing was written; "
                "with --unchecked (unchecked=True) it is.",
                EXIT_NEGATIVE,
            )
        return attempt

    def attempt(self, limits: Limits) -> _Attempt:
        """Fold within limits and save the result."""
        from export.fold import search
        from export.fold.from_onnx.write import write

        opened, self.opened = self.opened or _open(self.source), None
        graph, original = _read(opened, self.source)
        model = opened.model
        self.original = self.original or original
        report = search.fold(graph, self.strategy, limits=limits)
        self.attempts += 1
        path = self.folder / f"{self.attempts}.onnx"
        if not report.folded and not report.simplified:
            _copy(model, self.source, path)
            return _Attempt(report, path)
        write(model, graph)
        del graph, opened
        _require_one_file(model, self.source)
        save(model, path)
        return _Attempt(report, path)

    def problem(self, attempt: _Attempt) -> str | None:
        """What is wrong with the file, or None."""
        self.difference, self.not_compared = 0.0, ""
        copied = not attempt.report.folded and not attempt.report.simplified
        invalid = None if copied else _invalid(attempt.path, self.source)
        if invalid:
            return invalid
        original = self.original
        assert original is not None
        original.run()
        if original.not_run:
            self.difference, self.not_compared = None, f"onnxruntime does not run it ({original.not_run})"
        if copied or original.not_run:
            return None
        try:
            differences = original.differences(attempt.path)
        except Exception as error:  # onnxruntime has a class for each failure
            return f"onnxruntime runs the file no more ({(str(error).splitlines() or [''])[0][:200]})"
        limits = original.limits(differences)
        for difference, limit in zip(differences, limits, strict=True):
            if not difference <= limit:
                return f"the outputs of the file differ by {difference:.1e} (relative), where {limit:.0e} is rounding"
        limited = [difference for difference, limit in zip(differences, limits, strict=True) if limit < float("inf")]
        self.difference = max(limited, default=None if differences else 0.0)
        if self.difference is None:
            self.not_compared = "its outputs are random, or rounding alone changes them"
        return None


def _invalid(path: Path, source: Path) -> str:
    """Why ONNX's checker refuses a file; a fault that the original has too is none of the fold's."""
    for full in (True, False):
        try:
            onnx.checker.check_model(str(path), full_check=full)
            return ""
        except Exception as error:  # checking and inference each raise their own
            fault = f"onnx.checker refuses the file ({(str(error).splitlines() or [''])[0][:200]})"
        try:
            onnx.checker.check_model(str(source), full_check=full)
        except Exception:
            continue
        return fault
    return ""


def _copy(model: ir.Model, source: Path, path: Path) -> None:
    """The file as it is, but whole: weights that lie beside it come in."""
    if has_external_data(source):
        _require_one_file(model, source)
        save(model, path)
    else:
        shutil.copyfile(source, path)


def _require_one_file(model: ir.Model, source: Path) -> None:
    weights = trial.weight_bytes(model)
    if weights > LARGEST_FILE:
        raise FoldError(
            f"{source} holds {weights / 2**30:.1f} GiB of weights, and the folded file would have to hold them all: "
            "an ONNX file ends at 2 GiB. Nothing was written. Fold the model before exporting it (fold_batchnorm)."
        )

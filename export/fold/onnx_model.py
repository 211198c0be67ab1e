"""Folding an ONNX file: read it, fold it, prove it, write it.

Owns `fold_onnx` and what a file must be to be folded. The cases stand in `rules`, the operators in `onnx_graph`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.fold import onnx_graph, rules
from export.fold.batchnorm import FoldError
from export.fold.graph import Graph
from export.fold.report import FoldReport, Strategy
from export.formats.onnx_file import open_session

SIZE_OF_A_SYMBOL = (2, 32)
"""Sizes taken in an example for a symbolic first dimension, the batch, and for any other."""

AGREEMENT = 1e-4
"""Largest relative difference, in float32 and with optimisations off, between the outputs of the two files.

Each fold was held to 1e-9 in float64 by itself; this only shows that the file says what the folded graph means.
"""

LARGEST_FILE = 2**31 - 1
"""Bytes that a protobuf message, hence an ONNX file without external data, can have."""


@dataclass(frozen=True)
class FoldedFile:
    """What became of an ONNX file.

    `difference` is the largest relative difference between the outputs of the two files, run by onnxruntime in their
    own precision with optimisations off; None where onnxruntime can't run the file as it was (`not_run` says why).
    """

    report: FoldReport
    difference: float | None
    not_run: str


def fold_onnx(source: Path, target: Path, strategy: Strategy = "auto") -> FoldedFile:
    """Fold the BatchNorms of the ONNX file `source` and write the result to `target`, whole or not at all.

    Names of inputs and outputs, metadata, and nodes that have nothing to do with a fold stay as they were.

    Raises:
        FoldError: `source` is missing, no valid ONNX model, has external data outside its folder, or has more weights
            than one file can hold; `target` can't be written; or the folded file's outputs differ from the original's
            (then nothing is written).
    """
    model = load(source)
    graph = _read(model, source)
    report = rules.fold(graph, strategy)
    onnx_graph.write(model, graph)
    weights = _weight_bytes(model)
    if weights > LARGEST_FILE:
        raise FoldError(
            f"{source} holds {weights / 2**30:.1f} GiB of weights, and the folded file would have to hold them all: "
            "an ONNX file ends at 2 GiB. Nothing was written. Fold the model before exporting it (fold_batchnorm)."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            written = Path(folder) / target.name
            ir.save(model, written)
            onnx.checker.check_model(str(written), full_check=True)
            difference, not_run = _difference(source, written)
            if difference is not None and not difference <= AGREEMENT:
                raise FoldError(
                    f"the folded file's outputs differ from those of {source} by {difference:.1e} (relative), "
                    f"expected at most {AGREEMENT:.0e}. Nothing was written; please report this model."
                )
            os.replace(written, target)
    except OSError as error:
        raise FoldError(f"can't write {target} ({error.strerror or error}). Name another file with --out.") from error
    return FoldedFile(report, difference, not_run)


def explain_onnx(source: Path, strategy: Strategy = "auto") -> FoldReport:
    """What `fold_onnx` would do, without writing anything. Raises FoldError."""
    return rules.fold(_read(load(source), source), strategy)


def load(source: Path) -> ir.Model:
    """The model, checked, with its weights in memory. Raises FoldError."""
    try:
        onnx.checker.check_model(str(source))
        model = ir.load(source)
        return ir.external_data.load_to_model(model)
    except FileNotFoundError:
        raise FoldError(f"there is no file {source}. Name an ONNX file.") from None
    except Exception as error:  # onnx has no common class: decoding, checking and external data each raise their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FoldError(
            f"{source} is no valid ONNX model ({type(error).__name__}: {first_line[:300]}). Expected a file that "
            "onnx.checker accepts, with external data, if any, beside it. Export it again."
        ) from error


def _read(model: ir.Model, source: Path) -> Graph:
    floating = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
    for name, value in model.graph.initializers.items():
        if (
            value.dtype in floating
            and value.const_value is not None
            and not np.isfinite(value.const_value.numpy()).all()
        ):
            raise FoldError(
                f"{source}: {name} holds values that are not finite (NaN or infinity). Export other weights."
            )
    shapes = _shapes(model)
    # What inference can't follow (a shape computed at run time) may be declared, in symbols of the inputs.
    symbols: dict[int | str | None, int] = {}
    for value in model.graph.inputs:
        declared = [size if isinstance(size, int) else size.value for size in value.shape or ()]
        symbols |= {
            size: taken for size, taken in zip(declared, _example_sizes(declared), strict=True) if isinstance(size, str)
        }
    example: dict[str, tuple[int, ...]] = {}
    for name, shape in (shapes | _shapes(_with_sizes(model))).items():
        for known in (shape, shapes.get(name, (None,))):
            if all(isinstance(size, int) or size in symbols for size in known):
                example[name] = tuple(size if isinstance(size, int) else symbols[size] for size in known)
                break
    return onnx_graph.read(model, shapes, example, _observed(model, set(example)))


def _observed(model: ir.Model, known: set[str]) -> dict[str, tuple[int, ...]]:
    """Sizes that neither inference nor a declaration tells (those of a Reshape to a computed shape, say), by running
    the model once; empty where there are none, and where onnxruntime does not run it.
    """
    unknown = [v.name for node in model.graph for v in node.outputs if v.name and v.name not in known]
    if not unknown or _weight_bytes(model) > LARGEST_FILE:
        return {}
    proto = ir.to_proto(model)
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in unknown if n not in outputs)
    try:
        session = open_session(proto.SerializeToString(), silent=True)
        results = session.run(unknown, _feeds(session))
    except Exception:  # onnxruntime has a class for each failure; without these sizes less is folded, and said so
        return {}
    return {
        name: tuple(result.shape)
        for name, result in zip(unknown, results, strict=True)
        if isinstance(result, np.ndarray)  # not a sequence or an optional value
    }


def _feeds(session: Any) -> dict[str, np.ndarray]:
    """Normally distributed inputs, always the same, with the sizes of `_example_sizes`."""
    generator = np.random.default_rng(0)
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    return {
        argument.name: generator.standard_normal(_example_sizes(argument.shape)).astype(
            kinds.get(argument.type, np.float32)
        )
        for argument in session.get_inputs()
    }


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def _with_sizes(model: ir.Model) -> ir.Model:
    """A copy whose inputs have sizes where the model has symbols; shares the weights."""
    copied = model.clone()
    for value in copied.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(_example_sizes(value.shape))
    for value in (*copied.graph.outputs, *(v for node in copied.graph for v in node.outputs)):
        value.shape = None if value.shape is None or not all(isinstance(d, int) for d in value.shape) else value.shape
    return copied


def _example_sizes(shape: Iterable[object]) -> list[int]:
    """The sizes of an input, those of `SIZE_OF_A_SYMBOL` where it has symbols."""
    batch, other = SIZE_OF_A_SYMBOL
    return [size if isinstance(size, int) else (other if axis else batch) for axis, size in enumerate(shape)]


def _shapes(model: ir.Model) -> onnx_graph.Shapes:
    """Sizes of all values that shape inference finds; the model is not changed."""
    inferred = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model.clone()).model
    found: onnx_graph.Shapes = {}
    for value in (*inferred.graph.inputs, *(v for node in inferred.graph for v in node.outputs)):
        if value.shape is not None and value.name:
            found[value.name] = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return found


def _difference(source: Path, folded: Path) -> tuple[float | None, str]:
    """Both files on the same random inputs; see `FoldedFile`."""
    results = []
    feeds: dict[str, np.ndarray] = {}
    for path in (source, folded):
        try:
            session = open_session(str(path), silent=True)
            feeds = feeds or _feeds(session)
            results.append(session.run(None, feeds))
        except Exception as error:  # onnxruntime has a class for each failure; the original's own are not this fold's
            if path is folded:
                raise FoldError(
                    f"onnxruntime runs {source} but not the folded file: {error}. Nothing was written."
                ) from error
            return None, str(error).splitlines()[0][:200]
    worst = 0.0
    for before, after in zip(*results, strict=True):
        scale = float(
            np.abs(before.astype(np.float64)).max(initial=1e-2)
        )  # outputs of zero would compare rounding noise
        worst = max(worst, float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max(initial=0)) / scale)
    return worst, ""

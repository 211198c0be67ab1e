"""The networks of the zoo: building one, finding its smallest input, bringing it to life, writing its ONNX file.

Everything is the same in every process and environment that asks for one network: ninefold's and the peers' results
are of the same weights. Knows no tool that folds.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES = (32, 64, 75, 96, 128, 224, 256, 299, 384)
LARGEST_FILE = 2**31
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

STATISTICS_FROM = 16
"""Inputs that the BatchNorms' statistics are taken from.

Of two, those of maps of one pixel normalise to ±1 whatever came in, and a deep network multiplies float32's rounding by
it, layer by layer: to 5e-2 of efficientvit_m0's output, where it is 4e-5 with statistics from 8 inputs and 8e-6 from 32
(mobilenetv2_035: 9e-3, 2e-5 and 6e-6). A comparison in float32 would see nothing.
"""

EXPORTERS = ("torchscript", "torchscript, as by default", "dynamo, unoptimised", "dynamo, as by default")
"""What writes the file. Both defaults fold a BatchNorm behind a convolution themselves; the others leave all."""


@dataclass(frozen=True)
class Network:
    """A network in float64 whose BatchNorms matter, and two inputs of batch 2 that it takes."""

    model: Any
    x: Any
    other: Any
    shape: tuple[int, ...]


def build(collection: str, name: str) -> tuple[Any, tuple[int, ...]]:
    """A network of a collection, in eval mode with random weights, and the shape of its smallest input."""
    import torch

    torch.manual_seed(0)
    if collection == "named":
        from after_activation import NETWORKS

        make, shape = NETWORKS[name]
        return make().eval(), shape
    if collection == "torchvision":
        import torchvision

        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        return model, smallest(model)
    if collection == "timm":
        import timm

        model = timm.create_model(name, pretrained=False).eval()
        return model, smallest(model, tuple(model.pretrained_cfg["input_size"]))
    raise SystemExit(f"no collection {collection!r}: expected named, torchvision or timm")


def alive(collection: str, name: str) -> Network:
    """A network with BatchNorms that matter. See `networks.enliven`."""
    import torch
    from networks import enliven

    model, shape = build(collection, name)
    wake_layer_scales(model)
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(STATISTICS_FROM, *shape, generator=generator, dtype=torch.float64)
    other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return Network(enliven(model, many), many[:2].clone(), other, shape)


def wake_layer_scales(model: Any) -> list[str]:
    """Give LayerScales values around one, and return their names: at 1e-6, as they start, branches are rounding noise.

    They are told by what a training starts from: one small number for all channels.
    """
    import torch

    generator = torch.Generator().manual_seed(2)
    woken = []
    for name, parameter in model.named_parameters():
        first = float(parameter.detach().flatten()[0])
        if parameter.numel() > 1 and 0 < abs(first) < 0.1 and bool((parameter == first).all()):
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            woken.append(name)
    return woken


def smallest(model: Any, own: tuple[int, ...] = (3, 224, 224)) -> tuple[int, ...]:
    """The smallest input that the model takes: one of SIZES in both directions, else the size it was made for."""
    import torch

    channels = own[0]
    for shape in (*((channels, size, size) for size in SIZES), own):
        # A model says in many ways that its input is too small: an assertion, a size of zero, a window that is larger.
        with contextlib.suppress(Exception), torch.no_grad():
            outputs = model(torch.randn(2, *shape))
            tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
            if all(bool(t.isfinite().all()) and t.numel() for t in tensors if isinstance(t, torch.Tensor)):
                return shape
    raise SystemExit("no input size fits")


def write_onnx(model: Any, x: Any, path: Path, exporter: str = EXPORTERS[0]) -> None:
    """Write the model's ONNX file in the input's precision. Raises what the exporter raises."""
    import torch

    if torch.finfo(x.dtype).bits // 8 * sum(p.numel() for p in model.parameters()) >= LARGEST_FILE:
        raise ValueError("no ONNX file without external data can hold it")
    with torch.no_grad():
        if exporter.startswith("torchscript"):
            preserve, evaluate = torch.onnx.TrainingMode.PRESERVE, torch.onnx.TrainingMode.EVAL
            mode = preserve if exporter == EXPORTERS[0] else evaluate
            torch.onnx.export(model, (x,), str(path), dynamo=False, training=mode, opset_version=17)
        else:
            optimise = exporter == EXPORTERS[3]
            torch.onnx.export(
                model, (x,), str(path), dynamo=True, optimize=optimise, external_data=False, verbose=False
            )


def write_unfolded_onnx(model: Any, x: Any, path: Path) -> str:
    """Write a file with all the model's BatchNorms in it, by whichever exporter takes the model; says which."""
    problems = []
    for exporter in (EXPORTERS[0], EXPORTERS[2]):
        try:
            write_onnx(model, x, path, exporter)
        except Exception as error:  # each exporter has its own kinds; the other one may take the model
            problems.append(f"{exporter}: {first_line(error)}")
        else:
            return exporter
    raise RuntimeError("; ".join(problems))


def first_line(error: BaseException) -> str:
    """The kind of an error and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_folders(f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]


def frames(error: BaseException) -> list[str]:
    """Where an error was raised, innermost last."""
    called = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno}, {frame.name}" for frame in called]


def without_folders(text: str) -> str:
    """Without the folders of this machine: where it keeps things is no result."""
    for folder in (sys.prefix, str(ROOT), tempfile.gettempdir()):
        text = text.replace(folder, "…")
    return text


def batchnorm_nodes(graph: Any) -> list[Any]:
    """The BatchNormalization nodes of an `onnx.GraphProto`, those of its subgraphs too."""
    import onnx

    found = []
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            found.append(node)
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            found += [below for subgraph in inner for below in batchnorm_nodes(subgraph)]
    return found


def outputs_of(file: Path | bytes, feeds: dict[str, Any]) -> list[Any]:
    """What onnxruntime's CPU provider computes with its optimisations off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    source = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def largest_difference(before: Any, after: Any) -> float:
    """Over all outputs that are arrays, of the outputs' largest value (at least 1e-3); infinite where one is not the
    other's shape or not a number where the other is one.
    """
    import numpy as np

    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if isinstance(a, list):
            worst = max(worst, largest_difference(a, b))
            continue
        if not isinstance(a, np.ndarray) or not (np.issubdtype(a.dtype, np.number) or a.dtype == bool):
            worst = worst if np.array_equal(a, b) else float("inf")
            continue
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        finite = np.isfinite(a)
        a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        worst = max(worst, float(np.abs(a - b).max(initial=0) / np.abs(a).max(initial=1e-3)))
    return worst


def tensors_of(outputs: Any) -> list[Any]:
    """The tensors in what a module returns."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return [outputs]
    inner = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for output in inner for tensor in tensors_of(output)] if isinstance(inner, list | tuple) else []

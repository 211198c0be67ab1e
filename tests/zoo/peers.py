"""What other tools leave of a network's BatchNorms.

    python tests/zoo/peers.py environment FOLDER             makes the peers' environment
    python tests/zoo/zoo.py peers [COLLECTION [NAME…]] --peers FOLDER    measures: docs/results/zoo-peers.jsonl

Some peers ask for other versions than ninefold, and some for a torch of their own. They live in a virtual environment
that sees this one's packages (torch, onnx, onnxruntime, timm) behind its own:

    python -m venv FOLDER
    echo THIS_ENVIRONMENT'S_SITE_PACKAGES > FOLDER/lib/python3.11/site-packages/behind.pth
    FOLDER/bin/pip install --no-deps aimet-onnx==2.42.0 model-compression-toolkit==2.6.1 mct-quantizers edge-mdt-cl \\
        onnx2torch onnxsim onnxslim onnxoptimizer
    FOLDER/bin/pip install jinja2 pyyaml bokeh hvplot jsonschema pandas osqp pybind11 scikit-learn tqdm PuLP \\
        'networkx<3.6' scikit-image colorama tensorboard 'pydantic<2.12'

`environment` does just that. pip complains of AIMET (it wants the package onnxruntime, and finds onnxruntime-gpu) and
of MCT (an older matplotlib); both work.

How each is asked, always for the fewest BatchNorms that it can leave without changing what the network computes:

- torch.fx: `torch.fx.experimental.optimization.fuse`. timm's BatchNorms with an activation are functions to its tracer:
  it neither sees them nor folds them, but they are in the graph that it makes, and counted there.
- MCT (Sony's model-compression-toolkit): the graph after all its preparations for quantisation. Its public function was
  seen to leave the same (`pytorch_post_training_quantization`), but quantises too.
- onnxsim, onnxslim, onnxoptimizer (all its fuse and elimination passes), onnxscript (its default rules and the
  affine-convolution rule), onnxruntime (the file it saves with basic and with extended optimisations; with all of them
  the CPU provider turns BatchNorms into grouped convolutions, where counting nodes says nothing).
- AIMET-ONNX: `fold_all_batch_norms_to_weight`, on the file as it is and on what onnxsim makes of it; whichever leaves
  fewer.

Each result is run too: a peer that leaves few by being wrong is not ahead. Runs in the peers' environment, and imports
nothing of ninefold's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from models import (
    alive,
    batchnorm_nodes,
    first_line,
    largest_difference,
    outputs_of,
    tensors_of,
    without_folders,
    write_unfolded_onnx,
)

WITHOUT_DEPENDENCIES = (
    *("aimet-onnx==2.42.0", "model-compression-toolkit==2.6.1", "mct-quantizers", "edge-mdt-cl", "onnx2torch"),
    *("onnxsim", "onnxslim", "onnxoptimizer"),
)
WITH_DEPENDENCIES = (
    *("jinja2", "pyyaml", "bokeh", "hvplot", "jsonschema", "pandas", "osqp", "pybind11", "scikit-learn", "tqdm"),
    *("networkx<3.6", "PuLP", "scikit-image", "colorama", "tensorboard", "pydantic<2.12"),
)
ON_MODULES = ("torch.fx", "MCT")
ON_FILES = (
    *("onnxruntime basic", "onnxruntime extended", "onnxsim", "onnxslim", "onnxoptimizer", "onnxscript"),
    "AIMET-ONNX",
)
MEMORY_LIMIT = 10 * 2**30
"""Bytes that the peers' process may ask for.

AIMET-ONNX copies all weights for each BatchNorm that it folds, and was seen to take the machine's 24 GiB. Where memory
ends it crashes in protobuf (exit code -11).
"""
PACKAGES = {
    "torch.fx": "torch",
    "MCT": "model-compression-toolkit",
    "AIMET-ONNX": "aimet-onnx",
    "onnxruntime basic": "onnxruntime-gpu",
    "onnxruntime extended": "onnxruntime-gpu",
}


def make_environment(folder: Path) -> None:
    """The virtual environment of the docstring."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *WITH_DEPENDENCIES], check=True)


def measure(
    python: Path, collection: str, name: str, wanted: tuple[str, ...], limit_s: float, feeds: Path | None = None
) -> dict[str, Any]:
    """All peers on one network (or, with the collection "file", on the ONNX file `name` with the inputs `feeds`).

    They run one after the other in one process of the peers' environment; where one crashes it or takes too long, the
    rest go on in a new process.
    """
    found: dict[str, Any] = {"collection": collection, "model": name, "peers": {}}
    left = list(wanted)
    with tempfile.TemporaryDirectory() as folder:
        lines, errors = Path(folder) / "lines", Path(folder) / "errors"
        if feeds is not None:
            (Path(folder) / "feeds.npz").write_bytes(feeds.read_bytes())
        while left:
            lines.write_text("")
            command = [str(python), "-W", "ignore", __file__, "measure", collection, name, folder, *left]
            with errors.open("w") as log:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
                in_time = _wait(process, lines, limit_s)
            said = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
            for line in said:
                found.setdefault("about", {}).update(line.get("about", {}))
                if "peer" in line:
                    peer = line.pop("peer")
                    found["peers"][peer] = line
                    left.remove(peer)
            if process.returncode == 0:
                break
            problem = f"over {limit_s:g} s" if not in_time else f"exit code {process.returncode}"
            begun = [line["begin"] for line in said if "begin" in line][-1:]
            if not begun or begun[0] not in left:
                found["failed"] = f"{problem}: {without_folders(errors.read_text().strip())[-300:]}"
                break
            found["peers"][begun[0]] = {"failed": problem}
            left.remove(begun[0])
    return found


def _wait(process: subprocess.Popen[bytes], lines: Path, limit_s: float) -> bool:
    """Until the process ends, or `limit_s` after the last line it wrote: then it is ended. Whether it ended itself."""
    seen, since = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return True
        size = lines.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        if time.monotonic() - since > limit_s:
            process.kill()
            process.wait()
            return False


def work(collection: str, name: str, folder: Path, wanted: list[str]) -> None:
    """The child's side of `measure`: a line of JSON for whatever is known."""
    import numpy as np
    import onnx
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    def say(**fields: Any) -> None:
        with (folder / "lines").open("a") as file:
            file.write(json.dumps(fields) + "\n")

    path, feeds_path = folder / "model.onnx", folder / "feeds.npz"
    model = x = None
    if collection == "file":
        path = Path(name)
    else:
        network = alive(collection, name)
        model, x = network.model.float(), network.x.float()
        norms = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
        say(about={"modules": norms, "input": "x".join(map(str, network.shape))})
        if not path.exists():
            try:
                exporter = write_unfolded_onnx(model, x, path)
            except RuntimeError as error:
                say(about={"no_file": str(error)[:300]})
            else:
                argument = onnx.load(path, load_external_data=False).graph.input[0].name
                np.savez(feeds_path, **{argument: x.numpy()})
                say(about={"exporter": exporter})
    feeds: dict[str, Any] = dict(np.load(feeds_path)) if feeds_path.exists() else {}
    before: list[Any] | None = None
    if path.exists():
        say(about={"in_file": len(batchnorm_nodes(onnx.load(path).graph))})
        with contextlib.suppress(Exception):  # a file that onnxruntime doesn't run: then differences are not known
            before = outputs_of(path, feeds) if feeds else None

    for peer in wanted:
        say(begin=peer)
        start = time.perf_counter()
        try:
            if peer in ON_MODULES:
                if model is None:
                    continue
                left, difference = MODULE_PEERS[peer](model, x)
            else:
                if not path.exists():
                    continue
                left, result = fewest(FILE_PEERS[peer](path, folder))
                difference = None if before is None else compare(before, result, feeds)
        except ModuleNotFoundError as error:
            say(peer=peer, failed=first_line(error), missing=True)
        except Exception as error:  # a peer's failure is its result
            say(peer=peer, failed=first_line(error))
        else:
            seconds, version = round(time.perf_counter() - start, 1), installed(PACKAGES.get(peer, peer))
            say(peer=peer, left=left, difference=difference, seconds=seconds, version=version)


def fewest(results: list[Any]) -> tuple[int, Any]:
    """How many BatchNorms the result with the fewest has, and that result."""
    counted = [(len(batchnorm_nodes(result.graph)), place) for place, result in enumerate(results)]
    left, place = min(counted)
    return left, results[place]


def compare(before: list[Any], result: Any, feeds: dict[str, Any]) -> float | str:
    """The difference of the outputs, or why the result does not run."""
    # Of an old file, whose weights are inputs too, onnxruntime saves those that it folded away as inputs alone.
    read = {name for node in result.graph.node for name in node.input} | {o.name for o in result.graph.output}
    for unread in [value for value in result.graph.input if value.name not in read and value.name not in feeds]:
        result.graph.input.remove(unread)
    try:
        return largest_difference(before, outputs_of(result.SerializeToString(), feeds))
    except Exception as error:  # a file that was broken
        return first_line(error)


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def torch_fx(model: Any, x: Any) -> tuple[int, float]:
    import torch
    from torch.fx.experimental.optimization import fuse

    fused = fuse(copy.deepcopy(model))
    modules = dict(fused.named_modules())
    left = sum(
        isinstance(modules.get(str(node.target)), torch.nn.modules.batchnorm._BatchNorm)
        or node.target is torch.nn.functional.batch_norm
        for node in fused.graph.nodes
    )
    return left, module_difference(model, fused, x)


def mct(model: Any, x: Any) -> tuple[int, float | str]:
    import torch
    from model_compression_toolkit.core import DEFAULTCONFIG
    from model_compression_toolkit.core.common.model_builder_mode import ModelBuilderMode
    from model_compression_toolkit.core.graph_prep_runner import graph_preparation_runner
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.ptq.pytorch import quantization_facade

    platform = quantization_facade.load_target_platform_capabilities(quantization_facade.DEFAULT_PYTORCH_TPC)
    attached = quantization_facade.AttachTpcToPytorch().attach(platform, DEFAULTCONFIG.custom_tpc_opset_to_layer)
    implementation = PytorchImplementation()
    graph = graph_preparation_runner(
        copy.deepcopy(model), lambda: iter([[x.numpy()]]), DEFAULTCONFIG, DEFAULT_PYTORCH_INFO, implementation, attached
    )
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.functional.batch_norm)
    left = sum(node.type in kinds for node in graph.nodes)
    try:
        folded, *_ = implementation.model_builder(graph, mode=ModelBuilderMode.FLOAT)
        return left, module_difference(model, folded, x)
    except Exception as error:  # what it builds can't always be run
        return left, first_line(error)


def module_difference(model: Any, folded: Any, x: Any) -> float:
    import torch

    with torch.no_grad():
        before, after = ([t.numpy() for t in tensors_of(module(x.clone()))] for module in (model, folded))
    return largest_difference(before, after)


def onnxruntime_saved(level: str) -> Callable[[Path, Path], list[Any]]:
    def optimise(path: Path, folder: Path) -> list[Any]:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [onnx.load(folder / "optimised.onnx")]

    return optimise


def onnxsim(path: Path, folder: Path) -> list[Any]:
    import onnx
    import onnxsim

    return [onnxsim.simplify(onnx.load(path))[0]]


def onnxslim(path: Path, folder: Path) -> list[Any]:
    import onnx
    import onnxslim

    return [onnxslim.slim(onnx.load(path))]


def onnxoptimizer(path: Path, folder: Path) -> list[Any]:
    import onnx
    import onnxoptimizer

    return [onnxoptimizer.optimize(onnx.load(path), onnxoptimizer.get_fuse_and_elimination_passes())]


def onnxscript(path: Path, folder: Path) -> list[Any]:
    import onnx
    import onnxscript.rewriter
    from onnxscript.rewriter.rules import common

    affine = [common.affine_conv_fusion_rule, common.conv_affine_fusion_rule]
    return [onnxscript.rewriter.rewrite(onnxscript.rewriter.rewrite(onnx.load(path)), affine)]


def aimet(path: Path, folder: Path) -> list[Any]:
    import onnx
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

    problem, results = None, []
    for prepare in (lambda: onnx.load(path), lambda: onnxsim(path, folder)[0]):
        try:
            model = prepare()
            fold_all_batch_norms_to_weight(model)
        except Exception as error:  # of the two ways one is enough
            problem = error
        else:
            results.append(model)
    if not results:
        assert problem is not None
        raise problem
    return results


MODULE_PEERS: dict[str, Callable[[Any, Any], tuple[int, float | str]]] = {"torch.fx": torch_fx, "MCT": mct}
FILE_PEERS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "onnxruntime basic": onnxruntime_saved("BASIC"),
    "onnxruntime extended": onnxruntime_saved("EXTENDED"),
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
    "onnxoptimizer": onnxoptimizer,
    "onnxscript": onnxscript,
    "AIMET-ONNX": aimet,
}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["environment", folder]:
            make_environment(Path(folder))
        case ["measure", collection, name, folder, *wanted]:
            work(collection, name, Path(folder), wanted)
        case _:
            print(__doc__)

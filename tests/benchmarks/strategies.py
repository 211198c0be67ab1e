"""What folding and its strategies do to the speed: measured, for the article's network and three others.

    python tests/benchmarks/strategies.py run [NETWORK…]     docs/results/strategies.json
    python tests/benchmarks/strategies.py table              docs/strategies.md from it

Each network is exported with every strategy; all the bundles, and the unfolded control of the first, take turns in the
same rounds of one run. That is done several times, each with new processes and another order of the bundles: where a
process happens to put its memory stays with it, and two copies of one file were seen to differ by 3 % for a whole run.
Figures are the median of the runs' medians, with the 95 % interval of a bootstrap that draws runs, and rounds in them
(Davison & Hinkley, *Bootstrap Methods and their Application*, 3.8).

The article's network is the trained one (`nox -s train` first); the others have random weights, and BatchNorms whose
statistics were set from data, with scales of both signs. Two of them are measured without negative scales too, as most
trained networks have none: such a scale does not pass max pooling.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from bench.backends.contract import Profile
from bench.results.schema import Result
from bench.results.statistics import throughput
from bench.results.terms import CONTROL_SUFFIX, label_of
from bench.run.plan import Plan, Rounds, Selection
from bench.run.rounds import run
from export.bundle import Manifest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "strategies.json"
PAGE = ROOT / "docs" / "strategies.md"
CHECKPOINT = ROOT / "artifacts" / "training" / "article" / "checkpoint.safetensors"
sys.path += [str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

BACKENDS = ("onnx-cpu", "torchscript-cpu")
BATCH_SIZES = (1, 64)
CONTROL = "unfolded"
DRAWS = 5_000
RUNS, ROUNDS, BLOCK_S = 5, 8, 0.05


def _network(name: str, positive: bool = False) -> nn.Module:
    from after_activation import NETWORKS
    from networks import enliven

    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = enliven(build(), torch.randn(8, *shape, dtype=torch.float64)).float()
    for module in network.modules():
        if positive and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.weight is not None
            module.weight.data.abs_()
    return network


def vgg() -> nn.Module:
    return _network("VGG-11, BatchNorm after ReLU")


def vgg_positive() -> nn.Module:
    return _network("VGG-11, BatchNorm after ReLU", positive=True)


def stack() -> nn.Module:
    return _network("Keras stack, max pooling")


def stack_positive() -> nn.Module:
    return _network("Keras stack, max pooling", positive=True)


def depthwise() -> nn.Module:
    return _network("depthwise separable")


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "VGG-11, BatchNorm after ReLU": (vgg, (3, 32, 32)),
    "VGG-11, BatchNorm after ReLU, no negative scale": (vgg_positive, (3, 32, 32)),
    "Keras stack, max pooling": (stack, (3, 32, 32)),
    "Keras stack, max pooling, no negative scale": (stack_positive, (3, 32, 32)),
    "depthwise separable": (depthwise, (3, 24, 24)),
}
ARTICLE = "the article's, trained"


def material(name: str) -> Any:
    """What `export.build` makes a bundle from."""
    from export.sources import article, own
    from export.sources.ends import Given

    if name == ARTICLE:
        return article.load(CHECKPOINT, article.describe(CHECKPOINT), ROOT / "data")
    factory, shape = OWN[name]
    given = Given(shape, (False,) * len(shape))
    return own.load(own.Own(f"strategies:{factory.__name__}", inputs=(given,)), lambda note: None, Path())


def measure(name: str) -> dict[str, Any]:
    """All strategies of one network, in several runs. Throughput ratios are kept round by round for each run."""
    from export.build import build
    from export.fold.report import Strategy

    strategies = [strategy for strategy in get_args(Strategy) if strategy != "none"]
    made = material(name)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            strategy: build(made, Path(folder) / strategy, strategy, lambda what: None) for strategy in strategies
        }
        for number in range(RUNS):
            shift = number % len(strategies)
            order = strategies[shift:] + strategies[:shift]
            results.append((order, one_run([bundles[strategy].path for strategy in order])))
    first = results[0][1]
    return {
        "network": name,
        "date": date.today().isoformat(),
        "cpu": first.environment.cpu,
        "threads": first.settings.threads,
        "cpu_busy_percent": max(
            max((result.environment.cpu_busy_percent, *result.cpu_busy_percents)) for _, result in results
        ),
        "runs": RUNS,
        "rounds": ROUNDS,
        "block_s": BLOCK_S,
        "strategies": {
            strategy: {
                "methods": {backend: methods(bundle.manifest, backend) for backend in BACKENDS},
                "kept": len(bundle.manifest.fold.kept),
            }
            for strategy, bundle in bundles.items()
        },
        "throughput_ratios": {
            f"{backend}, batch {batch_size}": {
                what: [ratios_of(order, result, backend, batch_size, what) for order, result in results]
                for what in (*strategies[1:], CONTROL)
            }
            for backend in BACKENDS
            for batch_size in BATCH_SIZES
        },
    }


def methods(manifest: Manifest, backend: str) -> list[str]:
    """How each BatchNorm was folded in the file that the backend runs."""
    torch_runs_it = backend.startswith("torch")
    report = (manifest.fold_for_torch if torch_runs_it else None) or manifest.fold
    return [norm.method for norm in report.folded]


def one_run(bundles: list[Path]) -> Result:
    """The bundles in one run, in this order, with the unfolded files of the first."""
    from bench.machine.environment import usable_cpus

    plan = Plan(
        selection=Selection(tuple(bundles), BACKENDS, control=BACKENDS),
        threads=usable_cpus(),
        profile=Profile.STRICT,
        timeout_s=120.0,
        rounds=Rounds(BATCH_SIZES, BLOCK_S, count=ROUNDS),
    )
    result = run(plan, lambda what, done: None)
    assert all(subject.parity is not None and subject.parity.passed for subject in result.subjects)
    return result


def ratios_of(order: list[str], result: Result, backend: str, batch_size: int, what: str) -> list[float]:
    """Round by round: a strategy's throughput over that of `auto`; or that of `auto` over the unfolded control's."""
    letters = {strategy: chr(ord("A") + place) for place, strategy in enumerate(order)}
    auto = label_of(backend, letter=letters["auto"])
    control = label_of(backend, letter="A") + CONTROL_SUFFIX
    above, below = (auto, control) if what == CONTROL else (label_of(backend, letter=letters[what]), auto)
    numerators, denominators = (
        {
            sample.round: throughput(batch_size, sample.durations_ns)
            for sample in result.samples
            if (sample.subject, sample.batch_size, sample.timing) == (label, batch_size, "device_resident")
        }
        for label in (above, below)
    )
    return [numerators[round_] / denominators[round_] for round_ in sorted(numerators)]


def interval(runs: list[list[float]]) -> tuple[float, float, float]:
    """The median of the runs' medians and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    ratios = np.asarray(runs)
    drawn = ratios[rng.integers(0, len(ratios), (DRAWS, len(ratios)))]
    places = rng.integers(0, ratios.shape[1], drawn.shape)
    medians = np.median(np.median(np.take_along_axis(drawn, places, axis=2), axis=2), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(np.median(ratios, axis=1))), float(low), float(high)


def store(results: Path, line: dict[str, Any]) -> None:
    """Add or replace one network's measurement."""
    have = {entry["network"]: entry for entry in (json.loads(results.read_text()) if results.exists() else [])}
    have[line["network"]] = line
    results.write_text(json.dumps(list(have.values()), indent=1) + "\n")


def table() -> None:
    """docs/strategies.md."""
    entries = json.loads(RESULTS.read_text())
    first = entries[0]
    page = [
        "# Speed of the folded files, by strategy",
        "",
        f"{first['cpu']}, {first['threads']} threads, {first['date']}. Throughput on prepared input, paired by round, "
        f"in {first['runs']} runs with new processes and another order of the files, each of {first['rounds']} rounds "
        f"of {first['block_s'] * 1000:g} ms; with the 95 % interval of a bootstrap over runs and rounds. The first "
        "column of figures is `auto` against the unfolded control; the others are that strategy against `auto`: below "
        "1, `auto` is faster. Below each network stands what a strategy did; where it did as `auto` does, its file is "
        "the same. A strategy that keeps BatchNorms which `auto` folds is in brackets: it answers another question.",
        "",
    ]
    beaten, compared = [], 0
    for entry in entries:
        strategies = entry["strategies"]
        others = [strategy for strategy in strategies if strategy != "auto"]
        names = " | ".join(f"{strategy} against auto" for strategy in others)
        page += [f"## {entry['network']}", "", f"| backend, batch | auto against unfolded | {names} |"]
        page += [f"|---|---|{'---|' * len(others)}"]
        for place, ratios in entry["throughput_ratios"].items():
            backend = place.partition(",")[0]
            cells = [_cell(*interval(ratios[CONTROL]))]
            for strategy in others:
                if strategies[strategy]["methods"][backend] == strategies["auto"]["methods"][backend]:
                    cells.append("the same file")
                    continue
                median, low, high = interval(ratios[strategy])
                if strategies[strategy]["kept"] > strategies["auto"]["kept"]:
                    cells.append(f"({_cell(median, low, high)})")
                    continue
                cells.append(_cell(median, low, high))
                compared += 1
                if low > 1:
                    beaten.append(f"{entry['network']}, {place}: {strategy} by {100 * (median - 1):.1f} %")
            page.append(f"| {place} | {' | '.join(cells)} |")
        page += [""]
        for name, did in strategies.items():
            ways = {backend: ", ".join(did["methods"][backend]) or "nothing" for backend in BACKENDS}
            same = len(set(ways.values())) == 1
            said = ways[BACKENDS[0]] if same else "; ".join(f"{way} ({backend})" for backend, way in ways.items())
            page.append(f"- {name}: {said}; {did['kept']} kept")
        page += [""]
    page += [
        f"In {len(beaten)} of {compared} comparisons with a strategy that folds as much, the interval says that it was "
        "faster than `auto`" + (": " + "; ".join(beaten) if beaten else "") + ".",
        "",
        "Made by `python tests/benchmarks/strategies.py run` and `table`.",
        "",
    ]
    PAGE.write_text("\n".join(page))


def _cell(median: float, low: float, high: float) -> str:
    return f"{median:.3f} ({low:.3f}…{high:.3f})"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names]:
            for name in names or (ARTICLE, *OWN):
                store(RESULTS, measure(name))
                print(f"measured {name}", flush=True)
        case ["table"]:
            table()
        case _:
            print(__doc__)

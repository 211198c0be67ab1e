"""What folding and its strategies do to the speed: measured, for the article's network and three others.

    python tests/benchmarks/strategies.py run [NETWORK…]     docs/results/strategies.json
    python tests/benchmarks/strategies.py table              docs/strategies.md from it

Each network is exported with every strategy; all the bundles, and the unfolded control of the first (`auto`), take
turns in the same rounds of one run. The article's network is the trained one (`nox -s train` first); the others have
random weights, and BatchNorms whose statistics were set from data, with scales of both signs. Two of them are measured
without negative scales too, as most trained networks have none: such a scale does not pass max pooling.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "strategies.json"
PAGE = ROOT / "docs" / "strategies.md"
CHECKPOINT = ROOT / "artifacts" / "training" / "article" / "checkpoint.safetensors"
sys.path += [str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

BACKENDS = ("onnx-cpu", "torchscript-cpu")
BATCH_SIZES = (1, 64)
ROUNDS, BLOCK_S = 16, 0.1


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
    from export import source

    if name == ARTICLE:
        return source.load(CHECKPOINT, source.describe(CHECKPOINT), ROOT / "data")
    factory, shape = OWN[name]
    return source.load_own(f"strategies:{factory.__name__}", None, shape, None)


def measure(name: str) -> dict[str, Any]:
    """All strategies of one network, in one run."""
    from bench.backend import Profile
    from bench.environment import usable_cpus
    from bench.run import Plan, run
    from export.build import build
    from export.fold.report import Strategy

    strategies = [strategy for strategy in get_args(Strategy) if strategy != "none"]
    made = material(name)
    with tempfile.TemporaryDirectory() as folder:
        bundles = [build(made, Path(folder) / strategy, strategy, lambda what: None) for strategy in strategies]
        plan = Plan(
            bundles=tuple(bundle.path for bundle in bundles),
            backends=BACKENDS,
            control=BACKENDS,
            batch_sizes=BATCH_SIZES,
            rounds=ROUNDS,
            block_s=BLOCK_S,
            threads=usable_cpus(),
            profile=Profile.STRICT,
            timeout_s=120.0,
        )
        result = run(plan, lambda what, done: None)
    assert all(subject.parity is not None and subject.parity.passed for subject in result.subjects)
    return {
        "network": name,
        "date": date.today().isoformat(),
        "cpu": result.environment.cpu,
        "threads": plan.threads,
        "cpu_busy_percent": max(result.environment.cpu_busy_percent, result.cpu_busy_percent_at_end),
        "rounds": ROUNDS,
        "block_s": BLOCK_S,
        "strategies": {
            letter: {
                "strategy": strategy,
                "methods": [norm.method for norm in bundle.manifest.fold.folded],
                "kept": len(bundle.manifest.fold.kept),
            }
            for letter, strategy, bundle in zip("ABCDEFG", strategies, bundles, strict=False)
        },
        "ratios": [ratio.model_dump() for ratio in result.ratios if ratio.against != "torch"],
    }


def store(line: dict[str, Any]) -> None:
    """Add or replace one network's measurement."""
    have = {entry["network"]: entry for entry in (json.loads(RESULTS.read_text()) if RESULTS.exists() else [])}
    have[line["network"]] = line
    RESULTS.write_text(json.dumps(list(have.values()), indent=1) + "\n")


def table() -> None:
    """docs/strategies.md."""
    entries = json.loads(RESULTS.read_text())
    first = entries[0]
    page = [
        "# Speed of the folded files, by strategy",
        "",
        f"{first['cpu']}, {first['threads']} threads, {first['date']}. Throughput on prepared input, paired by round "
        f"({first['rounds']} rounds of {first['block_s'] * 1000:g} ms), with the 95 % bootstrap interval of the "
        "median. The first column of figures is `auto` against the unfolded control; the others are that strategy "
        "against `auto`: below 1, `auto` is faster. Below each network stands what a strategy did.",
        "",
    ]
    beaten, compared = [], 0
    for entry in entries:
        by_letter = entry["strategies"]
        others = [letter for letter in by_letter if letter != "A"]
        names = " | ".join(f"{by_letter[letter]['strategy']} against auto" for letter in others)
        page += [f"## {entry['network']}", "", f"| backend | batch | auto against unfolded | {names} |"]
        page += [f"|---|---|---|{'---|' * len(others)}"]
        device = [r for r in entry["ratios"] if r["timing"] == "device_resident"]
        for backend in BACKENDS:
            for batch_size in BATCH_SIZES:
                cells = []
                for numerator in (f"{backend}@A", *(f"{backend}@{letter}" for letter in others)):
                    against = "control" if numerator.endswith("@A") else "base"
                    (found,) = (
                        r["throughput_ratio"]
                        for r in device
                        if (r["numerator"], r["batch_size"], r["against"]) == (numerator, batch_size, against)
                    )
                    cells.append(f"{found['median']:.3f} ({found['low']:.3f}…{found['high']:.3f})")
                    if against == "base":
                        compared += 1
                        if found["low"] > 1:
                            strategy = by_letter[numerator[-1]]["strategy"]
                            beaten.append(f"{entry['network']}, {backend}, batch {batch_size}: {strategy}")
                page.append(f"| {backend} | {batch_size} | {' | '.join(cells)} |")
        page += ["", *(f"- {e['strategy']}: {', '.join(e['methods'])}; {e['kept']} kept" for e in by_letter.values())]
        page += [""]
    page += [
        f"In {len(beaten)} of {compared} comparisons the interval says that a strategy was faster than `auto`"
        + (": " + "; ".join(beaten) if beaten else "")
        + ".",
        "",
        "Made by `python tests/benchmarks/strategies.py run` and `table`.",
        "",
    ]
    PAGE.write_text("\n".join(page))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names]:
            for name in names or (ARTICLE, *OWN):
                store(measure(name))
                print(f"measured {name}", flush=True)
        case ["table"]:
            table()
        case _:
            print(__doc__)

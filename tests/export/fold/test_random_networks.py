"""Small networks drawn at random: folding never makes a wrong number and never raises.

`python tests/export/fold/test_random_networks.py 10000` draws that many and prints what became of their BatchNorms.
"""

from __future__ import annotations

import collections
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from networks import difference, random_network

from export.fold import FoldReport, fold_batchnorm
from export.fold.report import Strategy


def fold_and_compare(draw: object, strategy: Strategy) -> FoldReport:
    model, x = random_network(draw)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batchnorm(model, (x,), strategy=strategy)
    wild = torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 3
    for inputs in (x, wild):
        assert difference(model, folded.module, inputs) <= 1e-9, (model, folded.report)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    left = sum(node.target is torch.ops.aten.batch_norm.default for node in folded.module.graph.nodes)
    assert left <= len(folded.report.kept)
    return folded.report


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_networks(data: st.DataObject) -> None:
    strategy = data.draw(st.sampled_from(["auto", "auto", "ones", "bias-map", "floor"]))
    fold_and_compare(lambda low, high: data.draw(st.integers(low, high)), strategy)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_networks(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        fold_and_compare(random.Random(seed).randint, "auto")


def main(count: int, first: int = 0) -> None:
    tally: collections.Counter[str] = collections.Counter()
    wrong = 0
    for seed in range(first, first + count):
        strategies: list[Strategy] = ["auto", "auto", "ones", "bias-map", "floor"]
        try:
            report = fold_and_compare(random.Random(seed).randint, strategies[seed % 5])
        except Exception as error:  # each is counted and shown, so that one run shows them all
            wrong += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            continue
        tally.update(norm.method for norm in report.folded)
        tally["kept"] += len(report.kept)
    print(f"{count} networks, {wrong} wrong; {dict(tally)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""What training costs: `trainer` against the loop that the article writes, recipe by recipe.

Run by `pytest --benchmark-only tests/benchmarks/test_training.py` (some minutes), skipped in a plain `pytest`. With
`--benchmark-json docs/results/training-speed.json` the raw seconds of every slice, the ratio and the compile time are
kept, under `extra_info` of each benchmark.

Both sides train the article's network on real MNIST and evaluate all 10,000 test images every 50 iterations, in the
same process and with the same threads. They take turns, slice by slice, so that a machine that slows down slows both;
the ratio is the median over the pairs of neighbouring slices. Compiling is paid once per run of
6,000 iterations and stands beside the ratio, not in it.

Recipe `fast` runs whole, from reading the data to its one evaluation, between slices of the literal loop, whose 120
slices are a whole run of the article.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from trainer import mnist
from trainer.recipes import ARTICLE, FAST, Settings

ROUNDS, FAST_ROUNDS = 7, 5
SLICE = 50
"""Iterations of one slice: as many as the recipe has from one evaluation to the next, so one falls into it."""


@pytest.fixture(scope="module")
def literal(data_dir: Path) -> Callable[[], None]:
    """One slice of the article's loop: one image at a time through ToTensor and Normalize, eager, float32.

    Its evaluation is the listing's: without eval() and without no_grad(), the way the article was timed.
    """
    import torch
    import torchvision
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from trainer.model import Net

    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    train_set = torchvision.datasets.MNIST(str(data_dir), train=True, transform=steps)
    test_set = torchvision.datasets.MNIST(str(data_dir), train=False, transform=steps)
    train_loader = DataLoader(train_set, batch_size=ARTICLE.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=ARTICLE.batch_size, shuffle=False)
    net = Net()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=ARTICLE.learning_rate, weight_decay=ARTICLE.weight_decay)

    def batches() -> Iterator[Any]:
        while True:
            yield from train_loader

    endless = batches()

    def run_slice() -> None:
        for iteration in range(1, SLICE + 1):
            images, labels = next(endless)
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            if iteration % SLICE == 0:
                correct = total = 0
                for images, labels in test_loader:
                    predicted = torch.max(net(images).data, 1)[1]
                    total += len(labels)
                    correct += (predicted == labels).sum()
                assert total == 10_000
                assert 100 * correct / total > 50

    return run_slice


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.filterwarnings("default")  # what the compiler stack warns of is not this project's to mend
def test_training(precision: str, data_dir: Path, literal: Callable[[], None], benchmark: BenchmarkFixture) -> None:
    from trainer import train

    assert ARTICLE.evaluate_every == SLICE
    settings = Settings(ARTICLE, precision=precision, iterations=SLICE)
    prepared = train.prepare(settings, mnist.load(data_dir), compiled=True)
    literal()  # one slice of each that doesn't count
    train.run(prepared)

    def ours() -> float:
        trained = train.run(prepared)
        assert [evaluation.iteration for evaluation in trained.history] == [SLICE]
        assert trained.test_top1 > 50
        return trained.seconds

    literal_seconds, ours_seconds = take_turns(benchmark, literal, ours, ROUNDS)

    pairs = [theirs / mine for theirs, mine in zip(literal_seconds, ours_seconds, strict=True)]
    keep(
        benchmark,
        pairs,
        literal_seconds,
        ours_seconds,
        precision=precision,
        slice=f"{SLICE} iterations of batch {ARTICLE.batch_size}, 1 evaluation of 10,000 images",
        compile_seconds=prepared.compile_seconds,
    )
    per_epoch = 60_000 / ARTICLE.batch_size / SLICE
    print(
        f"\n{precision}: {statistics.median(pairs):.2f} x the literal loop ({min(pairs):.2f} to {max(pairs):.2f} over "
        f"{ROUNDS} pairs); an epoch takes {statistics.median(ours_seconds) * per_epoch:.1f} s against "
        f"{statistics.median(literal_seconds) * per_epoch:.1f} s; "
        f"compiling took {prepared.compile_seconds:.1f} s, once per run"
    )


def test_fast(data_dir: Path, literal: Callable[[], None], benchmark: BenchmarkFixture) -> None:
    """Recipe `fast`, all of it, against the literal loop's whole run."""
    from trainer import train

    slices = round(ARTICLE.epochs * 60_000 / ARTICLE.batch_size / SLICE)
    literal()
    top1: list[float] = []

    def ours() -> float:
        began = time.perf_counter()
        trained = train.train(Settings(FAST, seed=len(top1)), mnist.load(data_dir))
        top1.append(trained.test_top1)
        return time.perf_counter() - began

    literal_seconds, ours_seconds = take_turns(benchmark, literal, ours, FAST_ROUNDS)
    assert min(top1) > 98.5

    pairs = [theirs * slices / mine for theirs, mine in zip(literal_seconds, ours_seconds, strict=True)]
    keep(
        benchmark,
        pairs,
        literal_seconds,
        ours_seconds,
        recipe=FAST.name,
        slice=f"the literal loop's: {SLICE} iterations of batch {ARTICLE.batch_size} and 1 evaluation, of {slices}",
        test_top1_percent=top1,
    )
    print(
        f"\nfast: {statistics.median(pairs):.1f} x the literal loop ({min(pairs):.1f} to {max(pairs):.1f} over "
        f"{FAST_ROUNDS} pairs); a run takes {statistics.median(ours_seconds):.1f} s against "
        f"{statistics.median(literal_seconds) * slices:.0f} s"
    )


def take_turns(
    benchmark: BenchmarkFixture, literal: Callable[[], None], ours: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """The seconds of a slice of the literal loop before each run of ours, which says its own, and those of ours."""
    literal_seconds: list[float] = []
    ours_seconds: list[float] = []

    def literal_slice() -> None:
        began = time.perf_counter()
        literal()
        literal_seconds.append(time.perf_counter() - began)

    benchmark.pedantic(lambda: ours_seconds.append(ours()), setup=literal_slice, rounds=rounds, iterations=1)
    return literal_seconds, ours_seconds


def keep(
    benchmark: BenchmarkFixture, pairs: list[float], literal: list[float], ours: list[float], **more: object
) -> None:
    """Put the raw seconds, the ratios and the machine into the benchmark's JSON."""
    import torch

    benchmark.extra_info.update(
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        literal_seconds=literal,
        trainer_seconds=ours,
        ratio=statistics.median(pairs),
        ratio_of_pairs=pairs,
        load_average_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **more,
    )

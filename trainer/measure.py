"""What a recipe comes to: trained over several seeds, with a mean, a deviation, a test and times.

Owns the measurement and its JSON form. Knows nothing of how a step works or who reads the file.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import mnist, train
from trainer.history import Trained
from trainer.provenance import cpu_name, git_commit, versions
from trainer.recipes import Settings


@dataclass(frozen=True)
class Seed:
    """One training. `setup_seconds` is all that comes before the first step but compiling or capturing.

    For the first seed it counts from the start of the process: importing torch and loading the data are in it.
    `total_seconds` is the sum of the four.
    """

    seed: int
    iterations: int
    test_top1_percent: float
    setup_seconds: float
    compile_seconds: float
    training_seconds: float
    evaluation_seconds: float
    total_seconds: float


def trainings(
    settings: Settings, seeds: int, data: mnist.Mnist, device: torch.device, began: float, watcher: train.Watcher
) -> Iterator[tuple[Seed, str]]:
    """Train with so many seeds, from that of the settings on, one after the other; each with how it was executed.

    `began` is the time (`time.perf_counter`) from which the first one counts.
    """
    for seed in range(settings.seed, settings.seed + seeds):
        trained = train.train(dataclasses.replace(settings, seed=seed), data, device=device, watcher=watcher)
        yield _times(seed, trained, time.perf_counter() - began), trained.execution
        if trained.execution == "compiled":
            torch.compiler.reset()  # torch compiles one function only so often for different networks
        began = time.perf_counter()


def summary(
    settings: Settings, measured: list[Seed], target: float | None, device: torch.device, execution: str
) -> dict[str, Any]:
    """All that is stored: the raw figures of each seed, what follows from them, and where they were taken."""
    top1 = [seed.test_top1_percent for seed in measured]
    return {
        "recipe": settings.recipe.name,
        "numbers": dataclasses.asdict(settings.recipe),
        "precision": settings.precision,
        "mean_test_top1_percent": statistics.mean(top1),
        "deviation_test_top1_percent": statistics.stdev(top1) if len(top1) > 1 else None,
        "target_top1_percent": target,
        "p_value": None if target is None else p_value(top1, target),
        "median_training_seconds": statistics.median(seed.training_seconds for seed in measured),
        "median_total_seconds": statistics.median(seed.total_seconds for seed in measured),
        "device": device.type,
        "execution": execution,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions("ninefold", "numpy", "torch"),
        "git_commit": git_commit(Path(__file__)),
        "date": datetime.date.today().isoformat(),
        "seeds": [dataclasses.asdict(seed) for seed in measured],
    }


def p_value(top1: list[float], target: float) -> float | None:
    """How likely a mean this high would be if the true one were `target`: a one-sided t-test.

    None for a single figure, and where all are alike: there is no deviation to go by then.
    """
    if len(set(top1)) < 2:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(top1, target, alternative="greater").pvalue)


def _times(seed: int, trained: Trained, total: float) -> Seed:
    training = trained.seconds - trained.evaluation_seconds
    return Seed(
        seed=seed,
        iterations=trained.steps,
        test_top1_percent=trained.test_top1,
        setup_seconds=total - trained.compile_seconds - trained.seconds,
        compile_seconds=trained.compile_seconds,
        training_seconds=training,
        evaluation_seconds=trained.evaluation_seconds,
        total_seconds=total,
    )

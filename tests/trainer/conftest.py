"""What the tests of training share: real digits, few enough for a run in a second, and one short run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import mnist, train
from trainer.history import Trained
from trainer.recipes import ARTICLE, Settings


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a machine that is busy elsewhere wait for each other at every operation: a second per step."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(data_dir: Path) -> mnist.Mnist:
    """1,000 images to train on (ten batches of the article's), 1,000 to test on."""
    full = mnist.load(data_dir)
    return mnist.Mnist(
        full.train_images[:1000], full.train_labels[:1000], full.test_images[:1000], full.test_labels[:1000]
    )


@pytest.fixture(scope="session")
def settings() -> Settings:
    """12 iterations of the article, more than an epoch of `data`, evaluated every 5."""
    return Settings(dataclasses.replace(ARTICLE, evaluate_every=5), iterations=12)


@pytest.fixture(scope="module")
def reference(one_thread: None, data: mnist.Mnist, settings: Settings) -> Trained:
    """These 12 iterations, eagerly."""
    return train.train(settings, data, compiled=False)

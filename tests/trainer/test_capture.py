"""On a GPU: a captured step does what the eager one does, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from trainer import mnist, train
from trainer.errors import Interrupted
from trainer.history import Evaluation, Trained
from trainer.recipes import ARTICLE, AUGMENTED, Settings
from trainer.resume import Saving

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
RECIPES = {
    "article": dataclasses.replace(ARTICLE, evaluate_every=5),
    "augmented": dataclasses.replace(AUGMENTED, batch_size=100, evaluate_every=5),
}


def assert_alike(one: Trained, other: Trained, within: float = 0.01) -> None:
    """By the losses: other random numbers, images or rates change them by much more. Not by the weights: kernels may be
    chosen anew in each run and add up in no fixed order, and Adam's first steps make a whole step of a sign.
    """
    assert [e.loss for e in one.history] == pytest.approx([e.loss for e in other.history], rel=within)
    assert [e.top1 for e in one.history] == pytest.approx([e.top1 for e in other.history], abs=1)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_captured_and_eager_come_to_the_same(name: str, precision: str, data: mnist.Mnist) -> None:
    """Dropout, bending, the learning rate and the averages too: over more than an epoch."""
    settings = Settings(RECIPES[name], iterations=13, precision=precision)
    captured = train.train(settings, data, device=CUDA, compiled=True)
    eager = train.train(settings, data, device=CUDA, compiled=False)
    assert (captured.execution, eager.execution) == ("captured", "eager")
    assert captured.compile_seconds > 0
    assert_alike(captured, eager, within=0.01 if precision == "float32" else 0.02)


def test_capturing_leaves_no_trace(data: mnist.Mnist) -> None:
    settings = Settings(RECIPES["augmented"], iterations=13)
    captured = train.prepare(settings, data, device=CUDA, compiled=True)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    eager = train.prepare(settings, data, device=CUDA, compiled=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    for name, tensor in eager.step.tensors().items():
        assert torch.equal(captured.step.tensors()[name], tensor), name
    assert all(parameter.grad is None for parameter in captured.step.model.parameters())


def test_a_captured_run_goes_on_where_it_was_saved(data: mnist.Mnist, tmp_path: Path) -> None:
    settings = Settings(RECIPES["augmented"], iterations=13)
    whole = train.train(settings, data, device=CUDA, compiled=True)

    def watch(done: int, evaluation: Evaluation | None) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    saving = Saving(tmp_path / "run", resume=True)
    with pytest.raises(Interrupted):
        train.train(settings, data, device=CUDA, saving=saving, watcher=train.Watcher(stepped=watch))
    assert_alike(train.train(settings, data, device=CUDA, saving=saving), whole)


def test_float32_means_float32(data: mnist.Mnist) -> None:
    before = torch.backends.cudnn.benchmark
    train.train(Settings(RECIPES["article"], iterations=1), data, device=CUDA)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark == before, "searched for while training only"

"""Two processes that train together come to what one computes from both halves of each batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import checkpoint, mnist
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.recipes import ARTICLE, Settings
from trainer.step import Images, Step

ITERATIONS = 3
TOGETHER = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "trainer", "--device", "cpu", *(str(argument) for argument in arguments)]
    return subprocess.run(command, env=TOGETHER, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes(tmp_path: Path, data_dir: Path) -> None:
    out = tmp_path / "run"
    done = torchrun("--iterations", ITERATIONS, "--seed", 2, "--out", out, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 3 iterations") == 1, "one of them prints"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    weights, facts = checkpoint.load(out / checkpoint.FILE_NAME)
    assert facts.steps == ITERATIONS

    expected = in_one_process(mnist.load(data_dir))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def in_one_process(data: mnist.Mnist) -> dict[str, torch.Tensor]:
    """The weights of process 0: each half of a batch with dropout of its own, and the mean of the gradients."""
    training = Images.on(torch.device("cpu"), data.train_images, data.train_labels)
    steps, streams = [], []
    for rank in (0, 1):
        steps.append(Step(Settings(ARTICLE, seed=2), training, ITERATIONS, Group(rank, 2)))
        streams.append(torch.get_rng_state())
    assert not torch.equal(*streams), "each draws dropout of its own"
    assert all(torch.equal(a, b) for a, b in zip(*(step.model.parameters() for step in steps), strict=True))
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(2))
    for batch in order.split(100)[:ITERATIONS]:
        for rank, step in enumerate(steps):
            torch.set_rng_state(streams[rank])
            step.loss_of(batch[50 * rank : 50 * (rank + 1)]).backward()
            streams[rank] = torch.get_rng_state()
        for one, other in zip(*(step.model.parameters() for step in steps), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert not torch.equal(one.grad, other.grad)
            mean = (one.grad + other.grad) / 2
            one.grad.copy_(mean)
            other.grad.copy_(mean)
        for step in steps:
            step.knobs.copy_(step.table[0])
            step.optimizer.step()
            step.optimizer.zero_grad()
    return steps[0].weights()


def test_a_batch_that_cannot_be_split(data: mnist.Mnist) -> None:
    training = Images.on(torch.device("cpu"), data.train_images, data.train_labels)
    with pytest.raises(UserError, match="100 images can't be split evenly over 3") as refused:
        Step(Settings(ARTICLE), training, ITERATIONS, Group(0, 3))
    assert refused.value.exit_code == 2


def test_what_several_processes_cannot_do_is_said(tmp_path: Path, data_dir: Path) -> None:
    environment = {**TOGETHER, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "trainer", "--resume", "--out", str(tmp_path / "run"), "--data-dir", str(data_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert done.stderr.count("\n") == 1

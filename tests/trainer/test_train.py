"""The loop: the same bits for the same seed, and evaluations that leave no trace."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer import mnist, train
from trainer.errors import Terminated, UserError
from trainer.model import Net
from trainer.recipes import ARTICLE

RECIPE = dataclasses.replace(ARTICLE, evaluate_every=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a machine that is busy elsewhere wait for each other at every operation: a second per step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(data_dir: Path) -> mnist.Mnist:
    """Real digits, few enough for a run in a second: 1,000 to train on (an epoch of ten batches), 1,000 to test on."""
    full = mnist.load(data_dir)
    return mnist.Mnist(
        full.train_images[:1000], full.train_labels[:1000], full.test_images[:1000], full.test_labels[:1000]
    )


@pytest.fixture(scope="module")
def reference(data: mnist.Mnist) -> train.Trained:
    """12 eager iterations of seed 0: more than an epoch."""
    return train.train(RECIPE, data, seed=0, iterations=12, compiled=False)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_same_seed_gives_the_same_bits(data: mnist.Mnist, reference: train.Trained) -> None:
    torch.rand(7)  # whatever the global stream did before
    again = train.train(RECIPE, data, seed=0, iterations=12, compiled=False)
    assert same(reference.weights, again.weights)
    assert [e.loss for e in again.history] == [e.loss for e in reference.history]
    other = train.train(RECIPE, data, seed=1, iterations=12, compiled=False)
    assert not torch.equal(other.weights["classifier.0.weight"], reference.weights["classifier.0.weight"])


def test_the_history_of_a_run(reference: train.Trained) -> None:
    assert [evaluation.iteration for evaluation in reference.history] == [5, 10, 12], "every 5, and the last"
    assert reference.steps == 12
    assert reference.compile_seconds == 0
    assert [e.seconds for e in reference.history] == sorted(e.seconds for e in reference.history)
    assert reference.history[-1].loss < reference.history[0].loss
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in reference.weights.values())


def test_evaluations_leave_no_trace(data: mnist.Mnist, reference: train.Trained) -> None:
    """The article's listing evaluates in training mode: its test images move BatchNorm's statistics."""
    unseen = train.train(dataclasses.replace(RECIPE, evaluate_every=10_000), data, iterations=12, compiled=False)
    assert same(reference.weights, unseen.weights)
    # 12 batches of training, and none of the evaluations, went through the BatchNorms.
    assert int(reference.weights["features.5.num_batches_tracked"]) == 12


def test_the_recorded_accuracy_is_that_of_evaluation_mode(data: mnist.Mnist, reference: train.Trained) -> None:
    net = Net()
    net.load_state_dict(reference.weights)
    with torch.no_grad():
        logits = net.eval()(torch.from_numpy(mnist.normalise(data.test_images))[:, None])
    correct = (logits.argmax(1).numpy() == data.test_labels).mean()
    assert reference.history[-1].test_top1 == pytest.approx(100 * correct)
    assert 0 < reference.history[-1].test_top1 < 100


def test_it_is_the_articles_loop(data: mnist.Mnist, reference: train.Trained) -> None:
    """A loop as the article writes it, over the same batches and with the same kernels, gives the same bits."""
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4, weight_decay=1e-3, fused=True)
    images = torch.from_numpy(mnist.normalise(data.train_images))[:, None]
    labels = torch.from_numpy(data.train_labels)
    order = torch.Generator().manual_seed(0)
    batches = [*torch.randperm(1000, generator=order).split(100), *torch.randperm(1000, generator=order).split(100)]
    for chosen in batches[:12]:
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    assert same(reference.weights, net.state_dict())


def recorded_batches(
    monkeypatch: pytest.MonkeyPatch, data: mnist.Mnist, iterations: int, seed: int = 0
) -> list[list[int]]:
    """Which images each step saw, by index; the images are made to carry their index in two pixels."""
    images = data.train_images.copy()
    images[:, 0, 0], images[:, 0, 1] = np.arange(1000) // 256, np.arange(1000) % 256
    marked = dataclasses.replace(data, train_images=images)
    seen: list[list[int]] = []
    original = train._functions

    def spying(*arguments: object) -> tuple[train.LossOf, train.CorrectOf]:
        loss_of, correct_of = original(*arguments)  # type: ignore[arg-type]

        def spy(some_images: torch.Tensor, some_labels: torch.Tensor) -> torch.Tensor:
            pixels = ((some_images[:, 0, 0, :2] + 1) * 127.5).round().long()
            seen.append((pixels[:, 0] * 256 + pixels[:, 1]).tolist())
            assert some_labels.tolist() == [int(data.train_labels[index]) for index in seen[-1]]
            return loss_of(some_images, some_labels)

        return spy, correct_of

    monkeypatch.setattr(train, "_functions", spying)
    train.train(RECIPE, marked, iterations=iterations, seed=seed, compiled=False)
    return seen


def test_every_epoch_is_a_fresh_permutation(data: mnist.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_batches(monkeypatch, data, 20)
    first, second = ([index for batch in part for index in batch] for part in (seen[:10], seen[10:]))
    assert {len(batch) for batch in seen} == {100}
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    assert first != list(range(1000))


def test_compiling_leaves_no_trace(
    data: mnist.Mnist, reference: train.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling runs both functions once, with dropout and BatchNorm: taken back, or the bits would differ."""
    asked: list[Callable[..., object]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(function) or function)
    compiled = train.train(RECIPE, data, iterations=12, compiled=True)
    assert len(asked) == 2
    assert same(reference.weights, compiled.weights)
    assert [e.test_top1 for e in compiled.history] == [e.test_top1 for e in reference.history]


def test_where_compiling_fails_it_trains_eagerly_and_says_so(
    data: mnist.Mnist, reference: train.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: object, **options: object) -> Callable[..., torch.Tensor]:
        def fail(*arguments: object) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nand many lines more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(train, "COMPILE_FROM_ITERATIONS", 1)
    notes: list[str] = []
    trained = train.train(RECIPE, data, iterations=12, watcher=train.Watcher(note=notes.append))
    assert same(reference.weights, trained.weights)
    assert "training eagerly" in notes[-1]
    assert "no C++ compiler" in notes[-1]
    assert "\n" not in notes[-1]
    with pytest.raises(RuntimeError, match="no C"):
        train.train(RECIPE, data, iterations=12, compiled=True)


def test_a_short_run_is_not_compiled(data: mnist.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    notes: list[str] = []
    train.train(RECIPE, data, iterations=1, watcher=train.Watcher(note=notes.append))
    assert "too few" in notes[0]
    assert ARTICLE.iterations >= train.COMPILE_FROM_ITERATIONS, "the whole recipe is compiled"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_an_interrupt_hands_over_what_there_is(data: mnist.Mnist, stop: type[BaseException]) -> None:
    def watch(iteration: int, evaluation: train.Evaluation | None) -> None:
        if iteration == 7:
            raise stop

    with pytest.raises(train.Interrupted) as interrupted:
        train.train(RECIPE, data, iterations=12, compiled=False, watcher=train.Watcher(stepped=watch))
    partial = interrupted.value.partial
    assert interrupted.value.terminated == (stop is Terminated)
    assert partial.steps == 7
    assert [evaluation.iteration for evaluation in partial.history] == [5]
    shorter = train.train(RECIPE, data, iterations=7, compiled=False)
    assert same(shorter.weights, partial.weights)


def test_an_interrupt_while_compiling(data: mnist.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_compiler(function: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", interrupted_compiler)
    monkeypatch.setattr(train, "COMPILE_FROM_ITERATIONS", 1)
    with pytest.raises(KeyboardInterrupt):  # and not taken for a failure to compile
        train.train(RECIPE, data, iterations=12)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda") as refused:
        train.choose_device("cuda")
    assert refused.value.exit_code == 3
    assert "--device cpu" in str(refused.value)
    assert train.choose_device("auto") == train.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.choose_device("auto") == torch.device("cuda")
    assert train.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("default")  # what the compiler stack warns of is not this project's to mend
def test_rounding_is_that_of_bf16(compiled: bool) -> None:
    """To the nearest, ties to even, as torch's own conversion; over values of all magnitudes, and ties."""
    rounded = torch.compile(train._rounded_to_bf16) if compiled else train._rounded_to_bf16
    torch.manual_seed(0)
    values = torch.randn(100_000) * torch.exp2(torch.randint(-100, 100, (100_000,)).float())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])
    for tensor in (values, ties):
        assert torch.equal(rounded(tensor), tensor.bfloat16().float())


def test_bf16_rounds_the_operands_and_keeps_the_weights(
    data: mnist.Mnist, reference: train.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_has_bf16_arithmetic", lambda device: False)
    bf16 = train.train(RECIPE, data, iterations=12, precision="bf16", compiled=False)
    assert list(bf16.weights) == list(reference.weights)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in bf16.weights.values())
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in bf16.weights.values()), "trained in float32"
    assert not same(reference.weights, bf16.weights)
    # Eight significant bits: the same way down the loss, within a percent or so.
    assert [e.loss for e in bf16.history] == pytest.approx([e.loss for e in reference.history], rel=0.03)


def test_rounded_layers_compute_what_bf16_hardware_computes() -> None:
    """Against float64 arithmetic on numbers rounded by torch's own conversion, forward and backward."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().bfloat16().double()

    torch.manual_seed(0)
    convolution, norm, linear = (
        torch.nn.Conv2d(1, 5, 3, padding=1),
        torch.nn.BatchNorm2d(5).eval(),
        torch.nn.Linear(320, 4),
    )
    norm.running_mean.uniform_(-1, 1)
    layers = torch.nn.Sequential(convolution, torch.nn.ReLU(), norm, torch.nn.Flatten(), linear)
    train._round_to_bf16(layers)
    image, upstream = rounded(torch.randn(2, 1, 8, 8)), torch.randn(2, 4)
    logits = layers(image.float())
    logits.backward(upstream)

    weight, bias = convolution.weight.detach(), convolution.bias.detach().double()
    first = rounded(F.conv2d(image, rounded(weight), bias, padding=1))
    scale = (norm.running_var + norm.eps).double().rsqrt()
    normed = rounded((first.relu() - norm.running_mean.double()[:, None, None]) * scale[:, None, None])
    torch.testing.assert_close(
        logits.double(), rounded(F.linear(normed.flatten(1), rounded(linear.weight), linear.bias.detach().double()))
    )
    to_linear = rounded(upstream)
    torch.testing.assert_close(linear.weight.grad.double(), to_linear.T @ normed.flatten(1), rtol=1e-5, atol=1e-5)
    to_norm = (to_linear @ rounded(linear.weight)).reshape(2, 5, 8, 8)
    to_convolution = rounded(to_norm * scale[:, None, None] * (first > 0))
    expected = torch.nn.grad.conv2d_weight(image, weight.shape, to_convolution, padding=1)
    # A number on the brink between two bf16 values may be rounded to the other one: by 2^-8 of itself.
    torch.testing.assert_close(convolution.weight.grad.double(), expected, rtol=1e-3, atol=1e-3)


COMPILED = """
import dataclasses, sys, torch
from pathlib import Path
from trainer import mnist, recipes, train
full = mnist.load(Path(sys.argv[1]))
data = mnist.Mnist(full.train_images[:1000], full.train_labels[:1000], full.test_images[:1000], full.test_labels[:1000])
recipe = dataclasses.replace(recipes.ARTICLE, evaluate_every=5)
prepared = train.prepare(recipe, data, precision=sys.argv[3], note=print)
trained = train.run(prepared, 12)
torch.save(trained.weights, sys.argv[2])
print([evaluation.test_top1 for evaluation in trained.history], [evaluation.loss for evaluation in trained.history])
"""


def compiled_run(
    data_dir: Path, out: Path, precision: str, cache: Path, **environment: str
) -> tuple[str, dict[str, torch.Tensor]]:
    """12 compiled iterations in a process of their own: what it prints last, and the weights."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(data_dir), str(out), precision],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("precision", train.PRECISIONS)
def test_compiled_bits_do_not_depend_on_the_cache(
    data_dir: Path, tmp_path: Path, precision: str, reference: train.Trained
) -> None:
    cold, one = compiled_run(data_dir, tmp_path / "one.pt", precision, tmp_path / "cache")
    warm, two = compiled_run(data_dir, tmp_path / "two.pt", precision, tmp_path / "cache")
    assert "eagerly" not in cold
    assert cold == warm
    assert same(one, two)
    # Dropout draws from another stream when compiled; the way down the loss is the same.
    losses = [float(loss) for loss in cold.strip().split("[")[-1].rstrip("]").split(",")]
    assert losses == pytest.approx([e.loss for e in reference.history], rel=0.1)


@pytest.mark.slow
def test_without_a_compiler(data_dir: Path, tmp_path: Path, reference: train.Trained) -> None:
    """The bits of an eager run, and a sentence: with a compiler that isn't there."""
    said, weights = compiled_run(
        data_dir, tmp_path / "one.pt", "float32", tmp_path / "cache", CXX="/nonexistent/c++", OMP_NUM_THREADS="1"
    )
    assert "training eagerly" in said
    assert same(reference.weights, weights)

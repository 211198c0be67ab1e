"""The loop: the same bits for the same seed, evaluations that leave no trace, and how a run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer import compiling, mnist, precision, train
from trainer.errors import UserError
from trainer.history import Trained
from trainer.model import Net
from trainer.recipes import ARTICLE, AUGMENTED, RECIPES, OneCycle, Recipe, Settings
from trainer.step import Images, Step

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def with_recipe(settings: Settings, **numbers: object) -> Settings:
    return dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, **numbers))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_bits(data: mnist.Mnist, settings: Settings, reference: Trained) -> None:
    torch.rand(7)  # whatever the global stream did before
    again = train.train(settings, data, compiled=False)
    assert same(reference.weights, again.weights)
    assert [e.loss for e in again.history] == [e.loss for e in reference.history]
    other = train.train(dataclasses.replace(settings, seed=1), data, compiled=False)
    assert not torch.equal(other.weights["classifier.0.weight"], reference.weights["classifier.0.weight"])


def test_the_history_of_a_run(reference: Trained) -> None:
    assert [evaluation.iteration for evaluation in reference.history] == [5, 10, 12], "every 5, and the last"
    assert reference.steps == 12
    assert reference.compile_seconds == 0
    assert reference.test_top1 == reference.history[-1].top1
    assert [e.seconds for e in reference.history] == sorted(e.seconds for e in reference.history)
    assert 0 < reference.evaluation_seconds < reference.seconds
    assert reference.history[-1].loss < reference.history[0].loss
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in reference.weights.values())


def test_evaluations_leave_no_trace(data: mnist.Mnist, settings: Settings, reference: Trained) -> None:
    """The article's listing evaluates in training mode: its test images move BatchNorm's statistics."""
    unseen = train.train(with_recipe(settings, evaluate_every=None), data, compiled=False)
    assert [evaluation.iteration for evaluation in unseen.history] == [12], "the last, and no other"
    assert same(reference.weights, unseen.weights)
    # 12 batches of training, and none of the evaluations, went through the BatchNorms.
    assert int(reference.weights["features.5.num_batches_tracked"]) == 12


def test_the_recorded_accuracy_is_that_of_evaluation_mode(data: mnist.Mnist, reference: Trained) -> None:
    net = Net()
    net.load_state_dict(reference.weights)
    assert reference.history[-1].top1 == pytest.approx(top1(net, data.test_images, data.test_labels))
    assert 0 < reference.history[-1].top1 < 100


def top1(net: Net, images: np.ndarray, labels: np.ndarray) -> float:  # type: ignore[type-arg]
    with torch.no_grad():
        logits = net.eval()(torch.from_numpy(mnist.normalise(images))[:, None])
    return 100 * float((logits.argmax(1).numpy() == labels).mean())


def literal_loop(data: mnist.Mnist, recipe: Recipe, steps: int) -> tuple[Net, dict[str, torch.Tensor]]:
    """A loop as a textbook writes it, over the same batches, with torch's own average: its network and the average."""
    torch.manual_seed(0)
    net = Net(recipe.dropout).to(memory_format=torch.channels_last)
    adam = torch.optim.AdamW if recipe.decoupled else torch.optim.Adam
    optimizer = adam(net.parameters(), 1.0, recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    rates = recipe.learning_rates(steps)
    mean = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.from_numpy(mnist.normalise(data.train_images))[:, None]
    labels = torch.from_numpy(data.train_labels)
    order = torch.Generator().manual_seed(0)
    size = recipe.batch_size
    batches = [batch for _ in range(2) for batch in torch.randperm(1000, generator=order).split(size)]
    for step, chosen in enumerate(batches[:steps]):
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen], label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        decay = min(recipe.averaging or 0.0, (1 + step) / (10 + step))
        for name, tensor in net.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    return net, mean


def test_it_is_the_articles_loop(data: mnist.Mnist, reference: Trained) -> None:
    """A loop as the article writes it, over the same batches and with the same kernels, gives the same bits."""
    net, _ = literal_loop(data, ARTICLE, 12)
    assert same(reference.weights, net.state_dict())


def test_every_other_number_of_a_recipe_is_followed(data: mnist.Mnist) -> None:
    """One cycle, AdamW, less dropout, smoothed labels and averaged weights, against a textbook's loop."""
    recipe = dataclasses.replace(
        ARTICLE,
        learning_rate=1e-3,
        weight_decay=0.5,
        decoupled=True,
        betas=(0.8, 0.95),
        one_cycle=OneCycle(climb_share=0.5, final_share=0.1, fall="cosine"),
        label_smoothing=0.2,
        dropout=0.1,
        averaging=0.6,
    )
    trained = train.train(Settings(recipe, iterations=12), data, compiled=False)
    net, mean = literal_loop(data, recipe, 12)
    assert not same(mean, net.state_dict())
    for name, tensor in trained.weights.items():
        torch.testing.assert_close(tensor, mean[name], msg=lambda text, name=name: f"{name}: {text}")
    net.load_state_dict(mean)
    assert trained.test_top1 == pytest.approx(top1(net, data.test_images, data.test_labels)), "the average is evaluated"


def test_the_last_batch_of_an_epoch_is_full_or_left_out(data: mnist.Mnist, settings: Settings) -> None:
    fewer = dataclasses.replace(data, train_images=data.train_images[:950], train_labels=data.train_labels[:950])
    trained = train.train(dataclasses.replace(with_recipe(settings, epochs=1), iterations=None), fewer, compiled=False)
    assert trained.steps == 9


def recorded_batches(
    monkeypatch: pytest.MonkeyPatch, data: mnist.Mnist, settings: Settings, done: int = 0
) -> list[list[int]]:
    """Which images each step sees, by index, after the first `done`; nothing is computed with them."""
    seen: list[list[int]] = []

    def spy(step: Step) -> torch.Tensor:
        seen.append(step.batch.tolist())
        return torch.zeros(())

    monkeypatch.setattr(Step, "__call__", spy)
    progress = train.Progress(iteration=done)
    train.run(train.prepare(settings, data, compiled=False), progress=progress)
    return seen


def test_every_epoch_is_a_fresh_permutation(
    data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(settings, iterations=25)
    seen = recorded_batches(monkeypatch, data, settings)
    first, second = ([index for batch in part for index in batch] for part in (seen[:10], seen[10:20]))
    assert {len(batch) for batch in seen} == {100}
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    assert first != list(range(1000))
    for done in (7, 10, 23):
        assert recorded_batches(monkeypatch, data, settings, done) == seen[done:], "going on in the midst of it"


def test_a_batch_is_the_images_it_names(data: mnist.Mnist, settings: Settings) -> None:
    """What the step computes of indices is the loss of these images, normalised as `mnist.normalise` does."""
    training = Images.on(CPU, data.train_images, data.train_labels)
    step = Step(settings, training, 12)
    chosen = torch.tensor([3, 999, 0, 512])
    torch.manual_seed(5)  # dropout
    loss = step.loss_of(chosen)
    torch.manual_seed(5)
    images = torch.from_numpy(mnist.normalise(data.train_images[chosen.numpy()]))[:, None]
    expected = F.cross_entropy(step.model(images), torch.from_numpy(data.train_labels[chosen.numpy()]))
    assert torch.equal(loss, expected)


def test_compiling_leaves_no_trace(
    data: mnist.Mnist, settings: Settings, reference: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling runs a whole step and an evaluation: taken back, or the bits would differ."""
    asked: list[Callable[..., object]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(function) or function)
    monkeypatch.setattr(compiling, "rewritten", lambda model: contextlib.nullcontext())  # they sum up in another order
    compiled = train.train(settings, data, compiled=True)
    assert len(asked) == 2
    assert compiled.execution == "compiled"
    assert same(reference.weights, compiled.weights)
    assert [e.top1 for e in compiled.history] == [e.top1 for e in reference.history]


def test_a_compiled_step_has_rewritten_layers(
    data: mnist.Mnist, settings: Settings, reference: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    prepared = train.prepare(settings, data, compiled=True)
    assert sum("forward" in vars(layer) for layer in prepared.step.model.modules()) == 5  # three BatchNorms, two pools
    trained = train.run(prepared)
    assert not same(reference.weights, trained.weights)
    assert [e.loss for e in trained.history] == pytest.approx([e.loss for e in reference.history], rel=1e-2)


def test_where_compiling_fails_it_trains_eagerly_and_says_so(
    data: mnist.Mnist, settings: Settings, reference: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: object, **options: object) -> Callable[..., torch.Tensor]:
        def fail(*arguments: object) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nand many lines more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(train, "COMPILE_FROM_ITERATIONS", 1)
    notes: list[str] = []
    trained = train.train(settings, data, watcher=train.Watcher(note=notes.append))
    assert same(reference.weights, trained.weights)
    assert trained.execution == "eager"
    assert "training eagerly" in notes[-1]
    assert "no C++ compiler" in notes[-1]
    assert "\n" not in notes[-1]
    with pytest.raises(RuntimeError, match="no C"):
        train.train(settings, data, compiled=True)


def test_a_short_run_is_not_compiled(data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    notes: list[str] = []
    train.train(dataclasses.replace(settings, iterations=1), data, watcher=train.Watcher(note=notes.append))
    assert "too few" in notes[0]
    compiled = {
        name for name, recipe in RECIPES.items() if Settings(recipe).steps(60_000) >= train.COMPILE_FROM_ITERATIONS
    }
    assert compiled == {"article", "augmented"}


def test_an_interrupt_while_compiling(data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_compiler(function: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", interrupted_compiler)
    monkeypatch.setattr(train, "COMPILE_FROM_ITERATIONS", 1)
    with pytest.raises(KeyboardInterrupt):  # and not taken for a failure to compile
        train.train(settings, data)


def test_validation_images_are_neither_trained_on_nor_the_test(
    data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = dataclasses.replace(
        settings, validation=300, iterations=None, recipe=dataclasses.replace(ARTICLE, epochs=1)
    )
    prepared = train.prepare(split, data, compiled=False)
    assert (len(prepared.training), len(prepared.evaluation), len(prepared.test)) == (700, 300, 1000)
    assert prepared.iterations == 7
    every = torch.cat([prepared.training.pixels, prepared.evaluation.pixels]).flatten(1)
    original = torch.from_numpy(data.train_images).flatten(1)
    assert torch.equal(every.unique(dim=0), original.unique(dim=0)), "together they are all, none twice"
    again = train.prepare(dataclasses.replace(split, seed=5), data, compiled=False)
    assert torch.equal(again.evaluation.pixels, prepared.evaluation.pixels), "the same for every seed"

    trained = train.run(prepared)
    net = Net()
    net.load_state_dict(trained.weights)
    held_out = prepared.evaluation.pixels[:, 0].numpy(), prepared.evaluation.labels.numpy()
    assert trained.history[-1].top1 == pytest.approx(top1(net, *held_out))
    assert trained.test_top1 == pytest.approx(top1(net, data.test_images, data.test_labels))


def test_early_stopping_keeps_the_best_weights(
    data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies are made up: 3 %, then 5 %, and 5 % and 4 % after it."""
    counts = iter([3, 5, 5, 4, 9])
    monkeypatch.setattr(train, "_top1", lambda prepared: float(next(counts)))
    notes: list[str] = []
    stopping = dataclasses.replace(with_recipe(settings, evaluate_every=2), validation=100, early_stop=2)
    trained = train.train(stopping, data, compiled=False, watcher=train.Watcher(note=notes.append))
    assert [e.iteration for e in trained.history] == [2, 4, 6, 8], "two evaluations after the best"
    assert trained.steps == 4
    assert "stopped early" in notes[-1]
    shorter = dataclasses.replace(stopping, iterations=4, early_stop=None)
    counts = iter([1, 1])
    assert same(train.train(shorter, data, compiled=False).weights, trained.weights)


def test_numbers_that_are_none_end_the_run(data: mnist.Mnist, settings: Settings) -> None:
    with pytest.raises(UserError, match="NaN") as ended:
        train.train(with_recipe(settings, learning_rate=1e30), data, compiled=False)
    assert ended.value.exit_code == 1
    assert "not later than iteration 5" in str(ended.value)
    assert "nothing was saved" in str(ended.value)


def test_bending_is_followed_by_training_and_not_by_evaluating(data: mnist.Mnist, settings: Settings) -> None:
    bent = with_recipe(settings, augmentation=AUGMENTED.augmentation)
    training = Images.on(CPU, data.train_images, data.train_labels)
    step = Step(bent, training, 12)
    step.model.eval()  # no dropout
    chosen = torch.arange(50)
    assert step.loss_of(chosen) != step.loss_of(chosen)
    assert step.correct(training) == step.correct(training)


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


COMPILED = """
import dataclasses, sys, torch
from pathlib import Path
from trainer import mnist, recipes, train
full = mnist.load(Path(sys.argv[1]))
data = mnist.Mnist(full.train_images[:1000], full.train_labels[:1000], full.test_images[:1000], full.test_labels[:1000])
recipe = dataclasses.replace(recipes.ARTICLE, evaluate_every=5)
settings = recipes.Settings(recipe, iterations=12, precision=sys.argv[3])
trained = train.run(train.prepare(settings, data, note=print))
torch.save(trained.weights, sys.argv[2])
print([evaluation.top1 for evaluation in trained.history], [evaluation.loss for evaluation in trained.history])
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
@pytest.mark.parametrize("precision", precision.PRECISIONS)
def test_compiled_bits_do_not_depend_on_the_cache(
    data_dir: Path, tmp_path: Path, precision: str, reference: Trained
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
def test_without_a_compiler(data_dir: Path, tmp_path: Path, reference: Trained) -> None:
    """The bits of an eager run, and a sentence: with a compiler that isn't there."""
    said, weights = compiled_run(
        data_dir, tmp_path / "one.pt", "float32", tmp_path / "cache", CXX="/nonexistent/c++", OMP_NUM_THREADS="1"
    )
    assert "training eagerly" in said
    assert same(reference.weights, weights)


def test_a_step_that_cannot_be_captured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object, step: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand a second line")

    monkeypatch.setattr("trainer.capture.capture", refuse)
    with pytest.raises(UserError, match=r"graph: operation not permitted when stream is capturing\. Look") as caught:
        train._captured(None, None)
    assert caught.value.exit_code == 3

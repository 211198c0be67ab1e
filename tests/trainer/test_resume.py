"""An unfinished run goes on to the bits that it would have come to, and never as another."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import safetensors
import torch

from trainer import mnist, publish, train
from trainer.errors import Interrupted, UserError
from trainer.history import Evaluation, Trained
from trainer.precision import PRECISIONS
from trainer.recipes import ARTICLE, AUGMENTED, Settings
from trainer.resume import Saving

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dataclasses.replace(AUGMENTED, batch_size=50, averaging=0.9, evaluate_every=5)


def interrupted_at(
    iteration: int,
    settings: Settings,
    data: mnist.Mnist,
    saving: Saving,
    number: int = signal.SIGINT,
    compiled: bool = False,
) -> Interrupted:
    """A run that gets a signal in the midst of its work."""

    def watch(done: int, evaluation: Evaluation | None) -> None:
        if done == iteration:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as interrupted:
        train.train(settings, data, compiled=compiled, saving=saving, watcher=train.Watcher(stepped=watch))
    return interrupted.value


def facts(trained: Trained) -> list[tuple[object, ...]]:
    return [(e.iteration, e.loss, e.top1) for e in trained.history]


def assert_same(one: Trained, other: Trained) -> None:
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name
    assert facts(one) == facts(other)
    assert (one.steps, one.test_top1) == (other.steps, other.test_top1)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(dataclasses.replace(ARTICLE, evaluate_every=5), iterations=14),
        Settings(SMALL, iterations=14, validation=300, early_stop=50, seed=4),
    ],
    ids=["article", "augmented, validated"],
)
def test_a_run_interrupted_twice_ends_with_the_same_bits(settings: Settings, data: mnist.Mnist, tmp_path: Path) -> None:
    """In the first epoch, and after an epoch's end; dropout, bending, averages and the order go on."""
    whole = train.train(settings, data, compiled=False)
    saving = Saving(tmp_path / "run", resume=True)
    first = interrupted_at(6, settings, data, saving)
    assert (first.steps, first.saved, first.terminated) == (6, 6, False)
    second = interrupted_at(12, settings, data, saving, signal.SIGTERM)
    assert (second.steps, second.saved, second.terminated) == (12, 12, True)
    notes: list[str] = []
    gone_on = train.train(settings, data, compiled=False, saving=saving, watcher=train.Watcher(note=notes.append))
    assert_same(whole, gone_on)
    assert any("iteration 12" in note for note in notes)
    assert gone_on.seconds >= gone_on.history[-1].seconds
    assert [e.seconds for e in gone_on.history] == sorted(e.seconds for e in gone_on.history)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("default")  # what the compiler stack warns of is not this project's to mend
def test_a_compiled_run_interrupted_ends_with_the_same_bits(precision: str, data: mnist.Mnist, tmp_path: Path) -> None:
    settings = Settings(SMALL, iterations=14, precision=precision)
    whole = train.train(settings, data, compiled=True)
    saving = Saving(tmp_path / "run", resume=True)
    assert interrupted_at(6, settings, data, saving, compiled=True).saved == 6
    gone_on = train.train(settings, data, compiled=True, saving=saving)
    assert gone_on.execution == "compiled"
    assert_same(whole, gone_on)


def test_saves_on_the_way_change_nothing(
    data: mnist.Mnist, settings: Settings, reference: Trained, tmp_path: Path
) -> None:
    saving = Saving(tmp_path / "run", every_s=0)
    assert_same(train.train(settings, data, compiled=False, saving=saving), reference)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    saved = json.loads(safetensors.safe_open(saving.path, "pt").metadata()["ninefold-unfinished"])
    assert saved["progress"]["iteration"] == 12
    # Of the last iteration: there is nothing left to do, and the same comes out.
    again = train.train(settings, data, compiled=False, saving=dataclasses.replace(saving, resume=True))
    assert_same(again, reference)


def test_saves_are_made_when_it_is_time(data: mnist.Mnist, settings: Settings, tmp_path: Path) -> None:
    train.train(settings, data, compiled=False, saving=Saving(tmp_path / "run", every_s=3600))
    assert not list(tmp_path.iterdir())


def test_nothing_to_go_on_from(data: mnist.Mnist, settings: Settings, reference: Trained, tmp_path: Path) -> None:
    notes: list[str] = []
    saving = Saving(tmp_path / "run", resume=True)
    trained = train.train(settings, data, compiled=False, saving=saving, watcher=train.Watcher(note=notes.append))
    assert_same(trained, reference)
    assert "from the beginning" in notes[0]


OTHERS = {
    "seed": {"seed": 1},
    "precision": {"precision": "bf16"},
    "iterations": {"iterations": 30},
    "validation": {"validation": 100},
    "recipe.name": {"recipe": SMALL},
    "recipe.learning_rate": {"recipe": dataclasses.replace(ARTICLE, evaluate_every=5, learning_rate=1e-3)},
}


@pytest.fixture(scope="module")
def unfinished(
    one_thread: None, data: mnist.Mnist, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path: Path = tmp_path_factory.mktemp("saves") / "run"
    interrupted_at(1, settings, data, Saving(path))
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_with_the_difference_named(
    name: str, unfinished: Path, data: mnist.Mnist, settings: Settings
) -> None:
    before = unfinished.read_bytes()
    other = dataclasses.replace(settings, **OTHERS[name])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another run") as refused:
        train.train(other, data, compiled=False, saving=Saving(unfinished, resume=True))
    assert refused.value.exit_code == 4
    assert f"{name} was " in str(refused.value)
    assert str(refused.value).count(" was ") == 1
    assert unfinished.read_bytes() == before


def test_other_data_are_refused(unfinished: Path, data: mnist.Mnist, settings: Settings) -> None:
    images = data.train_images.copy()
    images[5, 5, 5] ^= 1
    with pytest.raises(UserError, match="data was "):
        train.train(settings, dataclasses.replace(data, train_images=images), saving=Saving(unfinished, resume=True))


@pytest.mark.parametrize("content", [b"", b"something else", None], ids=["empty", "foreign", "cut short"])
def test_a_file_that_is_no_save(
    content: bytes | None, unfinished: Path, data: mnist.Mnist, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.write_bytes(unfinished.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="no save of an unfinished run") as refused:
        train.train(settings, data, compiled=False, saving=Saving(path, resume=True))
    assert refused.value.exit_code == 4


def test_what_may_change_the_last_bits_is_told(
    unfinished: Path, data: mnist.Mnist, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    notes: list[str] = []
    saving = Saving(unfinished, resume=True)
    train.train(settings, data, compiled=False, saving=saving, watcher=train.Watcher(note=notes.append))
    assert any("threads was 1 and is 7 now" in note for note in notes)


def test_a_save_that_fails_does_not_end_the_run(
    data: mnist.Mnist, settings: Settings, reference: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the second save and all later ones fail; the first stays, and nothing else lies about."""
    original, calls = publish.os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the file and its folder, once
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(publish.os, "fsync", full)
    notes: list[str] = []
    saving = Saving(tmp_path / "run", every_s=0)
    trained = train.train(settings, data, compiled=False, saving=saving, watcher=train.Watcher(note=notes.append))
    assert_same(trained, reference)
    failed = [note for note in notes if "No space left" in note]
    assert len(failed) == 11
    assert "training goes on, that of iteration 1 stays" in failed[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    assert interrupted_at(3, settings, data, dataclasses.replace(saving, resume=True)).saved == 3


def test_numbers_that_are_none_never_take_the_place_of_a_good_save(
    data: mnist.Mnist, settings: Settings, tmp_path: Path
) -> None:
    """The learning rate explodes at step 7; the loss would be seen at iteration 10, the save at 7 sees the weights."""

    def watch(done: int, evaluation: Evaluation | None) -> None:
        if done == 6:
            prepared.step.table[6:] = 1e38

    prepared = train.prepare(settings, data, compiled=False)
    saver = train.resume.Saver(Saving(tmp_path / "run", every_s=0), lambda: {}, "eager", print, None)
    with pytest.raises(UserError, match="NaN") as ended:
        train.run(prepared, train.Watcher(stepped=watch), saver)
    assert ended.value.exit_code == 1
    assert f"the last good save, of iteration {saver.last}, is in {saver.path}" in str(ended.value)
    assert saver.last is not None
    assert 6 <= saver.last < 10
    with safetensors.safe_open(saver.path, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118

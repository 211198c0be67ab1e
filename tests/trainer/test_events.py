"""TensorBoard finds the history again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trainer import events
from trainer.errors import UserError
from trainer.history import Evaluation


def test_without_tensorboard_it_is_told_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install") as refused:
        events.require()
    assert refused.value.exit_code == 3


@pytest.mark.filterwarnings("default")  # what tensorboard's own imports warn of is not this project's to mend
def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events.require()
    history = [Evaluation(50, 0.5, 97.25, 2.0), Evaluation(100, 0.25, 98.5, 5.0)]
    events.write(history, "validation", tmp_path)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "validation_top1"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(50, 0.5), (100, 0.25)]
    first, second = read.Scalars("validation_top1")
    assert (first.value, second.value) == (97.25, 98.5)
    assert second.wall_time - first.wall_time == pytest.approx(3.0, abs=0.01)

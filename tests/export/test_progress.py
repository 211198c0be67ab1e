"""What is said while something takes long."""

from __future__ import annotations

import time

import pytest

from export.progress import Progress


def test_a_long_step_says_how_far_it_is_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.progress.WORTH_S", 0.05)
    said: list[str] = []
    with Progress(said.append, every_s=0.1).step("checking model.onnx", 30) as advance:
        assert said == ["checking model.onnx"], "before anything is done"
        advance(20)
        time.sleep(0.15)
    assert said[1] == "  checking model.onnx: 20 of 30 inputs, 0 s so far"
    assert said[-1] == "  checking model.onnx: done in 0.2 s"


def test_a_short_step_is_one_line() -> None:
    said: list[str] = []
    with Progress(said.append).step("writing model.ts"):
        pass
    assert said == ["writing model.ts"]


def test_a_step_that_fails_ends_its_thread() -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError), Progress(said.append, every_s=0.01).step("folding"):
        raise RuntimeError
    lines = len(said)
    time.sleep(0.05)
    assert len(said) == lines

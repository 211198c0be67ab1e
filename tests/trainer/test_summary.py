"""Several runs, summed up from what they wrote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from trainer import checkpoint, cli, summary
from trainer.errors import UserError


def write_run(folder: Path, seed: int, top1: list[float]) -> Path:
    """A training folder whose evaluations, every 50 iterations, were `top1`."""
    folder.mkdir(parents=True)
    facts = checkpoint.CheckpointMetadata(
        model="trainer.model:Net",
        recipe="article",
        seed=seed,
        steps=50 * len(top1),
        test_top1=top1[-1],
        precision="float32",
        preprocessing=checkpoint.PixelScaling(scale=1 / 255, mean=0.5, std=0.5),
        versions={"torch": "9.9"},
        git_commit=None,
    )
    checkpoint.save(folder / "checkpoint.safetensors", {"weight": torch.zeros(3)}, facts)
    lines = [
        {"iteration": 50 * n, "loss": 1 / n, "test_top1": value, "seconds": 2.0 * n} for n, value in enumerate(top1, 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_run(tmp_path: Path) -> None:
    run = summary.read_run(write_run(tmp_path / "s", 3, [90.0, 99.2, 98.0, 99.2, 98.9]))
    assert (run.seed, run.iterations, run.final_test_top1) == (3, 250, 98.9)
    assert (run.best_test_top1, run.best_iteration) == (99.2, 100), "the first of the best"
    assert run.seconds == 10.0
    assert run.touches


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / "b", 1, [90.0, 98.5]), write_run(tmp_path / "a", 0, [90.0, 99.1])]
    file = tmp_path / "deep" / "runs.json"
    arguments = ["summary", *map(str, folders), "--json", str(file), "--note", "shared machine"]
    monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capsys.readouterr().out
    assert re.search(r"mean final top-1 98\.800 % \(n = 2, 98\.50 to 99\.10\); 1 of 2 touch 99 %", out)
    document = json.loads(file.read_text())
    assert [run["seed"] for run in document["runs"]] == [0, 1], "by seed, however they were named"
    assert document["mean_final_test_top1"] == 98.8
    assert document["machine"]["cpu"]
    assert document["machine"]["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["date"])
    assert document["note"] == "shared machine"


@pytest.mark.parametrize(
    "history",
    [None, "", "no json\n", '{"iteration": 50}\n', '{"iteration": 50, "test_top1": 9, "seconds": 1}\n'],
    ids=["missing", "empty", "no JSON", "incomplete lines", "cut short"],
)
def test_a_history_that_does_not_fit(tmp_path: Path, history: str | None) -> None:
    folder = write_run(tmp_path / "s", 0, [90.0, 98.0])
    path = folder / "history.jsonl"
    if history is None:
        path.unlink()
    else:
        path.write_text(history)
    with pytest.raises(UserError, match=r"history\.jsonl"):
        summary.read_run(folder)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        summary.read_run(tmp_path)

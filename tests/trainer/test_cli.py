"""The command, as its user meets it: files, lines, exit codes, interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors

from trainer import checkpoint, cli, mnist, recipes
from trainer.errors import Terminated

FILES = ["checkpoint.safetensors", "curves.png", "digits.png", "history.jsonl"]
# Where the machine is busy elsewhere, two threads wait for each other at every operation: one, or at least no spinning.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
DEFAULT_THREADS = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command sets signal handlers for its own process: the tests' process gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["trainer", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "trainer", *(str(argument) for argument in arguments)]


def paragraph(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr, which must be one paragraph and no traceback."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def publish_something(folder: Path) -> bytes:
    """An earlier training folder; returns its checkpoint."""
    folder.mkdir(parents=True)
    (folder / checkpoint.FILE_NAME).write_bytes(b"an earlier one")
    return b"an earlier one"


def run_on_a_terminal(arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """A process whose stderr is a terminal: exit code, stdout, and what the terminal got."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    shown = bytearray()
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, shown.decode()


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_a_run_from_nothing(tmp_path: Path, data_dir: Path) -> None:
    """Twice, as real processes with default threads: the files that come out, what is said, and the same bits."""
    one, two = (tmp_path / "deep" / name for name in ("one", "two"))
    given = ["--iterations", 5, "--seed", 7, "--data-dir", data_dir]
    done = subprocess.run(
        command(*given, "--out", one), capture_output=True, text=True, timeout=120, check=False, env=DEFAULT_THREADS
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet where stderr is no terminal"
    terminal = DEFAULT_THREADS | {"TERM": "xterm", "COLUMNS": "150", "PYTHONHASHSEED": "1"}
    code, stdout, shown = run_on_a_terminal(command(*given, "--out", two), terminal)
    assert code == 0
    for part in ("5/5", "loss", "top-1", "images/s"):
        assert part in shown, "a bar where stderr is a terminal"
    for text in (done.stdout, stdout):
        assert re.search(r"iteration +5 +loss \d\.\d+ +test top-1 \d+\.\d\d %", text)
        assert re.search(r"test top-1 .* after 5 iterations; best .* at iteration 5; [\d.]+ s of training", text)
    assert f"saved in {one}" in done.stdout

    assert sorted(path.name for path in one.iterdir()) == FILES
    assert sorted(path.name for path in one.parent.iterdir()) == ["one", "two"]
    assert (one / checkpoint.FILE_NAME).read_bytes() == (two / checkpoint.FILE_NAME).read_bytes()

    weights, facts = checkpoint.load(one / checkpoint.FILE_NAME)
    assert len(weights) == 29
    assert (facts.model, facts.recipe, facts.seed, facts.steps) == ("trainer.model:Net", "article", 7, 5)
    assert facts.precision == "float32"
    assert (facts.preprocessing.scale, facts.preprocessing.mean) == (float(mnist.SCALE), 0.5)
    assert {"ninefold", "numpy", "python", "torch"} <= set(facts.versions)
    assert facts.git_commit is None or re.fullmatch(r"[0-9a-f]{40}", facts.git_commit)
    history = [json.loads(line) for line in (one / "history.jsonl").read_text().splitlines()]
    assert [set(line) for line in history] == [{"iteration", "loss", "test_top1", "seconds"}]
    assert history[-1]["test_top1"] == facts.test_top1
    assert 5 < history[-1]["test_top1"] < 100


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupt_saves_the_run_and_leaves_what_was(
    tmp_path: Path, data_dir: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "article"
    earlier = publish_something(out)
    program = (  # the command, with a line after every fifth iteration: the test waits for the first
        "import dataclasses; from trainer import cli, recipes; "
        "recipes.RECIPES['article'] = dataclasses.replace(recipes.ARTICLE, evaluate_every=5, print_every=5); cli.main()"
    )
    training = subprocess.Popen(
        [sys.executable, "-c", program, "--iterations", "700", "--out", str(out), "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        start_new_session=True,
    )
    assert training.stdout is not None
    for line in training.stdout:
        if line.startswith("iteration"):
            break
    began = time.perf_counter()
    os.killpg(training.pid, number)  # to the whole group, as a terminal does
    _, stderr = training.communicate(timeout=60)
    assert time.perf_counter() - began < 10, "about a second on a machine that is not busy"
    assert training.returncode == code, stderr
    steps = int(re.search(r"after (\d+) iterations", stderr).group(1))  # type: ignore[union-attr]
    assert steps >= 5
    kept = tmp_path / "article.unfinished.safetensors"
    assert str(kept) in stderr
    assert "--resume" in stderr
    assert stderr.count("\n") == 1, "one paragraph"
    assert (out / checkpoint.FILE_NAME).read_bytes() == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["article", kept.name]
    assert f"goes on from iteration {steps}" in stderr
    with safetensors.safe_open(kept, "np") as file:
        assert int(file.get_tensor("model/features.5.num_batches_tracked")) == steps


KILLED = """
import os, signal, sys
from trainer import cli
replace, saves = os.replace, 0

def kill_at_the_third(source, target):
    global saves
    saves += 1
    if saves == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = kill_at_the_third
cli.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.usefixtures("one_thread")
def test_killed_and_resumed(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it saves, just before the new save takes the place of the old one."""
    given = ["--iterations", "4", "--data-dir", data_dir, "--save-every", "0"]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command_line = [str(argument) for argument in (*given, "--out", out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command_line], env=ONE_THREAD, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    for name in tmp_path.glob(".killed.building-*"):
        name.rmdir()  # it would be removed by a later run, after a minute

    assert run(monkeypatch, *given, "--resume", "--seed", "1", "--out", out) == 4
    assert "seed was 0 and is 1 now" in paragraph(capsys)
    assert run(monkeypatch, *given, "--resume", "--out", out) == 0
    assert "going on from iteration 2" in capsys.readouterr().out
    assert run(monkeypatch, *given, "--out", whole) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    assert (out / checkpoint.FILE_NAME).read_bytes() == (whole / checkpoint.FILE_NAME).read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_validation_and_early_stopping(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learning_nothing = dataclasses.replace(recipes.ARTICLE, evaluate_every=1, learning_rate=0.0)
    monkeypatch.setitem(recipes.RECIPES, "article", learning_nothing)
    given = ["--early-stop", "2", "--iterations", "20", "--out", tmp_path / "run", "--data-dir", data_dir]
    assert run(monkeypatch, *given, "--validation", "500") == 0
    out = capsys.readouterr().out
    assert "stopped early" in out
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [set(line) for line in history] == [{"iteration", "loss", "validation_top1", "seconds"}] * len(history)
    facts = checkpoint.read_metadata(tmp_path / "run" / checkpoint.FILE_NAME)
    assert f"test top-1 {facts.test_top1:.2f} % after {facts.steps} iterations" in out
    best = max(history, key=lambda line: line["validation_top1"])
    assert (facts.steps, len(history)) == (best["iteration"], best["iteration"] + 2)


@pytest.mark.usefixtures("one_thread")
def test_measuring_a_recipe(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learning = dataclasses.replace(recipes.ARTICLE, evaluate_every=None, learning_rate=1e-3)
    monkeypatch.setitem(recipes.RECIPES, "fast", learning)
    stored = tmp_path / "deep" / "fast.json"
    given = ["measure", "--recipe", "fast", "--seeds", 2, "--first-seed", 3, "--iterations", 4, "--device", "cpu"]
    assert run(monkeypatch, *given, "--target", 99, "--data-dir", data_dir, "--out", stored) == 1
    out = capsys.readouterr().out
    assert "target 99 % missed (p = " in out
    found = json.loads(stored.read_text())
    assert [seed["seed"] for seed in found["seeds"]] == [3, 4]
    for seed in found["seeds"]:
        parts = [seed[f"{part}_seconds"] for part in ("setup", "compile", "training", "evaluation")]
        assert seed["total_seconds"] == pytest.approx(sum(parts))
        assert min(parts[0], parts[2], parts[3]) > 0
        assert f"seed {seed['seed']:>3}   test top-1 {seed['test_top1_percent']:.2f} %" in out
    # This process has imported torch and run tests before: the first seed counts from its start.
    assert found["seeds"][0]["setup_seconds"] > found["seeds"][1]["setup_seconds"]
    top1 = [seed["test_top1_percent"] for seed in found["seeds"]]
    assert found["mean_test_top1_percent"] == pytest.approx(sum(top1) / 2)
    assert 0.9 < found["p_value"] <= 1
    assert found["numbers"]["learning_rate"] == 1e-3
    assert (found["device"], found["execution"], found["precision"]) == ("cpu", "eager", "float32")
    assert run(monkeypatch, *given[:3], "--seeds", 1, "--iterations", 1, "--data-dir", data_dir, "--out", tmp_path) == 4
    assert "--out" in paragraph(capsys)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupt_before_the_first_iteration(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: type[BaseException],
    code: int,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise stop

    monkeypatch.setattr(mnist, "load", interrupted)
    earlier = publish_something(tmp_path / "article")
    assert run(monkeypatch, "--out", tmp_path / "article") == code
    assert "nothing was saved" in paragraph(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["article"]
    assert (tmp_path / "article" / checkpoint.FILE_NAME).read_bytes() == earlier


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a limit on file sizes stands for a full disk")
def test_a_full_disk(tmp_path: Path, data_dir: Path) -> None:
    """No file may grow beyond 100 kB: the checkpoint does not fit, as on a full disk."""
    out = tmp_path / "article"
    earlier = publish_something(out)
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
    )
    arguments = ["--iterations", "1", "--out", str(out), "--data-dir", str(data_dir)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ONE_THREAD,
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith(f"error: can't write {out}")
    assert done.stderr.count("\n") == 1
    assert (out / checkpoint.FILE_NAME).read_bytes() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["article"]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be told before data is loaded, let alone trained on."""
    monkeypatch.setattr(mnist, "load", lambda *_, **__: pytest.fail("loaded data"))


@pytest.mark.usefixtures("no_training")
def test_a_folder_of_somebody_else_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.txt").write_text("precious")
    assert run(monkeypatch, "--out", tmp_path) == 4
    assert "--out" in paragraph(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("below", ["", "below"], ids=["a file", "below a file"])
def test_an_output_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(monkeypatch, "--out", tmp_path / "file" / below) == 4
    assert "--out" in paragraph(capsys)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "unheard-of"], "known: article"),
        (["--device", "tpu"], "cuda"),
        (["--precision", "int4"], "bf16"),
        (["--iterations", "0"], "--iterations"),
        (["--seed", "-1"], "--seed"),
        (["--no-such-option"], "--no-such-option"),
        (["--early-stop", "3"], "--validation"),
        (["--recipe", "fast", "--validation", "100", "--early-stop", "3"], "evaluated once"),
        (["--epochs", "2", "--iterations", "3"], "--epochs"),
        (["--recipe", "fast", "measure"], "--recipe"),
        (["measure", "--recipe", "unheard-of"], "known: article"),
        (["no-such-command"], "no-such-command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cuda_without_cuda(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "article"
    assert run(monkeypatch, "--device", "cuda", "--out", out, "--data-dir", data_dir) == 3
    assert "--device cpu" in paragraph(capsys)
    assert not list(tmp_path.iterdir())


def test_no_data_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
    assert run(monkeypatch, "--out", tmp_path / "article", "--data-dir", tmp_path / "empty") == 4
    assert "--data-dir" in paragraph(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_looking_at_the_data(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    figure = tmp_path / "deep" / "digits.png"
    where = ["--data-dir", data_dir]
    arguments = [*where, "data", "--out", figure] if before else ["data", *where, "--out", figure]
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    for part in (
        "(60000, 28, 28)",
        "(10000, 28, 28)",
        "(100, 1, 28, 28)",
        " 5923",
        " 1135",
        "from index 0",
        str(figure),
    ):
        assert part in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(monkeypatch, "data", "--data-dir", data_dir, "--out", tmp_path / "file" / "digits.png") == 4
    assert "--out" in paragraph(capsys)

"""The script that does all of it on a GPU: what becomes of a step, what is kept, and the chain itself for real."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "gpu.py"
pytestmark = pytest.mark.serial  # its steps have seconds, and what is left over of them counts


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_script"] = module  # where dataclasses look for the names of its annotations
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def chain(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a chain of the given steps and runs it."""
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)

    def run(*steps: Any, time_limit_s: float = 60.0) -> Any:
        made = gpu.Chain(steps, tmp_path, time_limit_s, quick=False)
        made.run()
        return made

    return run


def program(text: str) -> tuple[str, str]:
    return "-c", text


def states(folder: Path) -> dict[str, str]:
    return {step["name"]: step["state"] for step in json.loads((folder / "chain.json").read_text())["steps"]}


def test_every_ending_is_told(gpu: Any, chain: Callable[..., Any], tmp_path: Path) -> None:
    made = chain(
        gpu.Step("good", program("print('first'); print('3 passed, 2 skipped')"), 30),
        gpu.Step("bad", program("import sys; print('parity | FAILED'); sys.exit(1)"), 30, needs=("good",)),
        gpu.Step("after bad", program(""), 30, needs=("bad",)),
        gpu.Step("slow", program("import time; print('begun', flush=True); time.sleep(60)"), 1),
        gpu.Step("absent", program(""), 30, absent="there is no recipe fast"),
        gpu.Step("unimportable", program(""), 30, modules=("no_such_module",)),
        gpu.Step("silent", program(""), 30),
    )
    steps = {step["name"]: step for step in json.loads((tmp_path / "chain.json").read_text())["steps"]}
    assert {name: (step["state"], step["exit_code"]) for name, step in steps.items()} == {
        "good": ("done", 0),
        "bad": ("failed", 1),
        "after bad": ("not run", None),
        "slow": ("timed out", -signal.SIGTERM),
        "absent": ("left out", None),
        "unimportable": ("not run", None),
        "silent": ("done", 0),
    }
    assert steps["good"]["said"] == "first\n3 passed, 2 skipped"
    assert (tmp_path / "logs" / "good.log").read_text() == "first\n3 passed, 2 skipped\n"
    assert steps["after bad"]["said"] == "it needs what bad makes, which was not done"
    assert steps["slow"]["said"] == "begun"
    assert 1 <= steps["slow"]["seconds"] < 30
    assert steps["unimportable"]["said"] == "can't be imported here: no_such_module"
    assert made.exit_code() == 1
    page = (tmp_path / "chain.md").read_text()
    assert "Not done or not right: bad, after bad, slow, unimportable." in page
    assert "parity \\| FAILED" in page


def test_all_done_is_0_and_what_there_is_nothing_to_run_for_does_no_harm(gpu: Any, chain: Callable[..., Any]) -> None:
    made = chain(gpu.Step("good", program(""), 30), gpu.Step("absent", program(""), 30, absent="no such recipe"))
    assert made.exit_code() == 0


def test_a_step_leaves_what_a_later_one_reserves_and_tells_it_its_time(
    gpu: Any, chain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SUITE_MARGIN_S", 2.0)
    last = gpu.Step("last", program("import sys; print(*sys.argv)"), 20, reserve_s=12, limit_option="--time-limit")
    made = chain(
        gpu.Step("first", program("import time; time.sleep(60)"), 60),
        gpu.Step("second", program(""), 60),
        last,
        time_limit_s=13,
    )
    first, second, third = made.outcomes
    assert first.state == "timed out"
    assert first.seconds < 12
    assert (second.state, second.said) == ("not run", "no time was left of the 13 s")
    words = third.said.split()
    assert words[:2] == ["-c", "--time-limit"]
    assert 0 <= float(words[2]) <= 10


def test_what_a_step_started_ends_with_it(gpu: Any, chain: Callable[..., Any], tmp_path: Path) -> None:
    """A child of a step that ignores SIGTERM would go on computing beside the next one."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    made = chain(gpu.Step("parent", program(parent), 3))
    pid = int(made.outcomes[0].said)
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_finished_is_kept_when_it_is_ended(ending: signal.Signals, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    driver = (
        "import sys; sys.path.insert(0, 'tests'); import gpu\n"
        "sleep = ('-c', 'import time; print(\"half\", flush=True); time.sleep(60)')\n"
        "gpu.the_steps = lambda *settings: [gpu.Step('one', ('-c', 'print(1)'), 30), gpu.Step('two', sleep, 30), "
        "gpu.Step('three', sleep, 30)]\n"
        f"sys.exit(gpu.main(['--out', {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and not (
            (log := out / "logs" / "two.log").exists() and log.read_text() == "half\n"
        ):
            time.sleep(0.02)
        process.send_signal(ending)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, told
    assert f"ended by {ending.name}" in told
    assert states(out) == {"one": "done", "two": "cut off", "three": "not run"}
    assert "half" in (out / "chain.md").read_text()


def test_only_what_the_script_made_is_cleared_away(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.txt").write_text("kept")
    gpu._clear(tmp_path)
    assert (tmp_path / "suite" / "mine.txt").exists(), "no chain.json: the folder is somebody else's"
    (tmp_path / "chain.json").write_text("{}")
    gpu._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_the_trainer_lacks_is_left_out(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_recipes", lambda: ["article"])
    monkeypatch.setattr(gpu, "_asked", lambda *arguments: None)
    absent = {step.name: step.absent for step in gpu.the_steps(tmp_path, 480, quick=False) if step.absent}
    assert absent == {
        "measure-fast": "python -m trainer has no command measure",
        "measure-article": "python -m trainer has no command measure",
    }


def test_the_steps_fit_into_the_time(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is longer for a slower machine is longer for every step."""
    monkeypatch.setattr(gpu, "_asked", lambda *arguments: "article fast")
    steps, longer = (gpu.the_steps(tmp_path, limit, quick=False) for limit in (480, 4800))
    assert [step.name for step in steps][-1] == "suite"
    assert steps[-1].reserve_s < 480 / 2
    assert [step.limit_s * 10 for step in steps] == [step.limit_s for step in longer]
    assert not [step for step in steps if step.absent]


def test_a_missing_module_is_said_first(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); import gpu; gpu.NEEDED = ('no_such_module',); sys.exit(gpu.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: can't be imported here: no_such_module. Put them on PYTHONPATH.\n"


def test_help_answers_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, timeout=30, check=True)
    assert "--time-limit SECONDS" in done.stdout


def test_an_onnxruntime_on_pythonpath_is_the_one_that_workers_use(tmp_path: Path) -> None:
    """As where one was unpacked into a folder, because no package registry can be reached."""
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this is the one on PYTHONPATH')\n")
    program = (
        "from bench.backends.registry import BACKENDS; from bench.run.availability import availability\n"
        "for name in set(BACKENDS) - {'onnx-cpu'}: del BACKENDS[name]\n"
        "print(availability(threads=1, timeout_s=60)['onnx-cpu'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "this is the one on PYTHONPATH" in done.stdout


@pytest.mark.slow
def test_the_chain_for_real(data_dir: Path, tmp_path: Path) -> None:
    """Quick settings, the best device there is; every step of the real chain."""
    command = [sys.executable, SCRIPT, "--quick", "--time-limit", "900", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=950, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = states(tmp_path)
    assert set(found.values()) == {"done"}, found
    assert "its figures mean nothing" in (tmp_path / "chain.md").read_text()
    assert "parity verdicts are good" in (tmp_path / "suite" / "summary.md").read_text()
    assert json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert (tmp_path / "cuda-tests.xml").stat().st_size

"""The whole way on a GPU in one command: training, export, the suite, the tests that need CUDA, the benchmark.

    python tests/gpu.py                        # no argument is needed; ends within eight minutes on an H100
    python tests/gpu.py --out FOLDER           # default: artifacts/gpu
    python tests/gpu.py --time-limit 7200      # seconds for all of it; every step's own limit grows alike
    python tests/gpu.py --quick                # whether the chain holds together: its figures mean nothing

It runs in a plain checkout on whatever device is the best there, a CPU too (where the limits of a GPU are too short:
give it hours, or `--quick`). Nothing has to be installed as a package, neither nox nor a network is used, and Python
3.11 or newer is enough, with MNIST in `data/` (plain or `.gz`) and what `pyproject.toml` asks for within reach of its
imports. An image for machine learning has most of that. What it often lacks goes on PYTHONPATH: pydantic, whose
pydantic-core is compiled and must fit the version of Python, with annotated-types and typing-inspection; typer,
shellingham and rich; onnxscript with onnx-ir; py-cpuinfo and nvidia-ml-py; for the tests pytest, pytest-benchmark and
hypothesis. The row `onnx-cuda` needs an onnxruntime-gpu for torch's version of CUDA. What is missing is said first.

Every step is a process of its own with a time limit of its own; what a step prints is in `logs/`. After each step
`chain.json` and `chain.md` say what was run, how it ended, how long it took and what was left out and why, so that
whatever is finished is kept when this is ended early.

Exit codes: 0 all that is due was done and is right · 1 something was not · 130/143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = ROOT / "artifacts" / "gpu"
TIME_LIMIT_S = 480.0
# What a step that was told to end may take for saving what it has; less than nox waits for this script.
GRACE_S = 10.0
# What the suite still has to do when its own time is over: end a round, and write.
SUITE_MARGIN_S = 30.0
# Below this a step would only be started to be ended.
LEAST_S = 5.0
SAID_LINES = 3
NEEDED: tuple[str, ...] = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors", "pydantic", "typer")
NEEDED += ("rich", "scipy", "matplotlib", "psutil", "cpuinfo", "pynvml")
TESTING = ("pytest", "pytest_benchmark", "hypothesis")
MADE: tuple[str, ...] = (
    "training",
    "bundles",
    "suite",
    "logs",
    "cuda-tests.xml",
    "benchmark.json",
    "chain.json",
    "chain.md",
)
MADE += ("measure-fast.json", "measure-article.json")

State = Literal["done", "failed", "timed out", "cut off", "not run", "left out"]
"""`left out` is what there is nothing to run for; `not run` is what was due and could not be."""
BAD: tuple[State, ...] = ("failed", "timed out", "cut off", "not run")


@dataclass(frozen=True)
class Step:
    """A command of the chain.

    Attributes:
        arguments: behind the interpreter.
        limit_s: how long it may take.
        reserve_s: what the steps before it have to leave for it.
        limit_option: the option that tells the command how long it may take.
        needs: the steps that have to be done before.
        modules: what must be importable.
        absent: why there is nothing to run; None where there is.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    reserve_s: float = 0.0
    limit_option: str | None = None
    needs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    absent: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step. `said` are the last lines that it printed, or why it was not run."""

    name: str
    command: str
    state: State
    seconds: float | None
    exit_code: int | None
    said: str


class Ended(BaseException):
    """This script is to end: no `Exception`, so that nothing swallows it. `signal_number` is what told it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Chain:
    """The steps in their order, and what became of them so far."""

    def __init__(self, steps: Sequence[Step], out: Path, time_limit_s: float, quick: bool) -> None:
        self.steps, self.out, self.time_limit_s, self.quick = steps, out, time_limit_s, quick
        self.outcomes: list[Outcome] = []
        self._started_at = datetime.now(UTC)
        self._deadline = time.monotonic() + time_limit_s

    def run(self) -> None:
        """Do every step that can be done. Raises Ended, with all that is finished written down."""
        self.write()
        for place, step in enumerate(self.steps):
            try:
                self.outcomes.append(self._outcome(step, self._seconds_for(place)))
            finally:  # also where this was ended in the middle of the step
                self.write()
            last = self.outcomes[-1]
            print(f"{last.state:<9} {last.name} ({_seconds(last.seconds)}): {last.said.splitlines()[-1]}", flush=True)

    def exit_code(self) -> int:
        """0 where all that is due was done."""
        return int(len(self.outcomes) < len(self.steps) or any(outcome.state in BAD for outcome in self.outcomes))

    def write(self) -> None:
        """`chain.json` and `chain.md`, each whole or not at all."""
        pending = self.steps[len(self.outcomes) :]
        outcomes = self.outcomes + [_not_run(step, "not run", "not reached") for step in pending]
        facts = {
            "started_at": self._started_at.isoformat(),
            "seconds": round(self.time_limit_s - (self._deadline - time.monotonic()), 1),
            "time_limit_s": self.time_limit_s,
            "quick": self.quick,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "steps": [asdict(outcome) for outcome in outcomes],
        }
        _write(self.out / "chain.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        _write(self.out / "chain.md", _page(facts, outcomes))

    def _seconds_for(self, place: int) -> float:
        """How long the step at `place` may take."""
        reserved = sum(later.reserve_s for later in self.steps[place + 1 :])
        return min(self.steps[place].limit_s, self._deadline - time.monotonic() - reserved)

    def _outcome(self, step: Step, seconds: float) -> Outcome:
        done = {outcome.name for outcome in self.outcomes if outcome.state == "done"}
        if step.absent is not None:
            return _not_run(step, "left out", step.absent)
        if missing := [name for name in step.needs if name not in done]:
            return _not_run(step, "not run", f"it needs what {', '.join(missing)} makes, which was not done")
        if missing := [name for name in step.modules if importlib.util.find_spec(name) is None]:
            return _not_run(step, "not run", f"can't be imported here: {', '.join(missing)}")
        if seconds < LEAST_S:
            return _not_run(step, "not run", f"no time was left of the {self.time_limit_s:g} s")
        arguments = list(step.arguments)
        if step.limit_option is not None:
            arguments += [step.limit_option, f"{max(0.0, seconds - SUITE_MARGIN_S):.0f}"]
        print(f"running   {step.name}, for at most {seconds:.0f} s: {_words(arguments)}", flush=True)
        return self._ran(step.name, arguments, seconds)

    def _ran(self, name: str, arguments: list[str], limit_s: float) -> Outcome:
        """Run it, its output in a file of its own."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()

        def outcome(state: State, code: int | None) -> Outcome:
            return Outcome(name, _words(arguments), state, round(time.monotonic() - began, 1), code, _last_words(log))

        with log.open("wb") as output:
            # In a session of its own, so that it can be ended with all that it started.
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                _end(process)
                return outcome("timed out", process.returncode)
            except Ended:
                _end(process)
                self.outcomes.append(outcome("cut off", process.returncode))
                raise
        return outcome("done" if code == 0 else "failed", code)


def the_steps(out: Path, time_limit_s: float, quick: bool) -> list[Step]:
    """The chain. The limits are what an H100 needs, with room; longer time limits stretch them."""
    stretch = time_limit_s / TIME_LIMIT_S
    no_fast = None if "fast" in _recipes() else "there is no recipe fast"
    no_measure = None if _asked("-m", "trainer", "measure", "--help") else "python -m trainer has no command measure"
    few_steps = ("--iterations", "110") if quick else ()
    few_batches = ("--batch-size", "1", "--batch-size", "8") if quick else ()
    longest = 0.05 if quick else 0.3
    short_rounds = (f"--benchmark-max-time={longest}", "--benchmark-min-rounds=1")

    def measure(recipe: str, seeds: int, target_percent: float) -> tuple[str, ...]:
        length = ("--seeds", "1", *few_steps) if quick else ("--seeds", str(seeds), "--target", str(target_percent))
        return ("-m", "trainer", "measure", "--recipe", recipe, *length, "--out", str(out / f"measure-{recipe}.json"))

    bundle, benchmark = out / "bundles" / "article", "tests/benchmarks/test_throughput.py"
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", f"--bundle={bundle}")
    checkpoint = str(out / "training" / "article" / "checkpoint.safetensors")
    return [
        Step(
            "train-article",
            ("-m", "trainer", "--recipe", "article", "--out", str(out / "training" / "article"), *few_steps),
            90 * stretch,
        ),
        Step(
            "export",
            ("-m", "export", "--checkpoint", checkpoint, "--out", str(bundle)),
            60 * stretch,
            needs=("train-article",),
        ),
        Step(
            "cuda-tests",
            (*pytest, "-m", "cuda", "-rs", f"--junitxml={out / 'cuda-tests.xml'}"),
            100 * stretch,
            needs=("export",),
            modules=TESTING,
        ),
        Step(
            "benchmark",
            (*pytest, "--benchmark-only", benchmark, f"--benchmark-json={out / 'benchmark.json'}", *short_rounds),
            90 * stretch,
            needs=("export",),
            modules=TESTING,
        ),
        Step("measure-fast", measure("fast", 5, 99.0), 60 * stretch, absent=no_measure or no_fast),
        Step("measure-article", measure("article", 3, 98.95), 60 * stretch, absent=no_measure),
        # The last: it makes use of all the time that is left, and writes what it has while it runs.
        Step(
            "suite",
            ("-m", "bench", "suite", "--bundle", str(bundle), "--out", str(out / "suite"), *few_batches),
            (90 if quick else 300) * stretch,
            reserve_s=(90 if quick else 230) * stretch,
            limit_option="--time-limit",
            needs=("export",),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, look whether all is there, run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python tests/gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where everything goes; default: artifacts/gpu")
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS", help="for all; default: 480"
    )
    parser.add_argument("--quick", action="store_true", help="few steps and batch sizes; the figures mean nothing")
    options = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"error: can't be imported here: {', '.join(missing)}. Put them on PYTHONPATH.", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    out = options.out.resolve()
    _clear(out)
    chain = Chain(the_steps(out, options.time_limit, options.quick), out, options.time_limit, options.quick)
    try:
        chain.run()
    except Ended as ended:
        print(f"ended by {signal.Signals(ended.signal_number).name}: what was finished is in {out}", file=sys.stderr)
        return 128 + ended.signal_number
    print(f"all of it: {out / 'chain.md'}")
    return chain.exit_code()


def _on_signal(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: what follows takes seconds
        signal.signal(each, signal.SIG_IGN)
    raise Ended(number)


def _clear(out: Path) -> None:
    """Make the folder, without what an earlier run of this script left there."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "chain.json").exists():
        for place in (out / name for name in MADE):
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)


def _recipes() -> list[str]:
    return (_asked("-c", "from trainer.recipes import RECIPES; print(*RECIPES)") or "").split()


def _asked(*arguments: str) -> str | None:
    """What a command prints; None where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else None


def _environment() -> dict[str, str]:
    """This process's, with the checkout first in what Python imports from: nothing of it need be installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it started: politely, then at once."""
    _signal(process, "SIGTERM")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _signal(process, "SIGKILL")
    process.wait()


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        else:
            process.kill()


def _not_run(step: Step, state: State, reason: str) -> Outcome:
    return Outcome(step.name, _words(step.arguments), state, None, None, reason)


def _words(arguments: Sequence[str]) -> str:
    """The command as it can be typed in the checkout."""
    return _relative(" ".join(["python", *arguments]))


def _last_words(log: Path) -> str:
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return _relative("\n".join(lines[-SAID_LINES:])) or "it printed nothing"


def _relative(text: str) -> str:
    """Places as seen from the checkout: where that is tells nothing."""
    return text.replace(f"{ROOT}{os.sep}", "")


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _page(facts: dict[str, object], outcomes: Sequence[Outcome]) -> str:
    """What became of every step, for people."""
    bad = [outcome.name for outcome in outcomes if outcome.state in BAD]
    verdict = f"Not done or not right: {', '.join(bad)}." if bad else "All that is due was done and is right."
    quick = " **A quick run: it shows that the chain holds together, and its figures mean nothing.**"
    lines = [
        f"# The whole way, {str(facts['started_at'])[:10]}",
        "",
        f"{verdict} {facts['seconds']} s of {facts['time_limit_s']:g}.{quick if facts['quick'] else ''}",
        "",
        f"Python {facts['python']}, {facts['platform']}. The machine, its GPU and the versions: `suite/summary.md`.",
        "",
        "| step | state | time | exit code | command | last lines, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        code = "–" if outcome.exit_code is None else str(outcome.exit_code)
        said = outcome.said.replace("|", "\\|").replace("\n", "<br>")
        command = outcome.command.replace("|", "\\|")
        lines.append(
            f"| {outcome.name} | {outcome.state} | {_seconds(outcome.seconds)} | {code} | `{command}` | {said} |"
        )
    return "\n".join(lines) + "\n"


def _write(path: Path, content: str) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(content, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(main())

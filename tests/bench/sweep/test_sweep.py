"""The sweep: what there is to measure, who is measured in full, what is kept, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import MB, TORCH, Figures, Machine, result_of, sweep_of, with_variants

import bench.sweep.device_runs
import bench.sweep.folder
import bench.sweep.sweep
from bench.backends.registry import BACKENDS
from bench.cli.exit_codes import sweep_exit_code
from bench.cli.main import app
from bench.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NEGATIVE, EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.results.files import write_result
from bench.results.load import read_sweep
from bench.results.schema import Failure, Result
from bench.results.studies import SWEEP_FILE, Sweep
from bench.run.plan import Choice, opened
from bench.sweep.choices import NOT_REACHED, SweepRequest
from bench.sweep.contenders import MARGIN, chances, contenders
from bench.sweep.device_runs import FULL_PROCESSES, LOOK_ROUNDS, WORKER_BYTES, grouped
from bench.sweep.folder import SweepFolder
from bench.sweep.sweep import run_sweep

ROOT = Path(__file__).parents[3]
ONNX, ONNX_1 = Choice("onnx-cpu", "float32", 2), Choice("onnx-cpu", "float32", 1)
INT8, SCRIPT = Choice("onnx-cpu", "int8", 2), Choice("torchscript-cpu", "float32", 2)
NO_GPU = "there is no GPU. Plug one in."


def ignore(what: str, done: float) -> None:
    pass


@pytest.fixture(scope="module")
def variants(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_variants(small_bundle, tmp_path_factory.mktemp("variants") / "bundle", ["int8", "int8-raw"])


@pytest.fixture
def sweep_request(variants: Path) -> SweepRequest:
    return SweepRequest(
        command="bench sweep",
        path=variants,
        bundle=opened(variants),
        backends=("torch-cpu", "onnx-cpu"),
        variants=(),
        batch_sizes=(1, 8),
        threads=(1, 2),
        time_limit_s=100,
        timeout_s=60,
    )


@pytest.fixture
def machine(result: Result, sweep_request: SweepRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One without a GPU, on which runs take no time and everybody is alike until `world` says otherwise."""
    made = Machine(result, sweep_request.bundle)
    reasons = {name: NO_GPU if "cuda" in name else None for name in BACKENDS}
    monkeypatch.setattr(bench.sweep.device_runs, "run", made)
    monkeypatch.setattr(bench.sweep.sweep, "availability", lambda threads, timeout_s: reasons)
    monkeypatch.setattr(bench.sweep.device_runs, "usable_cpus", lambda: 2)
    monkeypatch.setattr(bench.sweep.folder, "describe", lambda: result.environment)
    return made


@pytest.fixture
def swept(sweep_request: SweepRequest, machine: Machine, tmp_path: Path) -> Callable[..., Sweep]:
    """Makes a sweep in one folder; keywords replace what is asked for."""

    def make(**changes: Any) -> Sweep:
        return run_sweep(
            replace(sweep_request, **changes), SweepFolder(tmp_path / "sweep", sweep_request.bundle.digest), ignore
        )

    return make


def reasons(sweep: Sweep) -> dict[str, str]:
    return {entry.what: entry.reason for entry in sweep.skipped}


def test_everything_is_looked_at_with_the_reference_in_every_run(swept: Callable[..., Sweep], machine: Machine) -> None:
    """First with all threads, and then with fewer what is worth it: here all are alike."""
    sweep = swept()
    first, second, full = machine.plans
    files = [Choice("onnx-cpu", variant, 2) for variant in ("float32", "int8", "int8-raw")]
    assert first.selection.choices == (TORCH, *files)
    assert second.selection.choices == (TORCH, *(replace(choice, threads=1) for choice in (TORCH, *files)))
    looks, rounds = (first.rounds, second.rounds), full.rounds
    assert [(look.count, look.processes, look.time_limit_s) for look in looks] == [(LOOK_ROUNDS, 1, None)] * 2
    assert (rounds.count, rounds.processes) == (None, FULL_PROCESSES)
    assert rounds.time_limit_s == pytest.approx(100, abs=2)
    looked_at = {*first.selection.choices, *(second.selection.choices or ())}
    assert set(full.selection.choices or ()) == looked_at, "who is as fast as the best stays"
    assert sweep.looks[1].subjects[1].label == "torch-cpu/1"
    assert sweep.skipped == ()
    assert sweep_exit_code(sweep) == 0


def test_other_threads_and_presets_are_for_what_is_worth_it(swept: Callable[..., Sweep], machine: Machine) -> None:
    """A preset needs its own file to be near the best; one that was named has fewer threads, too."""
    machine.world = {
        TORCH: Figures({1: 100, 8: 100}),
        ONNX: Figures({1: 600, 8: 1000}),
        Choice("onnx-cpu", "int8", 2): Figures({1: 1000, 8: 2000}, flips=3),
        Choice("onnx-cpu", "int8-raw", 2): Figures({1: 100, 8: 100}, flips=3),
    }
    sweep = swept(backends=("onnx-cpu", "onnx-cpu-parallel"))
    _, second, _ = machine.plans
    assert second.selection.choices == (
        TORCH,
        *(Choice("onnx-cpu", variant, 1) for variant in ("float32", "int8")),
        *(Choice("onnx-cpu-parallel", variant, threads) for variant in ("float32", "int8") for threads in (1, 2)),
    )
    told = reasons(sweep)["onnx-cpu-parallel:int8-raw/1"]
    assert told.startswith("as onnx-cpu:int8-raw: a short look left it no chance")
    assert sweep_exit_code(sweep) == 0


def test_nobody_named_means_all_that_the_bundle_has_and_that_can_run(
    swept: Callable[..., Sweep], machine: Machine
) -> None:
    sweep = swept(backends=(), threads=(2,))
    run = {choice.backend for plan in machine.plans for choice in plan.selection.choices or ()}
    assert {"torch-cpu", "onnx-cpu", "torchscript-cpu", "onnx-cpu-parallel", "compile-cpu"} <= run
    looks = [plan.selection.choices for plan in machine.plans if plan.rounds.count == LOOK_ROUNDS]
    assert looks[-1] == (TORCH, Choice("compile-cpu", "float32", 2)), "the slowest to start at the end"
    assert not any("cuda" in name or name == "null" for name in run)
    assert reasons(sweep)["onnx-cuda"] == NO_GPU
    assert sweep_exit_code(sweep) == 0, "what can't run here was not due"


def test_on_a_gpu_the_cpus_threads_make_no_choices(
    swept: Callable[..., Sweep], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.sweep.sweep, "availability", lambda threads, timeout_s: dict.fromkeys(BACKENDS))
    swept(backends=("onnx-cuda", "onnx-cpu"), variants=("float32",), batch_sizes=())
    choices = [(plan.rounds.batch_sizes[-1], plan.selection.choices) for plan in machine.plans]
    gpu = (Choice("torch-cuda", "float32", 2), Choice("onnx-cuda", "float32", 2))
    cpu = [(256, (TORCH, *others)) for others in ((ONNX,), (ONNX_1,), (ONNX, ONNX_1))]
    assert choices == [(1024, gpu), (1024, gpu), *cpu]


def test_who_can_win_nothing_is_not_measured_in_full(swept: Callable[..., Sweep], machine: Machine) -> None:
    machine.world = {
        TORCH: Figures({1: 100, 8: 200}),
        ONNX_1: Figures({1: 300, 8: 500}),
        ONNX: Figures({1: 390, 8: 900}),
        INT8: Figures({1: 400, 8: 1000}, flips=3, file_bytes=MB),
    }
    sweep = swept(variants=("float32", "int8"))
    assert ONNX in (machine.plans[-1].selection.choices or ()), "the fastest without a flip"
    assert INT8 in (machine.plans[-1].selection.choices or ()), "the fastest of all"
    assert ONNX_1 in (machine.plans[-1].selection.choices or ()), (
        "close enough to the fastest without a flip, at batch 1"
    )
    told = reasons(sweep)
    assert {"onnx-cpu:int8/1", "torch-cpu/1"} <= told.keys()
    assert "torch-cpu" not in told, "the reference is measured whatever it can win"
    assert sweep_exit_code(sweep) == 0


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, False),
        ({"per_s": {1: 1000 * (1 - MARGIN) + 1, 8: 10}}, True),
        ({"per_s": {1: 1000 * (1 - MARGIN) - 1, 8: 10}}, False),
        ({"p99_ms": {1: 1.2}}, True),
        ({"file_bytes": MB}, True),
        ({"file_bytes": int(1.99 * MB)}, False),
        ({"memory_bytes": 100 * MB}, True),
        ({"top1_percent": 99.5}, True),
    ],
)
def test_what_keeps_somebody_in(
    result: Result, sweep_request: SweepRequest, changes: dict[str, Any], stays: bool
) -> None:
    """The one that is looked at is slower than onnx-cpu everywhere; each change gives it one thing to win, or not."""
    best = Figures({1: 1000, 8: 1000}, {1: 1.0}, memory_bytes=200 * MB)
    slow = replace(Figures({1: 10, 8: 10}, {1: 100.0}, flips=5, memory_bytes=300 * MB), **changes)
    torch = replace(best, per_s={1: 100, 8: 100}, p99_ms={1: 10.0}, memory_bytes=400 * MB)
    look = result_of(result, {TORCH: torch, ONNX: best, INT8: slow}, sweep_request.bundle)
    chance = chances(contenders([look]))["onnx-cpu:int8"]
    assert (chance.share >= 1 - MARGIN) == stays
    if not changes:
        assert chance.words == "1% of onnx-cpu at batch 1 (throughput, of all)"


def test_where_there_are_too_many_the_nearest_to_the_best_are_measured(
    swept: Callable[..., Sweep], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many, their number depends on the time limit, and not on what is left of it: it is the same again."""
    monkeypatch.setattr(bench.sweep.device_runs, "FEWEST", 2)
    monkeypatch.setattr(bench.sweep.device_runs, "FULL_S", 10.0)
    machine.world = {
        Choice("onnx-cpu", variant, threads): Figures({1: 1000 - 10 * threads - place}, flips=1)
        for place, variant in enumerate(("float32", "int8", "int8-raw"))
        for threads in (1, 2)
    }
    sweep = swept(backends=("onnx-cpu",), batch_sizes=(1,))
    names = [f"onnx-cpu{variant}/1" for variant in ("", ":int8", ":int8-raw")]
    assert [subject.label for subject in sweep.runs[0].subjects] == ["torch-cpu", *names]
    told = reasons(sweep)["onnx-cpu:int8-raw"]
    assert told.startswith(
        "the time is enough for full rounds of 3, and others came nearer to the best; it reached 99%"
    )
    assert sweep_exit_code(sweep) == 0


@pytest.mark.parametrize("named", [False, True])
def test_what_is_emulated_is_measured_in_full_where_it_was_named(
    named: bool, small_bundle: Path, swept: Callable[..., Sweep], machine: Machine, tmp_path: Path
) -> None:
    """It takes nobody's place: what would have no chance beside it has one."""
    bundle = opened(with_variants(small_bundle, tmp_path / "half", ["float16"]))
    half, fewer = Choice("onnx-cpu", "float16", 2), Choice("onnx-cpu", "float16", 1)
    machine.world = {
        half: Figures({1: 1000, 8: 1000}, {1: 0.1}, file_bytes=1, memory_bytes=1, emulated="no kernels"),
        ONNX: Figures({1: 110, 8: 110}),
    }
    sweep = swept(path=bundle.path, bundle=bundle, variants=("float32", "float16") if named else ())
    full = machine.plans[-1].selection.choices or ()
    assert (half in full, fewer in full) == (named, named)
    assert ONNX in full
    told = reasons(sweep)
    if named:
        assert not told
    else:
        assert told["onnx-cpu:float16"].startswith("float16 is emulated, that is, computed in float32: the runtime has")
        assert told["onnx-cpu:float16/1"] == f"as onnx-cpu:float16: {told['onnx-cpu:float16']}"
    assert sweep_exit_code(sweep) == 0


def test_where_nothing_is_right_that_is_the_error(
    swept: Callable[..., Sweep], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the reference, that is: it is measured in any case."""
    here = {name: None if name == "onnx-cpu" else NO_GPU for name in BACKENDS}
    monkeypatch.setattr(bench.sweep.sweep, "availability", lambda threads, timeout_s: here)
    machine.world = {ONNX: Figures(wrong="RMS error 1 exceeds 2")}
    with pytest.raises(BenchError, match="nothing could be measured: onnx-cpu: parity failed: RMS error") as caught:
        swept(backends=("onnx-cpu",), variants=("float32",), threads=(2,))
    assert caught.value.exit_code == EXIT_NEGATIVE


@pytest.mark.parametrize(
    ("figures", "words", "code"),
    [
        ({ONNX: Figures(wrong="RMS error 1 exceeds 2")}, "parity failed: RMS error 1 exceeds 2", EXIT_NEGATIVE),
        ({INT8: Figures(wrong="top-1 is 90 %")}, "parity failed: top-1 is 90 %", 0),
        (
            {SCRIPT: Figures(failure=Failure(kind="raised", message="no such type", trace=""), loaded=False)},
            "can't load its file here: no such type",
            0,
        ),
        (
            {ONNX: Figures(failure=Failure(kind="raised", message="no such type", trace=""), loaded=False)},
            "can't load its file here: no such type",
            EXIT_NEGATIVE,
        ),
        (
            {INT8: Figures(failure=Failure(kind="crashed", message="ended by SIGSEGV", trace=""))},
            "did not finish: ended by SIGSEGV",
            EXIT_NEGATIVE,
        ),
    ],
)
def test_who_is_wrong_is_out_with_the_reason(
    swept: Callable[..., Sweep], machine: Machine, figures: dict[Choice, Figures], words: str, code: int
) -> None:
    machine.world = figures
    """A file that can't be loaded is an error where the backend was named."""
    (choice,) = figures
    backends = () if choice == SCRIPT else ("onnx-cpu",)
    sweep = swept(backends=backends, threads=(2,), variants=("float32", "int8"), batch_sizes=(1,))
    assert choice not in (machine.plans[-1].selection.choices or ())
    assert words in reasons(sweep).values()
    assert sweep_exit_code(sweep) == code


def test_an_interrupted_sweep_goes_on_where_it_was(swept: Callable[..., Sweep], machine: Machine) -> None:
    machine.errors[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        swept()
    whole = swept()
    assert [plan.rounds.count for plan in machine.plans] == [LOOK_ROUNDS, LOOK_ROUNDS, LOOK_ROUNDS, None], (
        "no look was made again"
    )
    assert swept().runs == whole.runs
    assert len(machine.plans) == 4, "everything was there"


@pytest.mark.parametrize(
    ("changes", "runs"), [({"threads": (2,)}, 1), ({"batch_sizes": (1,)}, 3), ({"fresh": True}, 3)]
)
def test_what_was_measured_otherwise_is_measured_anew(
    swept: Callable[..., Sweep], machine: Machine, changes: dict[str, Any], runs: int
) -> None:
    """With other threads the first look is the same."""
    swept()
    swept(**changes)
    assert len(machine.plans) == 3 + runs


def test_more_time_is_for_the_full_rounds(swept: Callable[..., Sweep], machine: Machine) -> None:
    swept()
    swept(time_limit_s=200)
    assert [plan.rounds.count for plan in machine.plans] == [LOOK_ROUNDS, LOOK_ROUNDS, None, None]


def test_another_library_is_another_run(
    swept: Callable[..., Sweep], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept()
    monkeypatch.setattr("bench.sweep.folder.installed", lambda *names: {"onnxruntime": "9.9"})
    swept()
    assert len(machine.plans) == 6


def test_the_folder_of_another_bundle_is_left_alone(
    swept: Callable[..., Sweep], machine: Machine, tmp_path: Path, small_bundle: Path
) -> None:
    sweep = swept()
    folder = tmp_path / "sweep"
    write_result(sweep, folder / SWEEP_FILE)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for kept in (SWEEP_FILE, "run-"):
        with pytest.raises(BenchError, match=r"is of another bundle \(\w+\)") as caught:
            SweepFolder(folder, opened(small_bundle).digest)
        assert caught.value.exit_code == EXIT_BAD_INPUT
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        for path in [path for path in before if path.name.startswith(kept)]:
            path.unlink()
            del before[path]
    (folder / SWEEP_FILE).write_text('{"schema_version": 1}')
    with pytest.raises(BenchError, match="is no run of a sweep"):
        SweepFolder(folder, sweep.bundle.digest)


def test_what_the_time_did_not_reach_is_said(
    swept: Callable[..., Sweep], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look is made whatever the time, and so are the full rounds of who was in it."""
    monkeypatch.setattr(bench.sweep.device_runs, "STARTING_PER_CPU", 1)
    sweep = swept(time_limit_s=0)
    assert [plan.selection.choices for plan in machine.plans] == [(TORCH, ONNX, INT8)] * 2
    missing = [entry.what for entry in sweep.skipped if entry.reason == NOT_REACHED]
    assert missing == ["onnx-cpu:int8-raw", "torch-cpu/1", "onnx-cpu/1", "onnx-cpu:int8/1", "onnx-cpu:int8-raw/1"]
    assert sweep_exit_code(sweep) == EXIT_NEGATIVE


def test_as_many_start_together_as_the_machine_has_room_for() -> None:
    quick = [Choice("onnx-cpu-parallel", "float32", threads) for threads in range(20)]
    slow = [Choice("compile-cpu", "float32", threads) for threads in range(6)]
    sizes = [len(group) for group in grouped([*slow, *quick], cpus=2, memory_bytes=2**40)]
    assert sizes == [10, 10, 3, 3], "evenly, and apart those that compile"
    assert max(map(len, grouped(quick, cpus=2, memory_bytes=10 * WORKER_BYTES))) == 4, "half of it, and the reference"
    assert grouped([], cpus=2, memory_bytes=2**40) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--backend", "null"], EXIT_USAGE, "Leave --backend null out"),
        (["--backend", "onnx"], EXIT_USAGE, "unknown backend 'onnx'"),
        (["--variant", "int4"], EXIT_USAGE, "unknown variant 'int4'; there are: float32"),
        (["--variant", "bfloat16"], EXIT_BAD_INPUT, "has no bfloat16 file that a chosen backend runs"),
        (["--backend", "onnx-cuda"], EXIT_UNAVAILABLE, "onnx-cuda is not available: there is no GPU"),
        (["--bundle", "nowhere"], EXIT_BAD_INPUT, "no bundle at "),
        (["--out", "/dev/null/sweep"], EXIT_BAD_INPUT, "another place with --out"),
    ],
)
def test_a_users_mistake_is_told_before_anything_is_measured(
    arguments: list[str], code: int, words: str, machine: Machine, variants: Path, tmp_path: Path
) -> None:
    for option, value in (("--out", tmp_path / "sweep"), ("--bundle", variants)):
        arguments = arguments if option in arguments else [*arguments, option, str(value)]
    with pytest.raises(BenchError, match=words) as caught:
        app(["sweep", *arguments], standalone_mode=False)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert machine.plans == []


def test_the_command_writes_the_sweep_and_says_what_is_left_out(
    machine: Machine, variants: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.world = {INT8: Figures({1: 100}, wrong="top-1 is 90 %")}
    options = ["--bundle", str(variants), "--out", str(tmp_path), "--batch-size", "1", "--threads", "2"]
    assert app(["sweep", *options, "--backend", "onnx-cpu"], standalone_mode=False) == 0
    printed = capsys.readouterr().out
    assert "not measured in full: onnx-cpu:int8: parity failed: top-1 is 90 %" in printed
    assert printed.endswith(f"sweep: {tmp_path / SWEEP_FILE}\n")
    sweep = read_sweep(tmp_path)
    assert sweep == read_sweep(tmp_path / SWEEP_FILE)
    assert sweep.bundle.path == str(variants)
    assert [subject.label for subject in sweep.runs[0].subjects] == ["torch-cpu", "onnx-cpu", "onnx-cpu:int8-raw"]


def test_an_interruption_says_what_is_kept(
    machine: Machine, variants: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.errors[2] = KeyboardInterrupt()
    options = ["--bundle", str(variants), "--out", str(tmp_path), "--backend", "onnx-cpu"]
    assert app(["sweep", *options], standalone_mode=False) == EXIT_INTERRUPTED
    assert f"finished runs kept in {tmp_path}: 1; the same command goes on" in capsys.readouterr().err


def test_only_a_whole_sweep_is_read(result: Result, sweep_request: SweepRequest, tmp_path: Path) -> None:
    path = tmp_path / SWEEP_FILE
    sweep = sweep_of(result, {TORCH: Figures(), ONNX: Figures()}, sweep_request.bundle)
    write_result(sweep, path)
    assert read_sweep(path) == sweep
    fields = json.loads(path.read_text())
    cases = {
        "is not JSON": path.read_text()[:-100],
        "is no sweep, but a result": result.model_dump_json(),
        "has schema version 2": json.dumps(fields | {"schema_version": 2}),
        "is not a whole result: runs": json.dumps({name: value for name, value in fields.items() if name != "runs"}),
    }
    for words, content in cases.items():
        path.write_text(content)
        with pytest.raises(BenchError, match=words) as caught:
            read_sweep(path)
        assert caught.value.exit_code == EXIT_BAD_INPUT
    with pytest.raises(BenchError, match="no result can be read"):
        read_sweep(tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["sweep", "recommend"])
def test_help_imports_no_runtime(command: str) -> None:
    program = (
        "import sys; from bench.cli.main import app\n"
        f"try: app(['{command}', '--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'onnxruntime', 'numpy', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(small_bundle: Path, tmp_path: Path) -> None:
    """Real processes: killed as soon as the first run is there, and started again. The run is not made twice."""
    whole = [sys.executable, "-m", "bench", "sweep", "--bundle", str(small_bundle), "--out", str(tmp_path)]
    whole += ["--backend", "onnx-cpu", "--backend", "torchscript-cpu", "--threads", "1", "--batch-size", "1"]
    whole += ["--time-limit", "20"]
    process = subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    patience = time.monotonic() + 120
    while not (found := list(tmp_path.glob("run-look-*.json"))) and time.monotonic() < patience:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (look,) = found
    written = look.stat().st_mtime_ns
    assert not (tmp_path / SWEEP_FILE).exists()

    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert look.stat().st_mtime_ns == written
    sweep = read_sweep(tmp_path)
    (run,) = sweep.runs
    assert run.subjects[0].label == "torch-cpu"
    measured = {subject.label for subject in run.subjects} | {entry.what for entry in sweep.skipped}
    assert {"torch-cpu", "onnx-cpu", "torchscript-cpu"} <= measured
    assert all(subject.parity and subject.parity.passed for subject in run.subjects)

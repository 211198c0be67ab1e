"""The command as a user runs it: a process, its exit code, and what it leaves behind."""

from __future__ import annotations

import contextlib
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

from bench.results.schema import Result

ROOT = Path(__file__).parents[3]
# Nothing is measured with these; they make a run short.
SHORT = ["--backend", "onnx-cpu", "--batch-size", "1", "--rounds", "1", "--block-ms", "1", "--threads", "1"]
ONCE = [*SHORT, "--processes", "1"]


def bench(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def one_paragraph(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def test_a_run_prints_the_table_and_writes_the_result(small_bundle: Path, tmp_path: Path) -> None:
    """In a folder of its own, where the default place of the result is made."""
    done = bench("run", "--bundle", small_bundle, *SHORT, "--processes", "2", "--backend", "null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "onnx-cpu" in done.stdout
    phases = ["measuring what an image costs", "parity of onnx-cpu", "parity of null", "process 1"]
    phases += ["measuring the machine's peaks", "process 2", "done"]
    said = [line for line in done.stderr.splitlines() if not line.startswith("so far: ")]
    assert said == phases, "a line for each, and no progress bar where nobody looks"
    assert max(map(len, done.stdout.splitlines())) <= 100, "as wide as a terminal, but for paths"
    written = tmp_path / "artifacts" / "results" / f"{small_bundle.name}.json"
    assert str(written.relative_to(tmp_path)) in done.stdout
    result = Result.model_validate_json(written.read_bytes())
    assert [subject.label for subject in result.subjects] == ["onnx-cpu", "null"]
    assert result.settings.threads == 1
    assert {(sample.process, sample.round) for sample in result.samples} == {(0, 0), (1, 0)}


@pytest.mark.slow
def test_a_failed_parity_ends_with_1_after_table_and_result(tampered: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    bundle = tampered(manifest=lambda fields: fields["preprocessing"].update(mean=[0.1307], std=[0.3081]))
    done = bench("run", "--bundle", bundle, *ONCE, "--json", path)
    assert done.returncode == 1
    assert " FAIL " in done.stdout
    assert json.loads(path.read_text())["subjects"][0]["parity"]["passed"] is False

    done = bench("parity", "--bundle", bundle, "--backend", "onnx-cpu")
    assert done.returncode == 1
    assert "parity FAILED onnx-cpu (strict)" in done.stdout


def test_parity_of_a_right_bundle_passes(small_bundle: Path) -> None:
    done = bench("parity", "--bundle", small_bundle, "--backend", "onnx-cpu", "--control")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pass") == 2
    assert "onnx-cpu:unfolded" in done.stdout


def test_parity_on_other_kinds_of_cpu(tampered: Callable[..., Path]) -> None:
    """What the bundle says of an int8 file; the one here is float32 by another name."""
    wrong = {"cpu": "avx2", "proof": "emulated", "passed": False, "failures": ["its error is large"]}

    def with_int8(fields: dict[str, Any]) -> None:
        real = next(file for file in fields["files"] if file["format"] == "onnx" and file["folded"])
        fields["files"].append(real | {"precision": "int8", "cpus": [wrong]})

    command = ("parity", "--bundle", tampered(manifest=with_int8), "--backend", "onnx-cpu", "--variant", "int8")
    done = bench(*command, "--cpus", "all")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "emulated" in done.stdout
    assert "on x86 without VNNI: its error is large" in done.stdout


def test_two_bundles_in_one_run(small_bundle: Path, tampered: Callable[..., Path], tmp_path: Path) -> None:
    """Each has its own parity, both are timed in the same rounds, and the second is set against the first."""
    path = tmp_path / "ab.json"
    wrong = tampered(manifest=lambda fields: fields["preprocessing"].update(mean=[0.1307], std=[0.3081]))
    done = bench("ab", small_bundle, wrong, *SHORT, "--processes", "3", "--json", path, "--threshold", "100")
    assert done.returncode == 1, done.stderr
    assert "none is slower than the first by more than 100 %" in done.stdout
    result = Result.model_validate_json(path.read_bytes())
    assert [subject.label for subject in result.subjects] == ["onnx-cpu@A", "onnx-cpu@B"]
    assert [subject.parity.passed for subject in result.subjects if subject.parity] == [True, False]
    assert [bundle.path for bundle in result.bundles] == [str(small_bundle), str(wrong)]
    assert {(r.against, r.numerator, r.throughput_ratio.processes) for r in result.ratios} == {
        ("base", "onnx-cpu@B", 3)
    }


def test_one_process_is_inconclusive(small_bundle: Path, tampered: Callable[..., Path]) -> None:
    copy = tampered()
    done = bench("ab", small_bundle, copy, *ONCE)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "inconclusive for 2 of 2: it takes 3 processes or more" in " ".join(done.stdout.split())
    assert bench("ab", small_bundle, copy, *ONCE, "--allow-inconclusive").returncode == 0


def test_a_result_is_shown_again(result: Result, tmp_path: Path) -> None:
    """The tables of the run, from its samples alone: what the file says was derived is not looked at."""
    import io

    from rich.console import Console

    from bench.report.terminal.console import WIDE
    from bench.report.terminal.run import print_run
    from bench.results.files import write_result

    path = tmp_path / "result.json"
    shown = io.StringIO()
    print_run(result, Console(file=shown, width=WIDE, highlight=False))
    write_result(result.model_copy(update={"rows": (), "ratios": ()}), path)
    done = bench("report", path, "--wide")
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown.getvalue()


def test_backends_never_lies() -> None:
    import torch

    done = bench("backends")
    assert done.returncode == 0, done.stderr
    for name in ("torch", "torchscript", "onnx"):
        answer = done.stdout.split(f" {name}-cuda ")[1].split()[0]
        assert answer == ("yes" if torch.cuda.is_available() else "no")
        assert done.stdout.split(f" {name}-cpu ")[1].split()[0] == "yes"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--backend", "tensorflow"], 2, "torch-cpu, torch-cuda"),
        (["parity", "--backend", "onnx-cpu", "--backend", "onnx"], 2, "unknown backend 'onnx'"),
        (["parity", "--backend", "null"], 2, "computes nothing"),
        (["run", "--bundle", "nowhere"], 4, "no bundle at "),
        (["ab", "{bundle}"], 2, "at least two"),
        (["ab", "{bundle}", "nowhere"], 4, "no bundle at "),
        (["report", "nowhere.json"], 4, "no result can be read at nowhere.json"),
        (["compare", "{bundle}/bundle.json", "nowhere.json"], 4, "bundle.json "),
        (["run", "--bundle", "{bundle}", "--json", "/dev/null/result.json"], 4, "--json"),
        (["run", "--bundle", "{altered}", "--backend", "onnx-cpu"], 4, "was altered"),
    ],
)
def test_a_users_mistake_is_one_paragraph(
    arguments: list[str], code: int, words: str, small_bundle: Path, tampered: Callable[..., Path], tmp_path: Path
) -> None:
    if "{altered}" in arguments:
        altered = tampered() / "model.unfolded.pt2"
        content = bytearray(altered.read_bytes())
        content[-1] ^= 1
        altered.write_bytes(content)
    places = {"bundle": small_bundle, "altered": tmp_path / "tampered"}
    done = bench(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert one_paragraph(done.stderr), done.stderr
    assert done.stdout == ""


def test_a_cuda_backend_is_refused_where_there_is_no_cuda(small_bundle: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    path = tmp_path / "result.json"
    done = bench("run", "--bundle", small_bundle, "--backend", "onnx-cuda", "--json", path)
    assert done.returncode == 3
    assert "onnx-cuda is not available" in done.stderr
    assert one_paragraph(done.stderr)
    assert done.stdout == ""
    assert not path.exists()


def test_a_negative_batch_is_refused() -> None:
    assert bench("run", "--batch-size", "0").returncode == 2


@pytest.mark.parametrize(
    ("moment", "ending", "code", "word"),
    [
        ("starting", signal.SIGINT, 130, "interrupted"),
        ("starting", signal.SIGTERM, 143, "terminated"),
        ("measuring", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_ends_the_workers_and_leaves_the_old_result(
    moment: str, ending: signal.Signals, code: int, word: str, small_bundle: Path, tmp_path: Path
) -> None:
    """As a terminal does it for Ctrl-C: the signal goes to the whole process group, workers included."""
    path = tmp_path / "result.json"
    path.write_text("the old one")
    options = ["--backend", "onnx-cpu", "--block-ms", "60000", "--threads", "1", "--json", str(path)]
    command = [sys.executable, "-m", "bench", "run", "--bundle", str(small_bundle), *options]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            worker = wait_for_worker(psutil.Process(process.pid))
            if moment == "measuring":
                wait_until_it_computes(worker)
            if ending is signal.SIGINT:
                os.killpg(process.pid, ending)
            else:
                process.send_signal(ending)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code, err
    assert word in err
    assert "Traceback" not in err
    assert out == ""
    assert path.read_text() == "the old one"
    _, alive = psutil.wait_procs([worker], timeout=5)
    assert not alive


def test_ctrl_c_keeps_the_rounds_that_were_done(small_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--bundle", small_bundle, *SHORT, "--processes", "50", "--json", path]
    command = [sys.executable, "-m", "bench", "run", *map(str, options)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            assert any(line == "process 3\n" for line in process.stderr)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert "interrupted: what follows is of the rounds that were done" in out
    assert "onnx-cpu" in out
    result = Result.model_validate_json(path.read_bytes())
    assert result.interrupted
    assert {sample.process for sample in result.samples} >= {0, 1}
    assert {sample.process for sample in result.samples} <= {0, 1, 2, 3}


def wait_for_worker(parent: psutil.Process) -> psutil.Process:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for child in parent.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # some are gone again at once
                if "spawn_main" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.005)
    raise AssertionError("the worker did not start")


def wait_until_it_computes(worker: psutil.Process) -> None:
    """A block lasts for a minute here, and everything before it takes less CPU than this."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        if sum(worker.cpu_times()[:2]) > 3:
            return
        time.sleep(0.1)
    raise AssertionError("nothing was computed")

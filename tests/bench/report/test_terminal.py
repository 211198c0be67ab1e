"""What a person is shown."""

from __future__ import annotations

import io

import pytest
from report_pages import with_emulated, with_parity
from rich.console import Console

from bench.backends.contract import Profile
from bench.report.columns import ratio_text
from bench.report.terminal.console import WIDE
from bench.report.terminal.machine import print_backends
from bench.report.terminal.parity import FLIPS_SHOWN, print_parity
from bench.report.terminal.run import print_run
from bench.results.parity import ParityVerdict
from bench.results.schema import Failure, Result, Skipped
from export.bundle.verdict import Flip


def shown(what: object, printer: object) -> str:
    text = io.StringIO()
    assert callable(printer)
    printer(what, Console(file=text, width=WIDE, highlight=False))
    return text.getvalue()


@pytest.fixture
def failed(result: Result) -> Result:
    """The real result, with a parity that failed by many flips, a crash, and a backend that was skipped."""
    flips = tuple(Flip(index, 7, 7, 1, 0.25) for index in range(FLIPS_SHOWN + 3))
    verdict = ParityVerdict(
        passed=False,
        failures=("23 predictions flipped",),
        profile=Profile.STRICT,
        images=300,
        top1_percent=90.0,
        oracle_top1_percent=98.0,
        flips=flips,
        max_abs_error=0.5,
        rms_error=0.1,
        rms_error_in_float32_errors=9e4,
    )
    onnx, control, null = result.subjects
    crash = Failure(kind="crashed", message="the worker was ended by SIGSEGV", trace="[last words]")
    return result.model_copy(
        update={
            "subjects": (
                onnx.model_copy(update={"parity": verdict}),
                control.model_copy(update={"failure": crash}),
                null,
            ),
            "skipped": tuple(Skipped(backend=name, reason="no driver here") for name in ("x-cuda", "y-cuda")),
        }
    )


def test_a_run_has_every_column(result: Result) -> None:
    text = shown(result, print_run)
    for words in (
        "images/s",
        "device",
        "end to end",
        "p50",
        "p90",
        "p99",
        "parity",
        "top-1",
        "flips",
        "max",
        "× torch",
    ):
        assert words in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("onnx-cpu ", "null "))]
    assert [(row[0], row[1]) for row in rows[:4]] == [
        ("onnx-cpu", "1"),
        ("onnx-cpu", "8"),
        ("null", "1"),
        ("null", "8"),
    ]
    assert result.bundles[0].digest[:12] in text
    assert max(len(line) for line in text.splitlines()) <= WIDE


def test_the_control_has_its_ratio_and_interval(result: Result) -> None:
    text = shown(result, print_run)
    ratio = next(r for r in result.ratios if r.batch_size == 8 and r.timing == "device_resident").throughput_ratio
    assert ratio_text(".3f")(ratio) in text


def test_failures_are_named_and_the_table_still_there(failed: Result) -> None:
    text = shown(failed, print_run)
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("onnx-cpu  "))
    assert row[-4:-1] == ["FAIL", "90.00", "23"]
    assert "parity FAILED onnx-cpu (strict): 23 predictions flipped." in text
    assert "image 0, label 7: the oracle says 7 by a margin of 0.25, here 1" in text
    assert "3 more flips" in text
    assert "crashed onnx-cpu:unfolded: the worker was ended by SIGSEGV" in text
    assert "[last words]" in text
    assert not [line for line in text.splitlines() if line.strip().startswith("onnx-cpu:unfolded  ")], (
        "no row of a crash"
    )
    assert "skipped x-cuda, y-cuda: no driver here" in text


def test_parity_says_the_verdict(failed: Result) -> None:
    text = shown(failed, print_parity)
    assert "FAIL" in text
    assert "90.00" in text
    assert "98.00" in text
    assert "9e+04" in text or "90000.00" in text


def test_limits_that_are_laxer_are_told_where_parity_holds_too(result: Result) -> None:
    told = with_parity(result, "onnx-cpu", laxer=("strict_rms_factor is 40, the project's 4",))
    for printer in (print_run, print_parity):
        assert "laxer limits onnx-cpu: strict_rms_factor is 40, the project's 4." in shown(told, printer)
        assert "laxer" not in shown(result, printer)


def test_a_busy_machine_is_told(result: Result) -> None:
    quiet = {"cpu_busy_percent": 1.0}
    calm = result.model_copy(
        update={
            "environment": result.environment.__class__(**(vars(result.environment) | quiet)),
            "cpu_busy_percents": (2.0, 1.0),
            "rows": tuple(row.model_copy(update={"system_share_percent": 1.0}) for row in result.rows),
        }
    )
    assert "warning" not in shown(calm, print_run)
    assert "used 60 % of the CPUs" in shown(calm.model_copy(update={"cpu_busy_percents": (2.0, 60.0)}), print_run)


def test_memory_that_is_mapped_anew_is_told(result: Result) -> None:
    """Once for each backend, with the share and the remedy; a little is nothing to be told."""
    shares = {("onnx-cpu", 1): 24.0, ("onnx-cpu", 8): 11.0, ("onnx-cpu:unfolded", 1): 9.0}
    rows = tuple(
        row.model_copy(update={"system_share_percent": shares.get((row.subject, row.batch_size))})
        for row in result.rows
    )
    text = shown(result.model_copy(update={"rows": rows}), print_run)
    assert "onnx-cpu: of its CPU time the operating system takes 24 % at batch 1, 11 % at batch 8" in text
    assert "MALLOC_TRIM_THRESHOLD_" in text
    assert "unfolded: of its CPU time" not in text


def test_what_is_emulated_is_told_once_with_advice(result: Result) -> None:
    told = with_emulated(result, "onnx-cpu", "no kernels", "float16")
    text = shown(told, print_run)
    assert text.count("onnx-cpu: float16 is emulated, that is, computed in float32: the runtime has no kernels") == 1
    assert "never called the fastest or recommended" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("onnx-cpu ")]
    assert [row[1:4] for row in rows[:2]] == [["in", "float32", "1"], ["in", "float32", "8"]], "in every row of it"
    assert "emulated" not in shown(result, print_run)


@pytest.mark.parametrize("width", [80, 100, 176])
def test_no_figure_is_cut_off(width: int, result: Result) -> None:
    """In a narrow window columns are left out, and every figure that is shown is whole."""
    text = io.StringIO()
    print_run(result, Console(file=text, width=width, highlight=False))
    lines = text.getvalue().splitlines()
    row = next(line.split() for line in lines if line.strip().startswith("onnx-cpu  "))
    (first, *_) = (row for row in result.rows if row.subject == "onnx-cpu" and row.batch_size == 1)
    throughputs = [
        first.end_to_end_throughput_images_per_s.median,
        first.device_resident_throughput_images_per_s.median,
    ]
    assert f"{throughputs[0]:,.0f}" in row
    assert (f"{throughputs[1]:,.0f}" in row) == (width == 176)
    assert ("flips" in text.getvalue()) == (width == 176)
    assert width < 100 or max(map(len, lines)) <= width


def test_backends_are_listed_with_their_reasons() -> None:
    text = shown({"a-cpu": None, "a-cuda": "no driver [anywhere]"}, print_backends)
    assert text.split("a-cpu")[1].split()[0] == "yes"
    assert text.split("a-cuda")[1].split()[0] == "no"
    assert "no driver [anywhere]" in text

"""The suite: which runs there are, what is kept when it ends early, and what its files say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import bench.run.suite
from bench.backends.contract import Profile
from bench.cli.exit_codes import suite_exit_code
from bench.cli.main import app
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.machine.findings import Finding, Severity
from bench.report.columns import ratio_text
from bench.report.pages import page
from bench.report.png import COLOURS, _style, draw_latency, draw_throughput
from bench.report.suite import JSON_NAME, PAGE_NAME, write_suite
from bench.results.files import write_result
from bench.results.load import read_fields, read_result, results_in, suite_of
from bench.results.roofline import Peak, Survey, Work
from bench.results.schema import Failure, Result
from bench.results.studies import LeftOut, Suite, SuiteRun
from bench.run.plan import Plan
from bench.run.suite import NOT_REACHED, SuiteRequest, absent, chosen_runs, run_suite

ROOT = Path(__file__).parents[3]
SHOW_THE_FOLD = {"graph-cuda", "torchscript-cpu", "onnx-cpu", "onnx-cuda"}
STRICT_GPU, FAST_GPU = SuiteRun(Profile.STRICT, "cuda"), SuiteRun(Profile.FAST, "cuda")
STRICT_CPU = SuiteRun(Profile.STRICT, "cpu")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def suite(result: Result) -> Suite:
    """One real run of a suite, and a finding that would break a table."""
    return Suite(
        schema_version=1,
        kind="suite",
        started_at=result.started_at,
        finished_at=datetime.now(UTC),
        time_limit_s=60,
        raw_bytes_per_image=784,
        findings=(Finding(Severity.WARNING, "load", "a | b\nc", "wait"),),
        runs=(result,),
        left_out=(),
    )


@pytest.mark.slow
def test_a_suite_as_a_user_runs_it(small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parity and throughput of a backend and its control; all files; and the page again from the JSON alone."""
    out = tmp_path / "new" / "suite"
    options = ["--backend", "onnx-cpu", "--batch-size", "1", "--time-limit", "0", "--threads", "1"]
    done = command("suite", "--bundle", small_bundle, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"summary: {out / PAGE_NAME}\n"
    names = {path.name for path in out.iterdir()}
    assert names == {JSON_NAME, PAGE_NAME, "throughput-strict-cpu.png", "latency-strict-cpu.png"}
    suite = suite_of(read_fields(out / JSON_NAME), out / JSON_NAME)
    (run,) = suite.runs
    assert [subject.label for subject in run.subjects] == ["onnx-cpu", "onnx-cpu:unfolded"]
    assert all(subject.parity and subject.parity.passed for subject in run.subjects)
    assert {sample.round for sample in run.samples} == {0}, "no round begins after the time limit, but the first"
    assert run.survey is not None
    assert {finding.check for finding in suite.findings} >= {"torch", "onnxruntime", "CPUs"}
    assert suite.raw_bytes_per_image == 28 * 28

    told = (out / PAGE_NAME).read_text()
    assert "All 2 parity verdicts are good" in told
    app(["report", str(out / JSON_NAME)], standalone_mode=False)
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--backend", "null"], EXIT_USAGE, "Leave --backend null out"),
        (["--backend", "onnx"], EXIT_USAGE, "unknown backend 'onnx'"),
        (["--bundle", "nowhere"], EXIT_BAD_INPUT, "no bundle at "),
        (["--out", "/dev/null/suite"], EXIT_BAD_INPUT, "another place with --out"),
    ],
)
def test_a_users_mistake_is_told_before_anything_is_measured(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "suite")]
    with pytest.raises(BenchError, match=words) as caught:
        app(["suite", *arguments, *out], standalone_mode=False)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_help_imports_no_runtime() -> None:
    program = (
        "import sys; from bench.cli.main import app\n"
        "try: app(['suite', '--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'onnxruntime', 'matplotlib', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("backends", "gpu", "parts"),
    [
        ((), True, [STRICT_GPU, FAST_GPU, STRICT_CPU]),
        ((), False, [STRICT_CPU]),
        (("onnx-cpu",), True, [STRICT_CPU]),
        (("onnx-cuda", "torch-cuda"), True, [STRICT_GPU, FAST_GPU]),
        # To be refused by the run, not left out in silence.
        (("onnx-cuda",), False, [STRICT_GPU, FAST_GPU]),
    ],
)
def test_which_runs_there_are(backends: tuple[str, ...], gpu: bool, parts: list[SuiteRun]) -> None:
    assert chosen_runs(backends, gpu) == parts


def test_what_no_run_is_made_for_is_said() -> None:
    assert [entry.what for entry in absent((), gpu=False)] == ["profile fast on the CPU", "both profiles on the GPU"]
    assert [entry.what for entry in absent((), gpu=True)] == ["profile fast on the CPU"]
    assert not any(entry.failed for entry in absent((), gpu=False))
    assert absent(("onnx-cpu",), gpu=False) == []


class Runs:
    """Takes the place of `bench.run.rounds.run`: gives the real result of another run, or raises what is asked for."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.plans: list[Plan] = []
        self.errors: dict[int, BaseException] = {}

    def __call__(self, plan: Plan, progress: Callable[[str, float], None]) -> Result:
        self.plans.append(plan)
        if (error := self.errors.get(len(self.plans))) is not None:
            raise error
        progress("rounds", 0.5)
        return self.result


@pytest.fixture
def runs(result: Result, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A machine with a GPU, on which runs take no time."""
    made = Runs(result)
    monkeypatch.setattr(bench.run.suite, "run", made)
    monkeypatch.setattr(bench.run.suite, "examine", lambda threads: [])
    monkeypatch.setattr(bench.run.suite.sensors, "gpus", lambda: ("a GPU",))
    return made


@pytest.fixture
def suite_request(small_bundle: Path) -> SuiteRequest:
    return SuiteRequest(
        command="bench suite",
        bundle=small_bundle,
        backends=(),
        batch_sizes=(),
        threads=1,
        time_limit_s=100,
        block_s=0.03,
        timeout_s=60,
    )


def test_the_runs_share_the_time(runs: Runs, suite_request: SuiteRequest) -> None:
    """What one leaves is for those after it; here none takes any."""
    shares: list[float] = []
    suite = run_suite(suite_request, lambda so_far: None, lambda what, done: shares.append(done))
    strict, fast, cpu = runs.plans
    assert [plan.rounds.time_limit_s for plan in runs.plans] == pytest.approx([37.5, 60, 100], abs=1)
    assert [(plan.profile, plan.selection.device) for plan in runs.plans] == [
        ("strict", "cuda"),
        ("fast", "cuda"),
        ("strict", "cpu"),
    ]
    assert strict.rounds.batch_sizes == fast.rounds.batch_sizes == (1, 8, 64, 256, 1024, 4096, 16384)
    assert cpu.rounds.batch_sizes == (1, 8, 64, 256, 1024)
    assert all(plan.selection.control and plan.selection.backends is None for plan in runs.plans)
    assert shares == pytest.approx([0, 0.1875, 0.5625, 0.875])
    assert suite_exit_code(suite) == 0


def test_named_backends_go_to_the_run_of_their_device(runs: Runs, suite_request: SuiteRequest) -> None:
    run_suite(replace(suite_request, backends=("torch-cpu", "onnx-cuda")), lambda so_far: None, lambda what, done: None)
    assert [(plan.selection.backends, set(plan.selection.control)) for plan in runs.plans] == [
        (("onnx-cuda",), SHOW_THE_FOLD),
        (("onnx-cuda",), SHOW_THE_FOLD),
        (("torch-cpu",), set()),
    ]


def test_what_is_finished_is_kept_when_it_is_ended(runs: Runs, suite_request: SuiteRequest) -> None:
    runs.errors[2] = KeyboardInterrupt()
    kept: list[Suite] = []
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite_request, kept.append, lambda what, done: None)
    (so_far,) = kept
    assert so_far.runs == (runs.result,)
    missing = [entry for entry in so_far.left_out if entry.failed]
    assert [(entry.what, entry.reason) for entry in missing] == [
        ("profile fast on the GPU", NOT_REACHED),
        ("profile strict on the CPU", NOT_REACHED),
    ]
    assert "profile fast on the GPU could not be measured" in page(so_far)


def test_a_run_that_cannot_be_made_is_told_and_the_others_go_on(runs: Runs, suite_request: SuiteRequest) -> None:
    runs.errors = {place: BenchError("no CUDA backend can run", EXIT_UNAVAILABLE) for place in (1, 2)}
    kept: list[Suite] = []
    suite = run_suite(suite_request, kept.append, lambda what, done: None)
    assert len(suite.runs) == len(kept) == 1
    assert [entry.reason for entry in suite.left_out if entry.failed] == ["no CUDA backend can run"] * 2
    assert suite_exit_code(suite) == EXIT_NEGATIVE
    assert "Not all is well: profile strict on the GPU could not be measured" in page(suite)


def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(runs: Runs, suite_request: SuiteRequest) -> None:
    runs.errors[1] = BenchError("onnx-cuda is not available", EXIT_UNAVAILABLE)
    with pytest.raises(BenchError, match="onnx-cuda is not available"):
        run_suite(replace(suite_request, backends=("onnx-cuda",)), lambda so_far: None, lambda what, done: None)


def test_where_nothing_can_run_that_is_the_error(runs: Runs, suite_request: SuiteRequest) -> None:
    runs.errors = {place: BenchError(f"reason {place}", EXIT_UNAVAILABLE) for place in (1, 2, 3)}
    with pytest.raises(BenchError, match="reason 1 reason 2 reason 3") as caught:
        run_suite(suite_request, lambda so_far: None, lambda what, done: None)
    assert caught.value.exit_code == EXIT_UNAVAILABLE


def cells(told: str, title: str) -> list[list[str]]:
    """The rows of the first table below a title."""
    section = told.split(f"### {title}", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in row] for row in rows[2:]]


def test_the_page_says_what_the_result_says(suite: Suite, result: Result) -> None:
    told = page(suite)
    speed = cells(told, "Speed")
    assert [row[:2] for row in speed] == [[row.subject, str(row.batch_size)] for row in result.rows]
    for shown, row in zip(speed, result.rows, strict=True):
        device, whole = row.device_resident_throughput_images_per_s, row.end_to_end_throughput_images_per_s
        assert [float(cell.split(" ")[0].replace(",", "")) for cell in shown[2:4]] == pytest.approx(
            [device.median, whole.median], rel=1e-2
        )
        assert shown[2].endswith(f"±{device.half_width_percent:.1f}%")
    folded = cells(told, "Folded against unfolded")
    ratio = result.ratios[0].throughput_ratio
    words = ratio_text(".3f")(ratio)
    assert folded[0] == ["onnx-cpu", "onnx-cpu:unfolded", "1", words, folded[0][4], "7"]
    parity = cells(told, "Parity")
    assert [row[0] for row in parity] == ["onnx-cpu", "onnx-cpu:unfolded"]
    assert [row[1] for row in parity] == ["pass", "pass"]
    assert "| warning | load | a \\| b c | wait |" in told
    assert result.environment.cpu in told
    assert "the machine's peaks could not be measured" in told


def test_the_page_names_what_is_wrong(suite: Suite, result: Result) -> None:
    good, control, null = result.subjects
    assert good.parity is not None
    wrong = good.model_copy(update={"parity": replace(good.parity, passed=False, failures=("3 predictions flipped",))})
    failure = Failure(kind="crashed", message="out of\nmemory", trace="")
    broken = control.model_copy(update={"failure": failure})
    bad = suite.model_copy(update={"runs": (result.model_copy(update={"subjects": (wrong, broken, null)}),)})
    told = page(bad)
    assert "parity of `onnx-cpu` (profile strict on the CPU) failed" in told
    assert "`onnx-cpu:unfolded` (profile strict on the CPU) did not finish" in told
    assert "| **FAIL** |" in told
    assert "| 3 predictions flipped |" in told
    assert "`onnx-cpu:unfolded` (profile strict on the CPU) crashed: out of memory" in told
    assert "onnx-cpu:unfolded" not in [row[0] for row in cells(told, "Speed")]
    assert suite_exit_code(bad) == EXIT_NEGATIVE
    assert suite_exit_code(suite) == 0


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_is_wrong_is_not_called_the_best(wrong: int, suite: Suite, result: Result) -> None:
    subjects = list(result.subjects[:2])
    parity = subjects[wrong].parity
    assert parity is not None
    subjects[wrong] = subjects[wrong].model_copy(update={"parity": replace(parity, passed=False)})
    rows = tuple(row for row in result.rows if row.subject != "null")
    found = result.model_copy(update={"subjects": tuple(subjects), "rows": rows})
    told = page(suite.model_copy(update={"runs": (found,)}))
    (line,) = (line for line in told.splitlines() if "highest throughput on the device" in line)
    assert f"`{subjects[1 - wrong].label}` at batch" in line


def test_the_limit_of_the_copy_stands_beside_the_rows(suite: Suite, result: Result) -> None:
    survey = Survey(Work(5e6, 2e5, 2e6), (Peak("cuda", 5e13, 3e12, host_to_device_bytes_per_s=784e7),))
    told = page(suite.model_copy(update={"runs": (result.model_copy(update={"survey": survey}),)}))
    assert "784 bytes of raw input" in told
    assert "10,000,000 images/s for the copy alone" in told


def test_a_suite_is_read_back_and_another_file_refused(suite: Suite, result: Result, tmp_path: Path) -> None:
    write_suite(suite, tmp_path)
    path = tmp_path / JSON_NAME
    assert suite_of(read_fields(path), path) == suite
    with pytest.raises(BenchError, match="is a suite of several runs"):
        read_result(path)
    fields: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"schema_version": 9}))
    with pytest.raises(BenchError, match="has schema version 9; this bench reads version 1"):
        suite_of(read_fields(path), path)
    path.write_text(json.dumps(fields | {"findings": 1}))
    with pytest.raises(BenchError, match="is not a whole result: findings"):
        suite_of(read_fields(path), path)
    write_result(result, path)
    assert results_in(path).suite is None


def test_a_full_disk_is_one_paragraph(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(result: Result, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.report.suite.FIGURES", {"throughput": full})
    with pytest.raises(BenchError, match=r"No space left on device.*--out") as caught:
        write_suite(suite, tmp_path)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_the_figures_are_drawn_whatever_is_known(result: Result, tmp_path: Path) -> None:
    """Of runs too short for a p50 on the device, and of those in which nothing was measured, too."""
    none = {"device_resident_latency_ms": result.rows[0].device_resident_latency_ms.model_copy(update={"p50": None})}
    short = result.model_copy(update={"rows": tuple(row.model_copy(update=none) for row in result.rows)})
    empty = result.model_copy(update={"rows": ()})
    sizes = []
    for draw, drawn in (
        (draw_latency, result),
        (draw_latency, short),
        (draw_throughput, result),
        (draw_throughput, empty),
    ):
        path = tmp_path / f"{len(sizes)}.png"
        draw(drawn, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1], "a line more"
    assert sizes[2] > sizes[3], "lines where there were none"


def test_a_line_is_known_by_colour_and_marker_and_its_control_by_the_dashes() -> None:
    finished = ["torch-cuda", "onnx-cuda", "onnx-cuda:unfolded", "graph-cuda"]
    torch, onnx, control, graph = (_style(name, finished) for name in finished)
    assert len({style["color"] for style in (torch, onnx, graph)}) == 3
    assert len({style["marker"] for style in (torch, onnx, graph)}) == 3
    assert (control["color"], control["marker"]) == (onnx["color"], onnx["marker"])
    assert (onnx["linestyle"], control["linestyle"]) == ("-", "--")
    assert len(set(COLOURS)) == len(COLOURS)


def test_every_measured_number_of_a_suite_has_its_unit_in_its_name() -> None:
    own = Suite.model_json_schema()["properties"]
    measured = [name for name, kind in own.items() if kind.get("type") in ("number", "integer") and "const" not in kind]
    assert measured
    assert all(re.search(r"_(s|per_image)$", name) for name in measured)


def test_left_out_is_said_with_its_reason(suite: Suite) -> None:
    entry = LeftOut(what="profile fast on the CPU", reason="nothing changes there", failed=False)
    told = page(suite.model_copy(update={"left_out": (entry,)}))
    assert told.rstrip().endswith("## Left out\n\n- profile fast on the CPU: nothing changes there")
    assert "All 2 parity verdicts are good" in told, "what is left out on purpose is no failure"

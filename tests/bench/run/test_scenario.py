"""Backends under the load of the real LoadGen. The runs are far too short for figures: what is tested is the order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli.exit_codes import scenario_exit_code
from bench.cli.main import app
from bench.errors import EXIT_NEGATIVE, EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.results.scenario import ScenarioResult
from bench.results.terms import Scenario
from bench.run.plan import Plan
from bench.run.scenario import RATE_PRECISION, ScenarioRequest, highest_rate, log_folder, run_scenario

pytestmark = pytest.mark.usefixtures("faulty_backends")
MakePlan = Callable[..., Plan]


def go(plan: Plan, scenario_request: ScenarioRequest, target: Path) -> ScenarioResult:
    return run_scenario(plan, scenario_request, target, lambda what, done: None)


def test_a_run_from_the_command_line(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that LoadGen collected are judged: one backend is wrong, and measured all the same; null has none.

    The result and LoadGen's logs are where they belong; those of an earlier run are gone, other files are not.
    """
    results = tmp_path / "artifacts" / "results"
    logs = results / f"{small_bundle.name}-multi-stream"
    (logs / "onnx-cpu" / "performance" / "run_9").mkdir(parents=True)
    (logs / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    options = ["--scenario", "multi-stream", "--samples-per-query", "2", "--min-duration-s", "0.2", "--threads", "1"]
    backends = ["--backend", "onnx-cpu", "--backend", "transposed", "--backend", "null"]
    done = CliRunner().invoke(app, ["run", "--bundle", str(small_bundle), *options, *backends])
    assert done.exit_code == EXIT_NEGATIVE, done.output
    assert "not an official MLPerf result" in done.stdout
    assert "runs of at least 0.2 s" in " ".join(done.stdout.split())
    assert done.stdout.count(" VALID ") == 3
    assert "parity FAILED transposed" in done.stdout

    result = ScenarioResult.model_validate_json((results / f"{small_bundle.name}-multi-stream.json").read_bytes())
    for row in result.rows:
        (run,) = row.runs
        assert (run.verdict, row.reported) == ("VALID", 0)
        assert run.images == 2 * run.queries >= 2 * 662
        assert run.seconds > 0.2
        assert 0 < run.latency_ms.p50 <= run.latency_ms.p90 <= run.latency_ms.p99
        assert "Result is : VALID" in (results / run.folder / "mlperf_log_summary.txt").read_text()
    right, wrong, null = result.rows
    assert right.subject.parity is not None
    assert right.subject.parity.passed
    assert right.subject.parity.images == 300
    assert wrong.subject.parity is not None
    assert not wrong.subject.parity.passed
    assert null.subject.parity is None
    assert scenario_exit_code(result.model_copy(update={"rows": (right, null)})) == 0
    failed = null.model_copy(update={"runs": (), "reported": None})
    assert scenario_exit_code(result.model_copy(update={"rows": (right, failed)})) == EXIT_NEGATIVE

    assert (logs / "onnx-cpu" / "accuracy" / "mlperf_log_accuracy.json").stat().st_size > 300 * 80
    assert not (logs / "null" / "accuracy").exists()
    assert sorted(path.name for path in (logs / "onnx-cpu" / "performance").iterdir()) == ["run_1"]
    assert (logs / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in results.iterdir()) == [logs.name, f"{logs.name}.json"]


def test_the_highest_rate_of_a_bound_that_holds(plan: MakePlan, tmp_path: Path) -> None:
    result = go(plan(backends=("null",)), ScenarioRequest(Scenario.SERVER, 0.1, 1, 0.1), tmp_path / "result.json")
    (row,) = result.rows
    assert row.reported is not None
    assert row.missed_queries_per_s is not None
    reported = row.runs[row.reported]
    assert reported.verdict == "VALID"
    assert reported.queries_per_s is not None
    assert 1 < row.missed_queries_per_s / reported.queries_per_s <= RATE_PRECISION
    tried = {run.queries_per_s: run.verdict for run in row.runs}
    assert tried[row.missed_queries_per_s] == "INVALID"
    assert len({run.folder for run in row.runs}) == len(tried)
    for run in row.runs:
        summary = (tmp_path / run.folder / "mlperf_log_summary.txt").read_text()
        assert f"Result is : {run.verdict}" in summary
        assert "target_latency (ns): 100000000" in summary
    assert scenario_exit_code(result) == 0


def test_a_bound_that_cannot_hold_is_invalid(plan: MakePlan, tmp_path: Path) -> None:
    """Even a query that computes nothing takes longer than a microsecond."""
    result = go(plan(backends=("null",)), ScenarioRequest(Scenario.SERVER, 0.1, 1, 1e-6), tmp_path / "result.json")
    (row,) = result.rows
    assert [run.verdict for run in row.runs] == ["INVALID", "INVALID"]
    assert row.reported == 1
    assert row.missed_queries_per_s == row.runs[1].queries_per_s
    assert "Performance constraints" in row.runs[1].unmet
    assert scenario_exit_code(result) == EXIT_NEGATIVE


def test_without_loadgen_the_extra_is_named(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(BenchError, match=r"pip install 'ninefold\[mlperf\]'") as caught:
        go(plan(), ScenarioRequest(Scenario.OFFLINE, 0.1, 8, None), tmp_path / "result.json")
    assert caught.value.exit_code == EXIT_UNAVAILABLE


@pytest.mark.parametrize("limit", [0.07, 0.3, 1.0, 1.01, 3.0, 1000.0])
def test_the_search_closes_in(limit: float) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    held, missed = highest_rate(holds, first=1.0, lowest=0.05)
    assert held is not None
    assert held <= limit < missed <= RATE_PRECISION * held
    assert {held, missed} <= set(tried)
    assert len(tried) == len(set(tried)) < 20


def test_the_search_gives_up() -> None:
    assert highest_rate(lambda rate: False, first=1.0, lowest=0.05) == (None, 0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-duration-s", "5"], "--min-duration-s needs --scenario"),
        (["--scenario", "offline", "--latency-bound-ms", "5"], "one of: server"),
        (["--scenario", "server", "--samples-per-query", "5"], "one of: multi-stream"),
        (["--scenario", "server", "--rounds", "5"], "--rounds and --scenario"),
        (["--scenario", "single-stream", "--batch-size", "5"], "only offline takes --batch-size"),
        (["--scenario", "offline", "--batch-size", "5", "--batch-size", "6"], "only offline takes --batch-size"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments: list[str], words: str) -> None:
    error = CliRunner().invoke(app, ["run", *arguments]).exception
    assert isinstance(error, BenchError)
    assert words in str(error)
    assert error.exit_code == EXIT_USAGE


def test_where_the_logs_are() -> None:
    assert log_folder(Path("results/a.b-server.json")) == Path("results/a.b-server")
    assert log_folder(Path("results/named")) == Path("results/named-logs")


def test_the_command_imports_loadgen_only_where_it_is_used() -> None:
    code = "import sys, bench.cli.main; print({'torch', 'onnxruntime', 'numpy', 'mlperf_loadgen'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

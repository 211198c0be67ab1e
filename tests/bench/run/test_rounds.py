"""The order of a run, and what becomes of a backend that fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import bench.run.lanes
import bench.run.rounds
from bench.backends.registry import BACKENDS
from bench.cli.exit_codes import exit_code
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_UNAVAILABLE, EXIT_USAGE, BenchError
from bench.results.schema import Result, Skipped
from bench.run.availability import availability
from bench.run.lanes import Lane
from bench.run.plan import Choice, Plan, select
from bench.run.rounds import cpus_for, run
from export.bundle import Bundle

pytestmark = pytest.mark.usefixtures("faulty_backends")
MakePlan = Callable[..., Plan]


def go(plan: Plan) -> Result:
    return run(plan, lambda what, done: None)


def refusal(plan: Plan) -> BenchError:
    """The error that a run ends with before anything is measured; no process is left over."""
    phases: list[str] = []
    with pytest.raises(BenchError) as caught:
        run(plan, lambda what, done: phases.append(what))
    assert not any(phase.startswith(("parity", "warming", "round")) for phase in phases)
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return caught.value


def test_rounds_are_interleaved_and_rotated(result: Result) -> None:
    turns = [(s.round, s.batch_size, s.subject) for s in result.samples if s.timing == "end_to_end"]
    want = []
    for round_ in range(7):
        lanes = ["onnx-cpu", "onnx-cpu:unfolded", "null"]
        lanes = lanes[round_ % 3 :] + lanes[: round_ % 3]
        want += [(round_, batch_size, lane) for batch_size in (1, 8) for lane in lanes]
    assert turns == want
    began = [sample.started_at_monotonic_ns for sample in result.samples]
    assert began == sorted(began), "one worker at a time"
    assert exit_code(result) == 0

    onnx, control, null = result.subjects
    assert onnx.file is not None
    assert control.file is not None
    assert (onnx.file.folded, control.file.folded, null.file) == (True, False, None)
    assert onnx.file.path != control.file.path
    assert onnx.parity is not None
    assert onnx.parity.passed
    assert null.parity is None
    assert {(ratio.numerator, ratio.denominator, ratio.batch_size, ratio.timing) for ratio in result.ratios} == {
        ("onnx-cpu", "onnx-cpu:unfolded", batch_size, timing)
        for batch_size in (1, 8)
        for timing in ("device_resident", "end_to_end")
    }
    assert {warm_up.batch_size for warm_up in onnx.warm_ups} == {1, 8}


def test_no_round_begins_after_the_time_limit(plan: MakePlan) -> None:
    """But the first always does: whoever waits that long is to see a figure."""
    result = go(plan(backends=("null",), rounds=50, time_limit_s=0.0))
    assert {sample.round for sample in result.samples} == {0}
    assert result.settings.rounds == 50


def test_null_prices_the_harness(plan: MakePlan) -> None:
    """A call of nothing takes microseconds at most: that much the harness adds to everybody's call."""
    result = go(plan(backends=("null",), batch_sizes=(256,), rounds=2))
    (row,) = result.rows
    assert row.device_resident_latency_ms.p50 is not None
    assert row.device_resident_latency_ms.p50 < 0.005


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("crashing", "crashed", "SIGABRT"),
        ("raising", "raised", "no kernel for this operator"),
        ("hanging", "hung", "no answer within 1 s"),
    ],
)
def test_the_others_finish_when_one_fails(
    name: str, kind: str, words: str, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = bench.run.lanes._load

    def load_and_lose_patience(lanes: list[Any], asked: bool) -> Any:
        skipped = load(lanes, asked)
        if name == "hanging":  # loading may take longer than a test wants to wait for a hang
            lanes[0].worker._timeout_s = 1.0
        return skipped

    monkeypatch.setattr(bench.run.lanes, "_load", load_and_lose_patience)
    result = go(plan(backends=(name, "onnx-cpu")))
    bad, good = result.subjects
    assert bad.failure is not None
    assert bad.failure.kind == kind
    assert words in bad.failure.message
    assert good.failure is None
    assert [row.subject for row in result.rows] == ["onnx-cpu"]
    assert exit_code(result) == EXIT_NEGATIVE


def test_a_batch_size_that_is_wrong_fails(plan: MakePlan) -> None:
    """Right in the batches of the whole verdict: algorithms, graphs and compiled shapes differ by batch size."""
    result = go(plan(backends=("eight", "onnx-cpu"), batch_sizes=(1, 8), rounds=1, processes=2))
    wrong, right = (subject.parity for subject in result.subjects)
    assert wrong is not None
    assert right is not None
    assert right.passed
    assert not wrong.passed
    (failure,) = wrong.failures
    assert failure.startswith("at batch 8: ")
    assert exit_code(result) == EXIT_NEGATIVE


def test_every_process_is_a_new_one(plan: MakePlan) -> None:
    result = go(plan(backends=("null", "onnx-cpu"), rounds=2, processes=3))
    places = {(sample.process, sample.round, sample.subject) for sample in result.samples}
    assert places == {(p, r, name) for p in range(3) for r in range(2) for name in ("null", "onnx-cpu")}
    onnx = result.subjects[1]
    assert [warm_up.process for warm_up in onnx.warm_ups] == [0, 1, 2]
    assert len(result.cpu_busy_percents) == 3
    assert len(result.readings) == 1 + 6
    firsts = {s.process: s.subject for s in result.samples if (s.round, s.position) == (0, 0)}
    assert firsts == {0: "null", 1: "onnx-cpu", 2: "null"}, "who is the first in a process changes too"
    assert all(sample.cpu_s is not None and sample.system_s is not None for sample in result.samples)


def test_a_backend_that_fails_in_a_later_process_is_a_failure(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is kept in the samples, and counts for nothing."""
    load, calls = bench.run.lanes._load, []

    def load_and_lose_one(lanes: list[Lane], asked: bool) -> list[Skipped]:
        skipped = load(lanes, asked)
        calls.append(asked)
        if len(calls) == 2:
            lanes[0].worker._process.kill()
        return skipped

    monkeypatch.setattr(bench.run.lanes, "_load", load_and_lose_one)
    result = go(plan(backends=("onnx-cpu", "null"), rounds=1, processes=3))
    assert calls == [True, False, False]
    lost, null = result.subjects
    assert lost.failure is not None
    assert null.failure is None
    assert {sample.process for sample in result.samples if sample.subject == "onnx-cpu"} == {0}
    assert {sample.process for sample in result.samples if sample.subject == "null"} == {0, 1, 2}
    assert exit_code(result) == EXIT_NEGATIVE


@pytest.mark.parametrize(("bound", "busy", "decides"), [(0.3, 0.0, True), (0.3, 50.0, False), (1.0, 0.0, False)])
def test_a_comparison_goes_on_until_it_is_decided(
    bound: float,
    busy: float,
    decides: bool,
    plan: MakePlan,
    small_bundle: Path,
    tampered: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle against itself and a limit of a third of its speed: after five processes, since fewer decide nothing.
    Where nobody can tell, or others keep the machine busy, it lasts as long as it may.
    """
    monkeypatch.setattr(bench.run.rounds, "cpu_busy_percent", lambda: busy)
    bundles, limit_s = (small_bundle, tampered()), 60.0 if decides else 6.0
    started = time.monotonic()
    result = go(plan(bundles=bundles, rounds=1, processes=None, bound=bound, time_limit_s=limit_s))
    seconds = time.monotonic() - started
    if decides:
        assert len({sample.process for sample in result.samples}) >= 5
        assert seconds < limit_s
    else:
        assert limit_s * 0.5 < seconds < 4 * limit_s


def test_a_wrong_answer_is_measured_and_fails(plan: MakePlan) -> None:
    result = go(plan(backends=("transposed",)))
    (subject,) = result.subjects
    assert subject.parity is not None
    assert not subject.parity.passed
    assert result.rows
    assert exit_code(result) == EXIT_NEGATIVE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unavailable", "Plug one in"),
        ("unloadable", "opset 99 is not supported"),
    ],
)
def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(name: str, words: str, plan: MakePlan) -> None:
    error = refusal(plan(backends=("onnx-cpu", name)))
    assert error.exit_code == EXIT_UNAVAILABLE
    assert words in str(error)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the named backends all that there are."""

    def keep(*names: str) -> None:
        for name in list(BACKENDS):
            if name not in names:
                monkeypatch.delitem(BACKENDS, name)

    return keep


def test_what_nobody_asked_for_is_skipped_with_its_reason(plan: MakePlan, only: Callable[..., None]) -> None:
    only("unavailable", "onnx-cpu", "null")
    result = go(plan(backends=None))
    assert [subject.label for subject in result.subjects] == ["onnx-cpu"], "null only on request"
    (skipped,) = result.skipped
    assert skipped.backend == "unavailable"
    assert "Plug one in" in skipped.reason
    assert exit_code(result) == 0


def test_a_row_that_would_lie_stops_a_run_that_did_not_ask_for_it(plan: MakePlan, only: Callable[..., None]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    only("lying", "onnx-cpu")
    error = refusal(plan(backends=None))
    assert error.exit_code == EXIT_UNAVAILABLE
    assert "lying would not run where its name says" in str(error)


def test_no_backend_at_all_is_an_error(plan: MakePlan, only: Callable[..., None]) -> None:
    only("unavailable", "null")
    assert refusal(plan(backends=None)).exit_code == EXIT_UNAVAILABLE


def test_a_missing_bundle_is_an_error(plan: MakePlan, tmp_path: Path) -> None:
    error = refusal(plan(bundles=(tmp_path / "none",)))
    assert error.exit_code == EXIT_BAD_INPUT
    assert "python -m export" in str(error)


def test_a_bundle_without_a_format(plan: MakePlan, tampered: Callable[..., Path]) -> None:
    def drop(manifest: dict[str, Any]) -> None:
        manifest["files"] = [file for file in manifest["files"] if file["format"] != "torchscript"]

    path = tampered(manifest=drop)
    bundle = Bundle.open(path)
    with pytest.raises(BenchError, match="no torchscript file") as caught:
        select([(None, bundle)], plan(backends=("torchscript-cpu",)))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    subjects, skipped = select([(None, bundle)], plan(backends=None))
    assert "torchscript-cpu" not in [subject.label for subject in subjects]
    assert "torchscript-cpu" in [entry.backend for entry in skipped]


def with_int8(manifest: dict[str, Any]) -> None:
    """Calls a copy of the ONNX file int8 that takes pixels, and leaves no other variant: enough to choose by."""
    plain = [file for file in manifest["files"] if (file["precision"], file["takes"]) == ("float32", "preprocessed")]
    (onnx,) = (file for file in plain if file["format"] == "onnx" and file["folded"])
    manifest["files"] = [*plain, onnx | {"precision": "int8", "takes": "raw"}]


def test_each_backend_runs_the_variants_that_the_bundle_has_for_it(
    plan: MakePlan, tampered: Callable[..., Path]
) -> None:
    bundle = Bundle.open(tampered(manifest=with_int8))
    asked = plan(backends=("torch-cpu", "onnx-cpu", "torchscript-cpu"), variants=("float32", "int8-raw"))
    subjects, skipped = select([(None, bundle)], asked)
    assert [subject.label for subject in subjects] == ["torch-cpu", "onnx-cpu", "onnx-cpu:int8-raw", "torchscript-cpu"]
    assert not skipped
    for variants, words in ((("float16",), "no onnx file"), (("int9",), "unknown variant")):
        with pytest.raises(BenchError, match=words):
            select([(None, bundle)], plan(variants=variants))
    with pytest.raises(BenchError, match="no backend that was chosen has a float16 file"):
        select([(None, bundle)], plan(variants=("float32", "float16")))


def test_choices_name_backend_variant_and_threads(plan: MakePlan, tampered: Callable[..., Path]) -> None:
    bundle = Bundle.open(tampered(manifest=with_int8))
    choices = (Choice("onnx-cpu"), Choice("onnx-cpu", "int8-raw", 1), Choice("onnx-cpu", "int8-raw", 2))
    subjects, _ = select([(None, bundle)], plan(choices=choices))
    assert [(subject.label, subject.options.threads) for subject in subjects] == [
        ("onnx-cpu", 1),
        ("onnx-cpu:int8-raw", 1),
        ("onnx-cpu:int8-raw/2", 2),
    ]


def test_a_control_of_nothing_is_refused(plan: MakePlan, small_bundle: Path) -> None:
    with pytest.raises(BenchError, match="none of the chosen backends") as caught:
        select([(None, Bundle.open(small_bundle))], plan(backends=("torch-cpu",), control=("torch-cpu",)))
    assert caught.value.exit_code == EXIT_USAGE


def test_a_bundle_without_labels_has_no_top1(plan: MakePlan, tampered: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file, save_file

    def unlabel(path: Path) -> None:
        tensors = load_file(path)
        del tensors["labels"]
        save_file(tensors, path)

    result = go(plan(bundles=(tampered("oracle.safetensors", unlabel),), rounds=0))
    (subject,) = result.subjects
    assert subject.parity is not None
    assert subject.parity.passed
    assert subject.parity.top1_percent is None
    assert subject.parity.flips == ()


def test_availability_asks_the_backends_of_a_runtime_in_one_process(only: Callable[..., None]) -> None:
    """One that takes the process down leaves those before it and after it what they are."""
    only("onnx-cpu", "unavailable", "fatal", "raising", "null")
    found = availability(threads=1, timeout_s=60)
    assert "crashed while it was tried: the worker ended with exit code 7" in str(found.pop("fatal"))
    assert found == {
        "onnx-cpu": None,
        "null": None,
        "unavailable": "there is no such accelerator. Plug one in.",
        "raising": None,
    }


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_all_take_turns_on_the_same_cpus(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("there is but one CPU")
    result = run(plan(backends=("onnx-cpu", "null"), rounds=4), lambda what, done: None)
    on = {(sample.round, sample.subject): sample.cpus for sample in result.samples}
    for round_ in range(4):
        assert on[round_, "onnx-cpu"] == on[round_, "null"] == (usable[round_ // 2],)
    assert cpus_for(1, len(usable)) is None, "all of them are in use"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 8})
    assert [cpus_for(turn, 2) for turn in range(4)] == [(3, 4), (3, 8), (4, 8), (3, 4)]

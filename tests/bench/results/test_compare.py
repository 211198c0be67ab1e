"""The gate: a slowdown of known size is found, noise is not, and what can't be compared is not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.machine.environment import Environment, Gpu, fingerprint
from bench.results.compare import Limits, compare, machine_differences
from bench.results.derive import derived
from bench.results.files import write_result
from bench.results.schema import Failure, Result

LIMITS = Limits()
PROCESSES = 4
LABELS = ("onnx-cpu", "onnx-cpu:unfolded", "null")


def taking(result: Result, seed: int, *, noise: float = 0.01, tail: float = 1.0, **slowdowns: float) -> Result:
    """The real result of four processes, with drawn durations: a call takes 1 ms, give or take `noise` from process to
    process, and one in fifty `tail` times that.

    A keyword names a subject (``onnx`` or ``null``) and what its calls take instead, in ms.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for process in range(PROCESSES):
        levels = {label: rng.lognormal(0, noise) for label in LABELS}
        for sample in result.samples:
            call = slowdowns.get(sample.subject.partition("-")[0], 1.0) * levels[sample.subject] * 1e6
            calls = (*(int(call),) * 49, int(tail * call))
            samples.append(sample.model_copy(update={"durations_ns": calls, "process": process}))
    quiet = replace(result.environment, cpu_busy_percent=0.0)
    update = {"samples": tuple(samples), "environment": quiet, "cpu_busy_percents": (0.0,) * PROCESSES}
    return derived(result.model_copy(update=update))


def changed(result: Result, **fields: Any) -> Result:
    """With other fields of its first subject."""
    first, *rest = result.subjects
    return result.model_copy(update={"subjects": (first.model_copy(update=fields), *rest)})


def with_machine(result: Result, **changes: Any) -> Result:
    return result.model_copy(update={"environment": replace(result.environment, **changes)})


def bench(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    from bench.cli.main import main

    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as ending:
        main()
    code = ending.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def test_ten_percent_slower_is_found_and_named(result: Result) -> None:
    found = compare(taking(result, 1), taking(result, 2, onnx=1 / 0.9), LIMITS).slower
    assert {(compared.subject, compared.batch_size, compared.timing) for compared in found} == {
        (subject, batch_size, timing)
        for subject in LABELS[:2]
        for batch_size in (1, 8)
        for timing in ("device_resident", "end_to_end")
    }
    for compared in found:
        ratio = compared.throughput_ratio
        assert ratio.median == pytest.approx(0.9, abs=0.02)
        assert ratio.denominator_median == pytest.approx(1000 * compared.batch_size, rel=0.02)
        assert ratio.numerator_median == pytest.approx(900 * compared.batch_size, rel=0.02)


@pytest.mark.parametrize("milliseconds", [1.0, 1 / 0.98, 0.8], ids=["the same again", "2 % slower", "faster"])
def test_what_is_no_regression_is_not_found(milliseconds: float, result: Result) -> None:
    for seed in range(5):
        comparison = compare(taking(result, seed), taking(result, 100 + seed, onnx=milliseconds), LIMITS)
        assert not comparison.slower, seed
        assert not comparison.worse, seed


@pytest.mark.parametrize("slower", [1.0, 1 / 0.9])
def test_noise_is_inconclusive(slower: float, result: Result) -> None:
    """The processes scatter by thirty percent: nothing can be said, neither that it is slower nor that it isn't."""
    comparison = compare(taking(result, 1, noise=0.3), taking(result, 2, noise=0.3, onnx=slower), LIMITS)
    assert not comparison.slower
    assert len(comparison.inconclusive) == 8


def test_one_process_against_one_is_inconclusive(result: Result) -> None:
    """A process may be a third slower than the next, with a tight interval."""
    alone = [
        derived(made.model_copy(update={"samples": tuple(s for s in made.samples if not s.process)}))
        for made in (taking(result, 1), taking(result, 2, onnx=1.3))
    ]
    comparison = compare(*alone, LIMITS)
    assert not comparison.slower
    assert len(comparison.inconclusive) == 8


def test_a_busy_machine_raises_no_alarm(result: Result) -> None:
    head = taking(result, 2, onnx=5.0).model_copy(update={"cpu_busy_percents": (50.0,) * PROCESSES})
    comparison = compare(taking(result, 1), head, LIMITS)
    assert not comparison.slower
    assert not comparison.worse
    assert comparison.inconclusive


def test_null_is_compared_and_not_judged(result: Result) -> None:
    comparison = compare(taking(result, 1), taking(result, 2, null=3.0), LIMITS)
    (null, *_) = (compared for compared in comparison.found if compared.subject == "null")
    assert null.throughput_ratio.median < 0.4
    assert null.decision == "slower"
    assert not comparison.slower
    assert not comparison.worse


def without(result: Result, label: str, batch_size: int | None = None) -> Result:
    """Without a subject, or one of its batch sizes."""
    samples = [s for s in result.samples if s.subject != label or batch_size not in (None, s.batch_size)]
    subjects = [s for s in result.subjects if s.label != label or batch_size is not None]
    return derived(result.model_copy(update={"samples": tuple(samples), "subjects": tuple(subjects)}))


@pytest.mark.parametrize("batch_size", [None, 8])
def test_what_vanished_is_worse(batch_size: int | None, result: Result) -> None:
    base, head = taking(result, 1), taking(result, 2)
    comparison = compare(base, without(head, "onnx-cpu", batch_size), LIMITS)
    where = "onnx-cpu" if batch_size is None else "onnx-cpu at batch 8"
    assert [(worse.gate, worse.what) for worse in comparison.worse] == [("presence", where)]
    comparison = compare(without(base, "onnx-cpu", batch_size), head, LIMITS)
    assert not comparison.worse
    assert comparison.only_in_head == ((*(() if batch_size else ("onnx-cpu at batch 1",)), "onnx-cpu at batch 8"))
    assert not compare(base, without(head, "null"), LIMITS).worse, "null is there for the harness's sake"


def test_what_crashes_now_is_worse(result: Result) -> None:
    """It had been measured for some rounds before it crashed: those figures don't count."""
    crash = Failure(kind="crashed", message="SIGSEGV", trace="")
    head = changed(taking(result, 2), failure=crash)
    comparison = compare(taking(result, 1), head, LIMITS)
    assert [(worse.gate, worse.what) for worse in comparison.worse] == [("presence", "onnx-cpu")]
    assert "SIGSEGV" in comparison.worse[0].seen
    assert {compared.subject for compared in comparison.found} == {"onnx-cpu:unfolded", "null"}
    assert not compare(head, taking(result, 1), LIMITS).worse, "it works again"


def test_what_is_wrong_now_is_worse(result: Result) -> None:
    parity = result.subjects[0].parity
    assert parity is not None
    head = changed(taking(result, 2), parity=replace(parity, passed=False, failures=("5 predictions flipped",)))
    (worse,) = compare(taking(result, 1), head, LIMITS).worse
    assert (worse.gate, worse.what, worse.seen) == ("parity", "onnx-cpu", "5 predictions flipped")


@pytest.mark.parametrize("processes", [PROCESSES, 1])
@pytest.mark.parametrize(("tail", "found"), [(1.1, False), (5.0, True)])
def test_a_later_p99_is_worse(tail: float, found: bool, processes: int, result: Result) -> None:
    """The median is as it was. Of one process, it is the base's bound that must be exceeded."""
    base, head = (
        derived(made.model_copy(update={"samples": tuple(s for s in made.samples if s.process < processes)}))
        for made in (taking(result, 1), taking(result, 2, tail=tail))
    )
    comparison = compare(base, head, LIMITS)
    gates = {(worse.gate, worse.what.partition(" at ")[0]) for worse in comparison.worse}
    assert gates == ({("p99", "onnx-cpu"), ("p99", "onnx-cpu:unfolded")} if found else set())
    assert not compare(base, head, replace(LIMITS, p99=1000)).worse


@pytest.mark.parametrize(("factor", "found"), [(1.04, False), (2.0, True)])
def test_a_larger_file_is_worse(factor: float, found: bool, result: Result) -> None:
    file = result.subjects[0].file
    assert file is not None
    assert file.bytes is not None
    head = changed(taking(result, 2), file=file.model_copy(update={"bytes": int(factor * file.bytes)}))
    gates = [worse.gate for worse in compare(taking(result, 1), head, LIMITS).worse]
    assert gates == (["file size"] if found else [])


@pytest.mark.parametrize("where", ["peak_memory_bytes", "peak_gpu_memory_bytes"])
@pytest.mark.parametrize(("held", "found"), [(1100, False), (2000, True), (None, False)])
def test_more_memory_is_worse(where: str, held: int | None, found: bool, result: Result) -> None:
    base = changed(taking(result, 1), **{where: 1000})
    gates = [worse.gate for worse in compare(base, changed(taking(result, 2), **{where: held}), LIMITS).worse]
    assert gates == (["GPU memory" if "gpu" in where else "memory"] if found else [])


def test_a_gate_does_not_pass_on_nothing(result: Result) -> None:
    """Nothing in common but null."""
    base = taking(result, 1)
    idle = without(without(base, "onnx-cpu"), "onnx-cpu:unfolded")
    with pytest.raises(BenchError, match=r"The base has null at batch 1.*the head has onnx-cpu at batch 1") as caught:
        compare(idle, base, LIMITS)
    assert caught.value.exit_code == 4


def machine(**changes: Any) -> Environment:
    fields: dict[str, Any] = {
        "platform": "Linux",
        "python": "3.11",
        "versions": {},
        "cpu": "Epyc",
        "logical_cpus": 8,
        "physical_cpus": 4,
        "usable_cpus": 8,
        "memory_bytes": 31 * 2**30,
        "gpus": (Gpu("H100", "570.1", 80 * 2**30, 700.0),),
        "load_1min": 0.1,
        "cpu_busy_percent": 1.0,
        "git_commit": None,
    }
    known = {name: value for name, value in (fields | changes).items() if name in Environment.__dataclass_fields__}
    return Environment(**known)


@pytest.mark.parametrize(
    "same",
    [
        {"memory_bytes": 32 * 2**30},
        {"memory_bytes": 30 * 2**30},
        {"versions": {"torch": "3"}, "python": "3.14", "load_1min": 7.0, "cpu_busy_percent": 90.0, "git_commit": "a"},
        {"gpus": (Gpu("H100", "570.1", 80 * 2**30, 500.0),)},
    ],
)
def test_one_machine_has_one_fingerprint(same: dict[str, Any]) -> None:
    assert fingerprint(machine(**same), 8, "strict") == fingerprint(machine(), 8, "strict")


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"cpu": "Xeon"}, "CPU"),
        ({"usable_cpus": 4}, "usable CPUs"),
        ({"memory_bytes": 46 * 2**30}, "memory"),
        ({"gpus": ()}, "GPUs"),
        ({"gpus": (Gpu("H100", "580.2", 80 * 2**30, 700.0),)}, "GPUs"),
    ],
)
def test_another_machine_has_another_fingerprint(changed: dict[str, Any], name: str) -> None:
    before, after = (fingerprint(environment, 8, "strict") for environment in (machine(), machine(**changed)))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_settings_count_as_the_machine_does(result: Result) -> None:
    other = result.model_copy(update={"settings": result.settings.model_copy(update={"threads": 7})})
    assert machine_differences(result, other) == ("threads: 1 against 7",)
    assert machine_differences(result, with_machine(other, cpu="another")) == (
        f"CPU: {result.environment.cpu} against another",
        "threads: 1 against 7",
    )
    assert machine_differences(result, result) == ()


def unbroken(text: str) -> str:
    """Without the line breaks of a narrow window."""
    return " ".join(text.split())


def test_the_command(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        "base": taking(result, 1),
        "again": taking(result, 2),
        "slow": taking(result, 3, onnx=1.2),
        "noisy": taking(result, 4, noise=0.3),
        "late": taking(result, 5, tail=5.0),
        "elsewhere": with_machine(taking(result, 2), cpu="another", usable_cpus=99),
    }
    paths = {name: tmp_path / f"{name}.json" for name in names}
    for name, made in names.items():
        write_result(made, paths[name])

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["again"])
    assert (code, err) == (0, "")
    assert "none is shown to be slower than the base by more than 5 %, each shown by its interval" in unbroken(out)
    assert "weaker evidence" in out
    assert "bench ab" in out

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["slow"])
    assert (code, err) == (1, "")
    assert "slower onnx-cpu at batch 1, device resident: 0.8" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:4] == ["onnx-cpu", "8", "device", "resident"])
    assert row[4].startswith(("7,9", "8,0"))
    assert row[5].startswith("6,")
    assert row[6].startswith("0.8")
    assert bench(capsys, monkeypatch, "compare", paths["base"], paths["slow"], "--threshold", "25")[0] == 0

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["noisy"])
    assert (code, err) == (5, "")
    assert "inconclusive for 8 of 8: more processes narrow the interval" in unbroken(out)
    assert bench(capsys, monkeypatch, "compare", paths["base"], paths["noisy"], "--allow-inconclusive")[0] == 0

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["late"])
    assert (code, err) == (1, "")
    assert "p99 onnx-cpu at batch 1, device resident: 5." in out
    laxer = ("--p99-threshold", "900", "--threshold", "30")
    assert bench(capsys, monkeypatch, "compare", paths["base"], paths["late"], *laxer)[0] == 0

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["elsewhere"])
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert f"CPU: {result.environment.cpu} against another" in err
    assert f"usable CPUs: {result.environment.usable_cpus} against 99" in err
    code, out, _ = bench(capsys, monkeypatch, "compare", paths["base"], paths["elsewhere"], "--allow-different-machine")
    assert code == 0
    assert "not the same machine: usable CPUs" in out

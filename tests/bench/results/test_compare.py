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
from bench.results.compare import compare, machine_differences, regressions
from bench.results.files import write_result
from bench.results.schema import Failure, Result

LABELS = ("onnx-cpu", "onnx-cpu:unfolded", "null")


def taking(result: Result, seed: int, *, noise: float = 0.01, **slowdowns: float) -> Result:
    """The real result with drawn durations: a call takes 1 ms, give or take `noise` from round to round.

    A keyword names a subject (``onnx`` or ``null``) and what its calls take instead, in ms.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for sample in result.samples:
        milliseconds = slowdowns.get(sample.subject.partition("-")[0], 1.0) * rng.lognormal(0, noise)
        samples.append(sample.model_copy(update={"durations_ns": (int(milliseconds * 1e6),) * 5}))
    return result.model_copy(update={"samples": tuple(samples)})


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
    comparison = compare(taking(result, 1), taking(result, 2, onnx=1 / 0.9))
    found = regressions(comparison, 5)
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
        head = taking(result, 100 + seed, onnx=milliseconds)
        assert not regressions(compare(taking(result, seed), head), 5), seed


def test_the_whole_interval_has_to_lie_below(result: Result) -> None:
    """Ten percent slower, but the rounds scatter by thirty: nothing can be said."""
    assert not regressions(compare(taking(result, 1, noise=0.3), taking(result, 2, noise=0.3, onnx=1 / 0.9)), 5)


def test_null_is_compared_and_not_judged(result: Result) -> None:
    comparison = compare(taking(result, 1), taking(result, 2, null=3.0))
    (one, *_) = (compared for compared in comparison.found if compared.subject == "null")
    assert one.throughput_ratio.median < 0.4
    assert not regressions(comparison, 5)


def test_what_only_one_has_is_named(result: Result) -> None:
    base, head = taking(result, 1), taking(result, 2)
    fewer = head.model_copy(
        update={"samples": tuple(s for s in head.samples if (s.subject, s.batch_size) != ("onnx-cpu", 8))}
    )
    comparison = compare(base, fewer)
    assert (comparison.only_in_base, comparison.only_in_head) == (("onnx-cpu at batch 8",), ())
    comparison = compare(fewer, base)
    assert (comparison.only_in_base, comparison.only_in_head) == ((), ("onnx-cpu at batch 8",))


def test_a_backend_that_crashes_now_is_broken_not_missing(result: Result) -> None:
    """It had been measured for some rounds before it crashed: those figures don't count."""
    crash = Failure(kind="crashed", message="SIGSEGV", trace="")
    first, *rest = result.subjects
    head = taking(result, 2).model_copy(update={"subjects": (first.model_copy(update={"failure": crash}), *rest)})
    comparison = compare(taking(result, 1), head)
    assert comparison.broken == ("onnx-cpu",)
    assert not comparison.only_in_base
    assert {compared.subject for compared in comparison.found} == {"onnx-cpu:unfolded", "null"}
    assert compare(head, taking(result, 1)).broken == (), "it works again"


def test_a_gate_does_not_pass_on_nothing(result: Result) -> None:
    """Nothing in common but null, or too few rounds for an interval."""
    base = taking(result, 1)
    idle = base.model_copy(update={"samples": tuple(s for s in base.samples if s.subject == "null")})
    short = base.model_copy(update={"samples": tuple(s for s in base.samples if s.round < 5)})
    with pytest.raises(
        BenchError, match=r"onnx-cpu at batch 1 \(7 rounds\).*the head has null at batch 1 \(7 rounds\)"
    ):
        compare(base, idle)
    with pytest.raises(BenchError, match=r"--rounds 6") as caught:
        compare(base, short)
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


def test_the_command(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        "base": taking(result, 1),
        "again": taking(result, 2),
        "slow": taking(result, 3, onnx=1.2),
        "elsewhere": with_machine(taking(result, 2), cpu="another", usable_cpus=99),
    }
    paths = {name: tmp_path / f"{name}.json" for name in names}
    for name, made in names.items():
        write_result(made, paths[name])

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["again"])
    assert (code, err) == (0, "")
    assert "none is shown to be slower than the base by more than 5 %" in out
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

    code, out, err = bench(capsys, monkeypatch, "compare", paths["base"], paths["elsewhere"])
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert f"CPU: {result.environment.cpu} against another" in err
    assert f"usable CPUs: {result.environment.usable_cpus} against 99" in err
    code, out, _ = bench(capsys, monkeypatch, "compare", paths["base"], paths["elsewhere"], "--allow-different-machine")
    assert code == 0
    assert "not the same machine: usable CPUs" in out

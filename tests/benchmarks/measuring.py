"""Whether the measurements of `bench` can be believed: experiments with a known answer.

    python tests/benchmarks/measuring.py overhead            what the harness adds to a call
    python tests/benchmarks/measuring.py aa [N]              a bundle against itself, N times: false alarms
    python tests/benchmarks/measuring.py busy [N]            the same with another process at work
    python tests/benchmarks/measuring.py slow [N]            a known slowdown, N times each: how often it is found
    python tests/benchmarks/measuring.py agreement           against onnxruntime in a bare loop
    python tests/benchmarks/measuring.py loadgen [N]         the p50 of N runs of LoadGen SingleStream against bench's

Results go to docs/results/measuring.json, one entry for each experiment. They need `nox -s train export` first, and a
machine that does nothing else (`busy` brings its own disturbance).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))

from bundles import shorten

from bench.backends.contract import Options, Profile, Runnable, Session
from bench.backends.registry import BACKENDS, resolve
from bench.report.wording import ratio_words
from bench.results.derive import slower
from bench.results.schema import Result
from bench.results.terms import Scenario
from bench.run.lanes import loaded
from bench.run.plan import Plan
from bench.run.rounds import run
from bench.worker.clock import timed_block, wait_until_quiet
from bench.worker.loadgen import Driven, Load, read_summary
from bench.worker.messages import Drive, Measure, Measured, Prepare, Prepared
from export.bundle import Bundle

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "artifacts" / "bundles" / "article"
RESULTS = ROOT / "docs" / "results" / "measuring.json"
IMAGES = 300
"""So many of the oracle's inputs: parity is not what is tried here."""
BATCH_SIZE, BLOCK_S, TIME_LIMIT_S, THREADS = 64, 0.02, 30.0, 1
# Short, and many: a virtual machine's speed was seen to change by half within seconds, and to stay for seconds.
LOADGEN_S, SAME_SPEED = 0.5, 0.03
SLOWED = "slowed"
SLOW_FOLDER = "slow-"


class SlowedSession:
    """A session whose `run` takes longer by a share of its own time, spent spinning."""

    def __init__(self, inner: Session, share: float) -> None:
        self._inner, self._share = inner, share

    def run(self, prepared: Any) -> Any:
        before = time.perf_counter()
        output = self._inner.run(prepared)
        end = before + (time.perf_counter() - before) * (1 + self._share)
        while time.perf_counter() < end:
            pass
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class Slowed:
    """onnx-cpu, slowed down by as many percent as the bundle's folder says (`slow-10`), and not for any other."""

    name: str = SLOWED
    device: str = "cpu"
    formats: tuple[str, ...] = ("onnx",)
    reference: bool = False
    on_request: bool = True
    shows_fold: bool = False
    server: None = None

    def program(self, file: Runnable) -> None:
        return None

    def unavailable_reason(self) -> str | None:
        return resolve(BACKENDS["onnx-cpu"]).unavailable_reason()

    def load(self, bundle: Bundle, options: Options) -> SlowedSession:
        name = bundle.path.name
        share = float(name.removeprefix(SLOW_FOLDER)) / 100 if name.startswith(SLOW_FOLDER) else 0.0
        return SlowedSession(resolve(BACKENDS["onnx-cpu"]).load(bundle, options), share)


SLOWED_BACKEND = Slowed()


@contextlib.contextmanager
def short_bundle(*names: str) -> Iterator[list[Path]]:
    """Copies of the article's bundle with a short oracle, one for each name."""
    with tempfile.TemporaryDirectory() as folder:
        yield [shorten(BUNDLE, Path(folder) / name, IMAGES) for name in names]


def compare(bundles: list[Path], backend: str, threshold_percent: float) -> Result:
    """What `bench ab` does, with short settings."""
    plan = Plan(
        bundles=tuple(bundles),
        backends=(backend,),
        batch_sizes=(BATCH_SIZE,),
        rounds=None,
        bound=1 - threshold_percent / 100,
        time_limit_s=TIME_LIMIT_S,
        block_s=BLOCK_S,
        threads=THREADS,
        profile=Profile.STRICT,
        timeout_s=60.0,
    )
    return run(plan, lambda what, done: None)


def comparisons(count: int, percent: float, threshold_percent: float) -> dict[str, Any]:
    """`count` comparisons of a bundle with its copy, slowed down by `percent`: how many were called slower."""
    found, medians, rounds, unstable, seconds = 0, [], [], 0, []
    with short_bundle("base", f"{SLOW_FOLDER}{percent:g}") as bundles:
        for number in range(count):
            began = time.perf_counter()
            result = compare(bundles, SLOWED, threshold_percent)
            seconds.append(time.perf_counter() - began)
            called = [ratio for ratio in slower(result.ratios, threshold_percent) if ratio.timing == "device_resident"]
            (ratio,) = (r.throughput_ratio for r in result.ratios if r.timing == "device_resident")
            found += bool(called)
            medians.append(ratio.median)
            rounds.append(ratio.rounds)
            unstable += any(row.verdict == "unstable" for row in result.rows)
            print(f"{number + 1}: {ratio_words(ratio, '.3f')}, {ratio.rounds} rounds", flush=True)
    return {
        "comparisons": count,
        "slowdown_percent": percent,
        "threshold_percent": threshold_percent,
        "called_slower": found,
        "unstable": unstable,
        "ratio_median": statistics.median(medians),
        "ratio_lowest": min(medians),
        "ratio_highest": max(medians),
        "rounds_median": statistics.median(rounds),
        "seconds_median": round(statistics.median(seconds), 1),
        "settings": {"batch_size": BATCH_SIZE, "block_s": BLOCK_S, "threads": THREADS, "time_limit_s": TIME_LIMIT_S},
    }


def overhead() -> dict[str, Any]:
    """A call of the null backend's `run`, timed as `bench` does, against the same call in a bare loop."""
    session = resolve(BACKENDS["null"]).load(Bundle.open(BUNDLE), Options(threads=1))
    prepared = session.prepare(np.zeros((1, 28, 28), np.uint8))
    calls, extra = 10_000, []
    for _ in range(50):
        before = time.perf_counter_ns()
        for _ in range(calls):
            session.run(prepared)
        bare = (time.perf_counter_ns() - before) / calls
        before = time.perf_counter_ns()
        block = timed_block(lambda: session.run(prepared), "device_resident", 1.0)
        whole = time.perf_counter_ns() - before - 10_000_000  # less the lead-in
        extra.append((whole / len(block.durations_ns) - bare, statistics.median(block.durations_ns) - bare))
    return {
        "harness_ns_per_call": round(statistics.median(e[0] for e in extra), 1),
        "of_that_in_the_duration_ns": round(statistics.median(e[1] for e in extra), 1),
    }


def agreement() -> dict[str, Any]:
    """onnx-cpu, device-resident, as `bench` measures it against onnxruntime in a bare loop, in turns in one process."""
    import onnxruntime

    bundle = Bundle.open(BUNDLE)
    session = resolve(BACKENDS["onnx-cpu"]).load(bundle, Options(threads=THREADS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    path = str(bundle.locate(bundle.entry("onnx")))
    bare = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = {}
    for batch_size in (1, BATCH_SIZE):
        prepared = session.prepare(np.ascontiguousarray(bundle.oracle().raw[:batch_size]))
        feeds = {bundle.manifest.input.name: prepared}
        ratios = []
        for _ in range(40):
            block = timed_block(partial(session.run, prepared), "device_resident", 0.1)
            ours = sum(block.durations_ns) / len(block.durations_ns)
            wait_until_quiet()
            until, calls = time.perf_counter_ns() + 10_000_000, 0
            while time.perf_counter_ns() < until:
                bare.run(None, feeds)
            before = time.perf_counter_ns()
            while time.perf_counter_ns() < before + 100_000_000:
                bare.run(None, feeds)
                calls += 1
            ratios.append(ours / ((time.perf_counter_ns() - before) / calls))
            wait_until_quiet()
        found[str(batch_size)] = round(statistics.median(ratios), 4)
    return {"time_by_bench_over_bare_loop": found, "rounds": 40}


def loadgen(count: int) -> dict[str, Any]:
    """One image end to end: the median latency of LoadGen's SingleStream, and that of the blocks before and after it,
    `count` times.

    In turns in one worker, so that both see the same model, threads and memory. Where the two blocks differ by more
    than `SAME_SPEED` the machine changed its speed in between, and the pair says nothing.
    """
    ours_ms, theirs_ms = [], []
    with short_bundle("base") as (bundle,), tempfile.TemporaryDirectory() as logs:
        plan = Plan((bundle,), ("onnx-cpu",), threads=THREADS, profile=Profile.STRICT, timeout_s=60.0)
        with loaded(plan, lambda what, done: None) as ready:
            worker = ready.lanes[0].worker
            worker.ask(Prepare(1), Prepared)

            def block_ms() -> float:
                measured = worker.ask(Measure(1, LOADGEN_S / 2), Measured)
                (block,) = (block for block in measured.blocks if block.timing == "end_to_end")
                return statistics.median(block.durations_ns) * 1e-6

            for number in range(count):
                before = block_ms()
                load = Load(Scenario.SINGLE_STREAM, False, LOADGEN_S, 1, 1e3 / before)
                folder = Path(logs) / str(number)
                worker.ask(Drive(load, folder, LOADGEN_S), Driven)
                after = block_ms()
                if abs(after / before - 1) <= SAME_SPEED:
                    ours_ms.append((before + after) / 2)
                    theirs_ms.append(read_summary(folder).latency_ns[50.0] * 1e-6)
    ratios = sorted(theirs / ours for theirs, ours in zip(theirs_ms, ours_ms, strict=True))
    more_ms = statistics.median(a - b for a, b in zip(theirs_ms, ours_ms, strict=True))
    return {
        "pairs": count,
        "pairs_at_one_speed": len(ours_ms),
        "bench_p50_ms": ours_ms,
        "loadgen_p50_ms": theirs_ms,
        "loadgen_over_bench_median": statistics.median(ratios),
        "loadgen_over_bench_range": [ratios[0], ratios[-1]],
        "difference_us_median": 1000 * more_ms,
        "three_percent_and_10_us": 1000 * (0.03 * statistics.median(ours_ms) + 0.01),
    }


def _spin(stop: Any) -> None:
    while not stop.is_set():
        np.linalg.norm(np.ones(100_000))


def busy(count: int) -> dict[str, Any]:
    """As `comparisons` without a slowdown, while another process computes."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    other = context.Process(target=_spin, args=(stop,))
    other.start()
    try:
        return comparisons(count, 0, 5)
    finally:
        stop.set()
        other.join()


def store(name: str, found: Any) -> None:
    """Add or replace an experiment's entry."""
    import cpuinfo

    have = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cpu": cpuinfo.get_cpu_info().get("brand_raw"), "platform": platform.platform()}
    have[name] = {"date": date.today().isoformat(), **machine, "found": found}
    RESULTS.write_text(json.dumps(have, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    BACKENDS[SLOWED] = "measuring:SLOWED_BACKEND"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    match sys.argv[1:]:
        case ["overhead"]:
            store("overhead", overhead())
        case ["aa", *_]:
            store("aa", comparisons(count, 0, 5))
        case ["busy", *_]:
            store("busy", busy(count))
        case ["slow", *_]:
            store("slow", [comparisons(count, 10, 5), comparisons(count, 5, 2)])
        case ["agreement"]:
            store("agreement", agreement())
        case ["loadgen", *_]:
            store("loadgen", loadgen(count))
        case _:
            print(__doc__)

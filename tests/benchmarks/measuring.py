"""Whether the measurements of `bench` can be believed: experiments with a known answer.

    python tests/benchmarks/measuring.py overhead            what the harness adds to a call
    python tests/benchmarks/measuring.py aa [N]              a bundle against itself, N times: false alarms
    python tests/benchmarks/measuring.py aa-default [N]      the same with the settings of a plain `bench ab`, with two
                                                             and with four backends (one and a half minutes each)
    python tests/benchmarks/measuring.py busy [N]            as `aa`, with another process at work
    python tests/benchmarks/measuring.py slow [N]            a known slowdown, N times each: how often it is found
    python tests/benchmarks/measuring.py noise [N]           8 % slower in rounds that scatter by 8 %, N times
    python tests/benchmarks/measuring.py coverage [N]        N runs of the same: intervals that hold the middle
    python tests/benchmarks/measuring.py agreement           against onnxruntime in a bare loop, in one process
    python tests/benchmarks/measuring.py peers [N]           against onnxruntime in a bare loop, torch.utils.benchmark
                                                             and OpenVINO's benchmark_app, N processes of each
    python tests/benchmarks/measuring.py loadgen [N]         the p50 of N runs of LoadGen SingleStream against bench's

Results go to docs/results/measuring.json, one entry for each experiment. Each comparison of two bundles is a line of
docs/results/measuring/EXPERIMENT.jsonl as soon as it is done; N more are added to those that were made with the same
settings on the same kind of CPU, and the entry is of all of them. They need `nox -s train export` first, and a
machine that does nothing else (`busy` brings its own disturbance).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))

from bundles import shorten

from bench.backends.contract import Options, Profile, Runnable, Session, file_of
from bench.backends.registry import BACKENDS, resolve
from bench.cli.measure import AB_BATCH_SIZES, AB_ROUNDS, AB_TIME_LIMIT_S, DEFAULT_BLOCK_MS, DEFAULT_PROCESSES
from bench.machine.environment import usable_cpus
from bench.report.wording import ratio_words
from bench.results.derive import verdicts, was_busy
from bench.results.schema import Result
from bench.results.statistics import Spread
from bench.results.terms import TIMINGS, Scenario
from bench.run.lanes import lanes_of, loaded
from bench.run.plan import Plan, Rounds, Selection
from bench.run.rounds import run
from bench.worker.clock import timed_block, wait_until_quiet
from bench.worker.loadgen import Driven, Load, read_summary
from bench.worker.messages import Drive, Measure, Measured, Prepare, Prepared
from export.bundle import Bundle
from trainer.provenance import cpu_name

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "artifacts" / "bundles" / "article"
RESULTS = ROOT / "docs" / "results" / "measuring.json"
RAW = RESULTS.with_suffix("")
IMAGES = 300
"""So many of the oracle's inputs: parity is not what is tried here."""
BATCH_SIZE, BLOCK_S, TIME_LIMIT_S, THREADS = 64, 0.02, 30.0, 1
# Short, and many: a virtual machine's speed was seen to change by half within seconds, and to stay for seconds.
LOADGEN_S, SAME_SPEED = 0.5, 0.03
SLOWED = "slowed"
SLOW_FOLDER = "slow-"
PAUSE_S = 0.02


class SlowedSession:
    """A session whose `run` takes longer by a share of its own time, spent spinning. The share is drawn anew for each
    turn, around `share` with the deviation `noise`: a turn follows a pause.
    """

    def __init__(self, inner: Session, share: float, noise: float) -> None:
        self._inner, self._share, self._noise = inner, share, noise
        self._rng = np.random.default_rng()
        self._last, self._now = 0.0, share

    def run(self, prepared: Any) -> Any:
        before = time.perf_counter()
        if self._noise and before - self._last > PAUSE_S:
            # Around the middle of the noise, so that spinning alone makes it.
            self._now = (1 + self._share) * float(np.exp(abs(self._rng.normal(0, self._noise)))) - 1
        output = self._inner.run(prepared)
        end = before + (time.perf_counter() - before) * (1 + self._now)
        while time.perf_counter() < end:
            pass
        self._last = time.perf_counter()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class Slowed:
    """onnx-cpu, slowed down by as many percent as the bundle's folder says, with so much noise (`slow-10-0`)."""

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
        share, noise = (float(percent) / 100 for percent in bundle.path.name.removeprefix(SLOW_FOLDER).split("-"))
        return SlowedSession(resolve(BACKENDS["onnx-cpu"]).load(bundle, options), share, noise)


SLOWED_BACKEND = Slowed()


@contextlib.contextmanager
def short_bundle(*names: str, numbered: bool = False) -> Iterator[list[Path]]:
    """Copies of the article's bundle with a short oracle, one for each name; `numbered`: each in a folder of its own,
    as two may have the same name.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / (str(number) if numbered else "") / name for number, name in enumerate(names)]
        yield [shorten(BUNDLE, place, IMAGES) for place in places]


SHORT = Rounds((BATCH_SIZE,), BLOCK_S, count=AB_ROUNDS, processes=None, time_limit_s=TIME_LIMIT_S)
"""One backend and batch size, and one thread."""
DEFAULT = Rounds(AB_BATCH_SIZES, DEFAULT_BLOCK_MS / 1000, count=AB_ROUNDS, processes=None, time_limit_s=AB_TIME_LIMIT_S)
"""Those of `bench ab`."""


def compare(
    bundles: list[Path], backends: tuple[str, ...], threads: int, rounds: Rounds, threshold_percent: float
) -> Result:
    """What `bench ab` does."""
    measured = replace(rounds, bound=1 - threshold_percent / 100)
    plan = Plan(Selection(tuple(bundles), backends), threads, Profile.STRICT, 60.0, measured)
    return run(plan, lambda what, done: None)


def comparisons(
    name: str,
    count: int,
    percent: float,
    threshold_percent: float,
    noise_percent: float = 0,
    backends: tuple[str, ...] = (SLOWED,),
    threads: int = THREADS,
    rounds: Rounds = SHORT,
) -> dict[str, Any]:
    """`count` comparisons of a bundle with its copy, slowed down by `percent`: what was decided of each ratio.

    A slowdown is one of the device-resident timing: there it is known. Of a bundle against itself all ratios count.
    """
    timings = ("device_resident",) if percent or noise_percent else TIMINGS
    settings = {
        "cpu": cpu_name(),
        "slowdown_percent": percent,
        "noise_percent": noise_percent,
        "threshold_percent": threshold_percent,
        "backends": list(backends),
        "threads": threads,
        **json.loads(json.dumps(asdict(rounds))),
    }
    raw = RAW / f"{name}.jsonl"
    raw.parent.mkdir(exist_ok=True)
    with short_bundle(
        *(f"{SLOW_FOLDER}{slower:g}-{noise_percent:g}" for slower in (0, percent)), numbered=True
    ) as pair:
        for _ in range(count):
            began = time.perf_counter()
            result = compare(pair, backends, threads, rounds, threshold_percent)
            found = [(r, decision) for r, decision in verdicts(result, threshold_percent) if r.timing in timings]
            line = {
                "date": date.today().isoformat(),
                "settings": settings,
                "decisions": [decision for _, decision in found],
                "ratios": [asdict(ratio.throughput_ratio) for ratio, _ in found],
                "busy": was_busy(result),
                "seconds": round(time.perf_counter() - began, 1),
            }
            with raw.open("a") as file:
                file.write(json.dumps(line) + "\n")
            words = ", ".join(f"{ratio_words(ratio.throughput_ratio, '.3f')} {decision}" for ratio, decision in found)
            print(f"{words}; {line['seconds']:.0f} s", flush=True)
    return summary([line for line in map(json.loads, raw.read_text().splitlines()) if line["settings"] == settings])


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What was decided in comparisons of the same settings: of whole runs, as their exit code says, and of ratios."""
    order = ("slower", "inconclusive", "not slower")
    ratios = [ratio["median"] for line in lines for ratio in line["ratios"]]
    return {
        "comparisons": len(lines),
        "dates": sorted({line["date"] for line in lines}),
        "runs": dict(Counter(min(line["decisions"], key=order.index) for line in lines)),
        "ratios": dict(Counter(decision for line in lines for decision in line["decisions"])),
        "runs_on_a_busy_machine": sum(line["busy"] for line in lines),
        "ratio_median": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "processes_median": statistics.median(line["ratios"][0]["processes"] for line in lines),
        "seconds_median": statistics.median(line["seconds"] for line in lines),
        "settings": lines[0]["settings"],
    }


def by_default(count: int) -> list[dict[str, Any]]:
    """As a plain `bench ab`, with two and with four backends."""
    four = ("torchscript-cpu", "onnx-cpu", "openvino-cpu", "onnx-cpu-parallel")
    return [comparisons("aa-default", count, 0, 5, 0, names, usable_cpus(), DEFAULT) for names in (four[1:3], four)]


def coverage(count: int) -> dict[str, Any]:
    """`count` separate runs of the same: the share of rows whose stated interval holds the median of all runs'."""
    rounds = Rounds((1, BATCH_SIZE), 0.1, count=3, processes=DEFAULT_PROCESSES)
    spreads: dict[str, list[Spread]] = {}
    with short_bundle("base") as bundles:
        plan = Plan(
            Selection(tuple(bundles), ("torchscript-cpu", "onnx-cpu")), usable_cpus(), Profile.STRICT, 60.0, rounds
        )
        for _ in range(count):
            for row in run(plan, lambda what, done: None).rows:
                for timing in TIMINGS:
                    spreads.setdefault(f"{row.subject}, batch {row.batch_size}, {timing}", []).append(
                        row.throughput(timing)
                    )
    held = {}
    for name, found in spreads.items():
        middle = statistics.median(spread.median for spread in found)
        held[name] = sum((spread.low or 0) <= middle <= (spread.high or 0) for spread in found)
    return {
        "runs": count,
        "rows_that_hold_the_middle_percent": round(100 * sum(held.values()) / (count * len(held)), 1),
        "of_each_row": held,
        "medians": {name: [round(spread.median, 1) for spread in found] for name, found in spreads.items()},
        "half_width_percent_median": {
            name: round(statistics.median(spread.half_width_percent or 0 for spread in found), 2)
            for name, found in spreads.items()
        },
        "settings": asdict(rounds),
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


PEERS = {
    "onnx-cpu": (
        "import onnxruntime, time; o = onnxruntime.SessionOptions(); o.intra_op_num_threads = {threads}; "
        "s = onnxruntime.InferenceSession({path!r}, o, providers=['CPUExecutionProvider']); "
        "f = {{s.get_inputs()[0].name: numpy.load({x!r})}}; run = lambda: s.run(None, f); end = time.time() + 1\n"
        "while time.time() < end: run()\n"
        "took, start = [time.perf_counter()], time.perf_counter()\n"
        "while took[-1] < start + {seconds}: run(); took.append(time.perf_counter())\n"
        "print(numpy.median(numpy.diff(took)))"
    ),
    "torch-cpu": (
        "import torch, torch.utils.benchmark as b; torch.set_num_threads({threads}); "
        "m = torch.export.load({path!r}).module(check_guards=False); m = torch.fx.GraphModule(m, m.graph).eval(); "
        "x = torch.from_numpy(numpy.load({x!r}))\n"
        "with torch.inference_mode():\n"
        "    t = b.Timer('m(x)', globals=dict(m=m, x=x), num_threads={threads}); t.timeit(20)\n"
        "    print(t.blocked_autorange(min_run_time={seconds}).median)"
    ),
}
"""What prints the seconds of a call, given `path`, `x` (a .npy of the prepared input), `threads` and `seconds`."""


def peers(count: int) -> dict[str, Any]:
    """Device-resident calls as `bench` times them over the same file and threads in the runtime's own benchmark.

    Processes of both sides take turns: each has its own draw of memory, so that the medians of many are compared.
    """
    bundle, seconds, threads = Bundle.open(BUNDLE), 2.0, usable_cpus()
    found: dict[str, Any] = {}
    with short_bundle("base") as (path,), tempfile.TemporaryDirectory() as folder:
        for backend, batch_size in itertools.product(("onnx-cpu", "torch-cpu", "openvino-cpu"), (1, BATCH_SIZE)):
            x = Path(folder) / f"{batch_size}.npy"
            raw = np.ascontiguousarray(bundle.oracle().raw[:batch_size])
            np.save(x, bundle.manifest.preprocessing.apply(raw, bundle.manifest.input.shape))
            entry = file_of(resolve(BACKENDS[backend]), bundle, Options(threads, folded=backend != "torch-cpu"))
            assert entry is not None
            ours, theirs = [], []
            rounds = Rounds((batch_size,), seconds, count=1)
            plan = Plan(Selection((path,), (backend,)), threads, Profile.STRICT, 60.0, rounds)
            for _ in range(count):
                (block,) = (s for s in run(plan, lambda what, done: None).samples if s.timing == "device_resident")
                ours.append(statistics.median(block.durations_ns) * 1e-9)
                if backend == "openvino-cpu":
                    theirs.append(benchmark_app(bundle.path / entry.path, batch_size, threads, seconds))
                    continue
                values = {"path": str(bundle.path / entry.path), "x": str(x), "threads": threads, "seconds": seconds}
                program = "import numpy; " + PEERS[backend].format(**values)
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
                )
                theirs.append(float(done.stdout))
            ratio = statistics.median(ours) / statistics.median(theirs)
            found[f"{backend}, batch {batch_size}"] = {
                "bench_over_peer": round(ratio, 4),
                "bench_s": ours,
                "peer_s": theirs,
            }
            print(f"{backend}, batch {batch_size}: {ratio:.3f}", flush=True)
    return {"processes": count, "seconds": seconds, "threads": threads, "time_of_a_call": found}


def benchmark_app(file: Path, batch_size: int, threads: int, seconds: float) -> float:
    """The median seconds of a call, one at a time, by OpenVINO's own benchmark."""
    arguments = ["-m", str(file), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"]
    arguments += ["-nthreads", str(threads), "-t", str(math.ceil(seconds)), "-shape", f"[{batch_size},1,28,28]"]
    arguments += ["-infer_precision", "f32"]
    script = Path(sys.executable).with_name("benchmark_app")
    done = subprocess.run([str(script), *arguments], capture_output=True, text=True, check=True)
    median = re.search(r"Median:\s+([\d.]+) (us|ms)", done.stdout)
    assert median is not None, done.stdout
    return float(median.group(1)) * {"us": 1e-6, "ms": 1e-3}[median.group(2)]


def loadgen(count: int) -> dict[str, Any]:
    """One image end to end: the median latency of LoadGen's SingleStream, and that of the blocks before and after it,
    `count` times.

    In turns in one worker, so that both see the same model, threads and memory. Where the two blocks differ by more
    than `SAME_SPEED` the machine changed its speed in between, and the pair says nothing.
    """
    ours_ms, theirs_ms = [], []
    with short_bundle("base") as (bundle,), tempfile.TemporaryDirectory() as logs:
        plan = Plan(Selection((bundle,), ("onnx-cpu",)), threads=THREADS, profile=Profile.STRICT, timeout_s=60.0)
        with loaded(lanes_of(plan), plan) as lanes:
            worker = lanes[0].worker
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
        return comparisons("busy", count, 0, 5)
    finally:
        stop.set()
        other.join()


def store(name: str, found: Any) -> None:
    """Add or replace an experiment's entry."""
    have = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cpu": cpu_name(), "platform": platform.platform()}
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
            store("aa", comparisons("aa", count, 0, 5))
        case ["aa-default", *_]:
            store("aa-default", by_default(count))
        case ["noise", *_]:
            store("noise", comparisons("noise", count, 100 / 92 * 100 - 100, 5, 8))
        case ["coverage", *_]:
            store("coverage", coverage(count))
        case ["busy", *_]:
            store("busy", busy(count))
        case ["slow", *_]:
            slowed = ((100 / 90 * 100 - 100, 5), (100 / 95 * 100 - 100, 2))
            store("slow", [comparisons("slow", count, percent, threshold) for percent, threshold in slowed])
        case ["agreement"]:
            store("agreement", agreement())
        case ["peers", *_]:
            store("peers", peers(count))
        case ["loadgen", *_]:
            store("loadgen", loadgen(count))
        case _:
            print(__doc__)

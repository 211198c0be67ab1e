"""Whether the programs that `bench recommend` prints are as fast as the rows that they are printed for.

    python tests/benchmarks/programs.py [BUNDLE [BACKEND ...]]      default: artifacts/bundles/article, all below

For each backend below that can run here, each variant of the bundle, and batches of 1, 64 and 256: the row's worker, as
`bench run` starts it, and the program in a process of its own that knows nothing of ninefold, in turns, end to end. The
ratio of their throughputs is paired by turn. It has to be within 10 % of 1, or above where the program says what
differs; else the exit code is 1. Results go to docs/results/programs.json, or to the file that RESULTS
names in the environment. It needs a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))

from bundles import shorten

from bench.backends.contract import Profile, Runnable
from bench.backends.registry import find_backend
from bench.backends.torch_lines import MAPPED
from bench.machine.environment import usable_cpus
from bench.report.wording import ratio_words
from bench.results.statistics import paired_ratio
from bench.run.lanes import Lane, lanes_of, loaded
from bench.run.plan import Plan, Selection
from bench.sweep.program import snippet
from bench.worker.messages import Measure, Measured, Prepare, Prepared
from export.bundle import Bundle, takes_raw
from trainer.provenance import cpu_name, git_commit

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "artifacts" / "bundles" / "article"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "docs" / "results" / "programs.json"))
BACKENDS = ("torch-cpu", "torchscript-cpu", "onnx-cpu", "onnx-cpu-parallel", "openvino-cpu", "openvino-cpu-throughput")
BATCH_SIZES = (1, 64, 256)
TURNS, BLOCK_S, IMAGES = 20, 0.1, 300
ALIKE = 0.1
# What a turn of a program is: as `bench.worker.clock` times a block, a lead-in and then calls for some time; and then
# waiting until its threads use no CPU any more.
TIMED = """
import runpy, sys, time
import numpy as np

logits = runpy.run_path(sys.argv[1])["logits"]
raws = np.load(sys.argv[2])
clock = time.perf_counter
for line in sys.stdin:
    batch, seconds = line.split()
    raw = raws[np.arange(int(batch)) % len(raws)]
    end = clock() + 0.01
    logits(raw)
    while clock() < end:
        logits(raw)
    began, calls = clock(), 0
    while clock() < began + float(seconds):
        logits(raw)
        calls += 1
    print(int(batch) * calls / (clock() - began), flush=True)
    while True:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            break
"""


@contextmanager
def started(text: str, raw: np.ndarray, threads: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The program, waiting for turns. Its pools are as large as a worker's."""
    (folder / "program.py").write_text(text)
    np.save(folder / "raw.npy", raw)
    command = [sys.executable, "-W", "ignore", "-c", TIMED, str(folder / "program.py"), str(folder / "raw.npy")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def program_turn(process: subprocess.Popen[str], batch_size: int, seconds: float) -> float:
    """Images per second of the program."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{batch_size} {seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def row_turn(lane: Lane, batch_size: int) -> float:
    """Images per second of the row, end to end."""
    measured = lane.worker.ask(Measure(batch_size, BLOCK_S), Measured)
    (block,) = (block for block in measured.blocks if block.timing == "end_to_end")
    return 1e9 * batch_size * len(block.durations_ns) / sum(block.durations_ns)


def program_of(lane: Lane, bundle: Bundle) -> str:
    """What `bench recommend` would print for the lane."""
    subject, manifest = lane.subject, bundle.manifest
    assert subject.entry is not None
    raw = takes_raw(subject.options.variant)
    return snippet(
        subject.backend.name,
        Runnable(
            device=subject.backend.device,
            path=str(bundle.path / subject.entry.path),
            threads=subject.options.threads,
            input=manifest.preprocessing.raw if raw else manifest.input,
            output=manifest.output,
            preprocessing=manifest.preprocessing,
            settings=lane.settings,
        ),
    )


def held_to_its_row(bundle: Path, backend: str, variant: str, folder: Path) -> Iterator[dict[str, Any]]:
    """For each batch size the program's throughput over its row's."""
    plan = Plan(Selection((bundle,), (backend,), (variant,)), usable_cpus(), Profile.STRICT, 120.0)
    with loaded(lanes_of(plan), plan) as (lane,):
        text = program_of(lane, lane.subject.bundle)
        with started(text, lane.subject.bundle.oracle().raw, plan.threads, folder) as process:
            for batch_size in BATCH_SIZES:
                lane.worker.ask(Prepare(batch_size), Prepared)
                program_turn(process, batch_size, 0.5)
                rows, programs = [], []
                for turn in range(TURNS):  # who is first changes
                    if turn % 2:
                        rows.append(row_turn(lane, batch_size))
                    programs.append(program_turn(process, batch_size, BLOCK_S))
                    if not turn % 2:
                        rows.append(row_turn(lane, batch_size))
                ratio = paired_ratio([programs], [rows])
                alike = abs(ratio.median - 1) <= ALIKE
                differs = next((line for line in text.splitlines() if line.startswith("# ")), "")
                # What a program does without makes it faster; what malloc does, either.
                why = differs if ratio.median > 1 or MAPPED in differs else ""
                said = "" if alike else f"  {why or 'NOT ALIKE, and the program does not say why'}"
                print(f"{lane.subject.label}, batch {batch_size}: {ratio_words(ratio, '.3f')}{said}", flush=True)
                yield {
                    "row": lane.subject.label,
                    "batch_size": batch_size,
                    "threads": plan.threads,
                    "row_images_per_s": statistics.median(rows),
                    "program_over_row": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                    "turns": ratio.rounds,
                    "alike_or_said": alike or bool(why),
                }


def measure(place: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every backend that can run here, with every file that the bundle has for it."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = shorten(place.resolve(), Path(scratch) / "bundle", IMAGES)
        files = Bundle.open(bundle).manifest.files
        for name in names:
            backend = find_backend(name)
            if (reason := backend.unavailable_reason()) is not None:
                print(f"{name}: {reason}")
                continue
            variants = dict.fromkeys(file.variant for file in files if file.format in backend.formats)
            for variant in ["float32"] if backend.reference else variants:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    found += held_to_its_row(bundle, name, variant, Path(folder))
    return found


if __name__ == "__main__":
    rows = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLE, sys.argv[2:] or BACKENDS)
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.platform()}",
        "commit": git_commit(Path(__file__)),
    }
    RESULTS.write_text(json.dumps(facts | {"found": rows}, indent=1) + "\n")
    sys.exit(not all(row["alike_or_said"] for row in rows))

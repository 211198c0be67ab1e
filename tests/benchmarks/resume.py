"""Whether a killed training ends with the bits of one that was left alone: SIGKILL at random moments.

    python tests/benchmarks/resume.py [KILLS] [ITERATIONS]

Half of the kills go to each of two recipes, at a moment drawn uniformly from the time that an undisturbed run takes,
its start included; then the same command with --resume goes on to the end. Its checkpoint is compared with that of the
undisturbed run, byte by byte. From 2,000 iterations on the runs are compiled. Results go to
docs/results/training-resume.json, or to the file that RESULTS names in the environment.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from trainer.checkpoint import FILE_NAME
from trainer.provenance import cpu_name, git_commit, versions

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("RESULTS", ROOT / "docs" / "results" / "training-resume.json"))
RECIPES = ("article", "augmented")
SAVE_EVERY_S = 0.5
DRAWN_FROM = 20


def command(recipe: str, iterations: int, out: Path) -> list[str]:
    """A training on the CPU that is saved often."""
    given = ["--recipe", recipe, "--iterations", str(iterations), "--device", "cpu", "--out", str(out)]
    return [sys.executable, "-m", "trainer", *given, "--save-every", str(SAVE_EVERY_S)]


def undisturbed(recipe: str, iterations: int, out: Path) -> tuple[bytes, float]:
    """The checkpoint of a run that is left alone, and how long the whole of it took."""
    began = time.perf_counter()
    subprocess.run(command(recipe, iterations, out), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return (out / FILE_NAME).read_bytes(), time.perf_counter() - began


def killed(recipe: str, iterations: int, out: Path, after_s: float, expected: bytes) -> dict[str, Any]:
    """Kill a run after so long, go on with it, and compare."""
    process = subprocess.Popen(command(recipe, iterations, out), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    done = subprocess.run(
        [*command(recipe, iterations, out), "--resume"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    went_on = re.search(r"going on from iteration (\d+)", done.stdout)
    checkpoint = out / FILE_NAME
    return {
        "recipe": recipe,
        "killed_after_s": round(after_s, 3),
        "killed": process.returncode < 0,
        "resumed_from_iteration": int(went_on.group(1)) if went_on else 0,
        "exit_code": done.returncode,
        "identical": checkpoint.exists() and checkpoint.read_bytes() == expected,
    }


def experiment(kills: int, iterations: int) -> dict[str, Any]:
    """All kills, each recipe's against one undisturbed run."""
    moments = random.Random(DRAWN_FROM)
    found = []
    for part, recipe in enumerate(RECIPES):
        with tempfile.TemporaryDirectory() as folder:
            expected, whole_s = undisturbed(recipe, iterations, Path(folder) / "undisturbed")
            print(f"{recipe}: {whole_s:.1f} s undisturbed", flush=True)
            for number in range(part, kills, len(RECIPES)):
                after_s = moments.uniform(0, whole_s)
                found.append(killed(recipe, iterations, Path(folder) / str(number), after_s, expected))
                print(found[-1], flush=True)
    return {
        "kills": sum(one["killed"] for one in found),
        "identical": sum(one["identical"] for one in found),
        "runs": len(found),
        "iterations": iterations,
        "save_every_s": SAVE_EVERY_S,
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "versions": versions("ninefold", "numpy", "torch"),
        "git_commit": git_commit(ROOT / "trainer" / "train.py"),
        "date": date.today().isoformat(),
        "each": found,
    }


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    result = experiment(kills, iterations)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['identical']} of {result['runs']} bit-identical")
    sys.exit(0 if result["identical"] == result["runs"] else 1)

"""What the trainings in a folder came to, as JSON: one line for each seed, and mean and deviation over them.

for seed in 0 1 2 3 4; do python -m trainer --seed $seed --out artifacts/training/seeds/$seed; done
python tests/benchmarks/collect_training.py artifacts/training/seeds docs/results/training-article.json [NOTE]
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import cpuinfo
import psutil

from trainer.checkpoint import FILE_NAME, read_metadata


def collect(folder: Path, note: str) -> dict[str, object]:
    """Read every training folder inside `folder`."""
    seeds = []
    for place in sorted(folder.iterdir()):
        facts = read_metadata(place / FILE_NAME)
        history = [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
        best = max(history, key=lambda evaluation: evaluation["test_top1"])
        seeds.append(
            {
                "seed": facts.seed,
                "recipe": facts.recipe,
                "precision": facts.precision,
                "iterations": facts.steps,
                "test_top1": history[-1]["test_top1"],
                "best_test_top1": best["test_top1"],
                "best_iteration": best["iteration"],
                "seconds": round(history[-1]["seconds"], 1),
                "weights_sha256": facts.weights_sha256,
                "versions": facts.versions,
            }
        )
    final = [seed["test_top1"] for seed in seeds]
    return {
        "mean_test_top1": round(statistics.mean(final), 4),
        "deviation_test_top1": round(statistics.stdev(final), 4) if len(final) > 1 else None,
        "every_seed_touches_99": all(seed["best_test_top1"] >= 99.0 for seed in seeds),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw"),
        "cores": psutil.cpu_count(logical=False),
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
        "note": note,
        "seeds": seeds,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1]), " ".join(sys.argv[3:])), indent=2) + "\n")

"""What a large model takes: resnet50 with 1,000 images, exported and measured with default options.

    python tests/benchmarks/large.py [MODEL]

Seconds, the peak memory of all processes together, the bytes of the bundle, and of `bench run` when the first row came.
The images are smooth noise, and the weights those of a new model: neither changes what anything costs. Results go to
docs/results/large.json, or to the file that RESULTS names in the environment.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine.environment import usable_cpus
from export.bundle import Bundle
from trainer.provenance import cpu_name, git_commit, versions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from watched import Watched, watch  # noqa: E402

RESULTS = Path(os.environ.get("RESULTS", ROOT / "docs" / "results" / "large.json"))
IMAGES, SIDE = 1_000, 224


def images() -> np.ndarray:
    """uint8 [IMAGES, 3, SIDE, SIDE]: noise of 16 × 16 patches, and a little of each pixel."""
    generator = np.random.default_rng(0)
    found = np.empty((IMAGES, 3, SIDE, SIDE), np.uint8)
    for image in found:
        patches = generator.integers(0, 240, (3, SIDE // 16, SIDE // 16)).repeat(16, 1).repeat(16, 2)
        image[:] = patches + generator.integers(0, 16, image.shape)
    return found


def facts(watched: Watched) -> dict[str, Any]:
    """What both commands are asked."""
    if watched.exit_code:
        raise SystemExit("\n".join(line for _, line in watched.lines))
    return {
        "seconds": round(watched.seconds, 1),
        "peak_bytes": watched.peak_bytes,
        "longest_silence_s": round(watched.longest_silence_s, 1),
    }


def main() -> None:
    """Both commands, one after the other."""
    model = sys.argv[1] if len(sys.argv) > 1 else "torchvision:resnet50"
    with tempfile.TemporaryDirectory() as folder:
        data, place = Path(folder) / "images.npz", Path(folder) / "bundle"
        labels = np.random.default_rng(1).integers(0, 1_000, IMAGES)
        np.savez(data, inputs=images(), labels=labels)
        exported = watch("export", "--model", model, "--data", data, "--out", place)
        found: dict[str, Any] = {"export": facts(exported)}
        manifest = Bundle.open(place).manifest
        bundle_bytes = sum(file.stat().st_size for file in place.iterdir())
        weights = (place / "model.unfolded.pt2").stat().st_size
        found["export"] |= {
            "bundle_bytes": bundle_bytes,
            "bundle_in_weights": round(bundle_bytes / weights, 2),
            "proof": None if manifest.proof is None else manifest.proof.model_dump(),
            "left_out": [entry.model_dump() for entry in manifest.left_out],
        }
        print(json.dumps(found, indent=1), flush=True)
        measured = watch("bench", "run", "--bundle", place, "--json", Path(folder) / "result.json")
        result = json.loads((Path(folder) / "result.json").read_text())
        found["bench_run"] = facts(measured) | {
            "first_row_s": round(measured.first_s("so far:") or measured.seconds, 1),
            "left_out": result["settings"]["left_out"],
            "others_busy_percent": result["cpu_busy_percents"],
            "rows": [
                [row["subject"], row["batch_size"], row["end_to_end_throughput_images_per_s"]["median"]]
                for row in result["rows"]
            ],
        }
    record = {
        "command": f"python tests/benchmarks/large.py {model}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "usable_cpus": usable_cpus(),
        "platform": platform.platform(),
        "versions": versions("torch", "onnxruntime", "openvino"),
        "git_commit": git_commit(Path(__file__)),
        **found,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

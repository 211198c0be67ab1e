"""What several training runs came to, read from their folders.

Owns the summary and its JSON form. Derives everything from what the runs wrote themselves (checkpoint and history), so
that it can be derived again. Knows neither torch nor how a run was made.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import checkpoint
from trainer.errors import UserError

TOUCH = 99.0
"""The test top-1, in percent, that the article speaks of."""


@dataclass(frozen=True)
class RunSummary:
    """One run: top-1 in percent; `seconds` of training and evaluating, without compiling."""

    folder: str
    recipe: str
    precision: str
    seed: int
    iterations: int
    final_test_top1: float
    best_test_top1: float
    best_iteration: int
    seconds: float
    versions: dict[str, str]
    git_commit: str | None

    @property
    def touches(self) -> bool:
        """Whether the run was at 99 % or above at any of its evaluations."""
        return self.best_test_top1 >= TOUCH


def read_run(folder: Path) -> RunSummary:
    """The summary of one training folder; UserError (exit 4) where it is missing, damaged or of no finished run."""
    facts = checkpoint.read_metadata(folder / checkpoint.FILE_NAME)
    path = folder / checkpoint.HISTORY_NAME
    try:
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(float(line["test_top1"]), int(line["iteration"]), float(line["seconds"])) for line in history]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no readable history ({type(error).__name__}: {error}). Train again.") from error
    if not points or points[-1][1] != facts.steps:
        raise UserError(f"{path} does not reach the {facts.steps} steps of the checkpoint beside it. Train again.")
    best_top1, best_iteration, _ = max(points, key=lambda point: point[0])  # the first of equals
    final_top1, _, seconds = points[-1]
    return RunSummary(
        folder=folder.name,
        recipe=facts.recipe,
        precision=facts.precision,
        seed=facts.seed,
        iterations=facts.steps,
        final_test_top1=final_top1,
        best_test_top1=best_top1,
        best_iteration=best_iteration,
        seconds=round(seconds, 1),
        versions=facts.versions,
        git_commit=facts.git_commit,
    )


def table(runs: Sequence[RunSummary]) -> str:
    """The runs as lines of text, and their mean."""
    lines = [f"{'seed':>6} {'iterations':>11} {'final top-1 %':>14} {'best top-1 %':>13} {'at iteration':>13} {'s':>8}"]
    lines += [
        f"{run.seed:>6} {run.iterations:>11} {run.final_test_top1:>14.2f} {run.best_test_top1:>13.2f} "
        f"{run.best_iteration:>13} {run.seconds:>8.1f}"
        for run in runs
    ]
    finals = [run.final_test_top1 for run in runs]
    lines.append(
        f"mean final top-1 {statistics.mean(finals):.3f} % (n = {len(runs)}, {min(finals):.2f} to {max(finals):.2f}); "
        f"{sum(run.touches for run in runs)} of {len(runs)} touch {TOUCH:g} %"
    )
    return "\n".join(lines)


def as_json(runs: Sequence[RunSummary], note: str | None) -> str:
    """The same as a JSON text, with the machine that this runs on and today's date."""
    import dataclasses
    import platform

    import cpuinfo
    import psutil

    finals = [run.final_test_top1 for run in runs]
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
            "cores": psutil.cpu_count(logical=True),
            "system": platform.platform(),
        },
        "note": note,
        "runs": [dataclasses.asdict(run) for run in runs],
        "mean_final_test_top1": round(statistics.mean(finals), 4),
        "min_final_test_top1": min(finals),
        "runs_that_touch_99": sum(run.touches for run in runs),
    }
    return json.dumps(document, indent=2) + "\n"

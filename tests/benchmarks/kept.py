"""A run of pytest-benchmark against the best of those kept before, so that a slow drift does not pass for ever.

    python tests/benchmarks/kept.py NEW.json [KEPT.json…]

Each benchmark's median may exceed the least median among the kept runs by `SLOWER_PERCENT`; exit code 1 where one
exceeds it by more. Runs of the same code in one process after another were seen to differ by up to 9 %.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SLOWER_PERCENT = 20


def medians(file: Path) -> dict[str, float]:
    """Benchmark → median, in seconds, of a file that pytest-benchmark wrote."""
    return {entry["fullname"]: entry["stats"]["median"] for entry in json.loads(file.read_text())["benchmarks"]}


def slower_than_the_best(new: Path, kept: Sequence[Path]) -> Iterator[str]:
    """Each benchmark that is too slow, in words."""
    before = [medians(file) for file in kept]
    for name, median in medians(new).items():
        best = min((run[name] for run in before if name in run), default=median)
        if median > best * (1 + SLOWER_PERCENT / 100):
            yield f"{name}: {median * 1e3:.3g} ms, {median / best:.2f} × the best kept ({best * 1e3:.3g} ms)"


if __name__ == "__main__":
    found = list(slower_than_the_best(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
    print("\n".join(found) or "none is slower than the best run kept by more than may be")
    sys.exit(bool(found))

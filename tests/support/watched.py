"""A command, its output with the time of each line, and the memory of all its processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_S = 0.1
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Watched:
    """`lines` with the seconds since the start, both streams; the peak is of the resident memory of the process and its
    children together, what they share counted for each.
    """

    lines: tuple[tuple[float, str], ...]
    seconds: float
    peak_bytes: int
    exit_code: int

    def first_s(self, text: str) -> float | None:
        """When a line with that text came first."""
        return next((seconds for seconds, line in self.lines if text in line), None)

    @property
    def longest_silence_s(self) -> float:
        """Between two lines, the start and the end."""
        moments = [0.0, *(seconds for seconds, _ in self.lines), self.seconds]
        return max(later - earlier for earlier, later in itertools.pairwise(moments))


def watch(module: str, *arguments: str | Path) -> Watched:
    """Run ``python -m module arguments`` to its end."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid))
            time.sleep(EVERY_S)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    assert process.stdout is not None
    lines = tuple((time.perf_counter() - began, line.rstrip("\n")) for line in process.stdout)
    exit_code = process.wait()
    seconds = time.perf_counter() - began
    sampler.join()
    return Watched(lines, seconds, peak, exit_code)


def _resident_bytes(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        everybody: Sequence[psutil.Process] = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in everybody:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total

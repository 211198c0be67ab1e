"""What a file of results holds, whatever kind it is.

Owns which kinds there are: a run's or a comparison's result, and the suites and sweeps of several. Knows neither how
they were made nor how they are shown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.results.derive import derived
from bench.results.schema import Result, read_fields, result_of
from bench.run.suite import LeftOut, Suite, leg_of, suite_of
from bench.sweep.sweep import sweep_of


@dataclass(frozen=True)
class Source:
    """A file with its results, every figure of which was derived anew from the raw samples.

    `left_out` is what the file says was not measured; `suite` is all of a suite, None of another file.
    """

    path: Path
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...] = ()
    suite: Suite | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What each result is called: the file's path, and where it holds several, which of them."""
        if len(self.results) == 1:
            return (str(self.path),)
        words = [leg_of(result).words for result in self.results]
        counts = Counter(words)
        return tuple(
            f"{self.path} · {word}" + (f", run {place}" if counts[word] > 1 else "")
            for place, word in enumerate(words, 1)
        )


def results_in(path: Path) -> Source:
    """The results in a file of any kind. Raises BenchError (bad input)."""
    fields = read_fields(path)
    kind = fields.get("kind")
    if kind == "sweep":
        sweep = sweep_of(fields, path)
        return Source(path, tuple(map(derived, sweep.runs)), sweep.skipped)
    if kind == "suite":
        suite = suite_of(fields, path)
        runs = tuple(map(derived, suite.runs))
        return Source(path, runs, suite.left_out, suite.model_copy(update={"runs": runs}))
    return Source(path, (derived(result_of(fields, path)),))

"""Reading a file of results, whatever kind it is: a run's or a comparison's result, a suite or a sweep of several."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.results.derive import derived
from bench.results.schema import SCHEMA_VERSION, Result
from bench.results.studies import SUITE_VERSION, SWEEP_FILE, SWEEP_VERSION, LeftOut, Suite, Sweep, suite_run_of


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
        words = [suite_run_of(result).words for result in self.results]
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


REMEDY = "Name a file that bench run (without --scenario) or bench ab wrote with --json."
M = TypeVar("M", bound=BaseModel)


def read_result(path: Path) -> Result:
    """The result in a file. Raises BenchError (bad input) for one that is missing, cut off, no JSON, of another
    version of the schema, or no result.
    """
    return result_of(read_fields(path), path)


def result_of(fields: dict[str, Any], path: Path) -> Result:
    """The result in what `read_fields` found at `path`. Raises BenchError (bad input), as `read_result` does."""
    others = {
        "scenario": "is what LoadGen found in a scenario: it has no rounds",
        "suite": "is a suite of several runs: bench report shows it, but there is no one result in it",
        "sweep": "is a sweep of several runs: bench recommend reads it, but there is no one result in it",
    }
    if (kind := fields.get("kind")) in others:
        raise BenchError(f"{path} {others[kind]}. {REMEDY}", EXIT_BAD_INPUT)
    return validated(Result, migrated(fields), SCHEMA_VERSION, path)


def migrated(fields: dict[str, Any]) -> dict[str, Any]:
    """What a result of version 2 is in version 3: one process, of which no CPU time was counted."""
    if fields.get("schema_version") != 2:
        return fields
    new = {**fields, "schema_version": 3, "rows": [], "ratios": []}  # both are derived anew
    new["cpu_busy_percents"] = [new.pop("cpu_busy_percent_at_end", 0.0)]
    if isinstance(settings := fields.get("settings"), dict):
        new["settings"] = {"processes": 1, **settings}
    return new


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a file that `write_result` wrote, of whatever kind. Raises BenchError (bad input) for another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(f"no result can be read at {path}: {error.strerror}. {REMEDY}", EXIT_BAD_INPUT) from None
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise BenchError(
            f"{path} is not JSON, or only the beginning of it: {error}. {REMEDY}", EXIT_BAD_INPUT
        ) from None
    if not isinstance(fields, dict) or "schema_version" not in fields:
        raise BenchError(f"{path} is JSON, but no result: it has no schema_version. {REMEDY}", EXIT_BAD_INPUT)
    return fields


def validated(model: type[M], fields: dict[str, Any], version: int, path: Path) -> M:
    """What `read_fields` found in the file at `path`, as `model`. Raises BenchError (bad input)."""
    if fields["schema_version"] != version:
        raise BenchError(
            f"{path} has schema version {fields['schema_version']!r}; this bench reads version {version}. "
            "Measure again, or read the file with the ninefold that wrote it.",
            EXIT_BAD_INPUT,
        )
    try:
        # As JSON, not as Python's values: only there is a list a tuple, and a text a date.
        return model.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BenchError(
            f"{path} is not a whole result: {field}: {first['msg']}. {REMEDY}",
            EXIT_BAD_INPUT,
        ) from None


def suite_of(fields: dict[str, Any], path: Path) -> Suite:
    """The suite in what `bench.results.load.read_fields` found at `path`. Raises BenchError (bad input)."""
    return validated(Suite, _with_migrated_runs(fields), SUITE_VERSION, path)


def read_sweep(path: Path) -> Sweep:
    """The sweep in a file, or in the folder that holds it. Raises BenchError (bad input)."""
    file = path / SWEEP_FILE if path.is_dir() else path
    fields = read_fields(file)
    if fields.get("kind") != "sweep":
        kind = fields.get("kind", "result")
        raise BenchError(
            f"{file} is no sweep, but a {kind}. Name the file or the folder of bench sweep.", EXIT_BAD_INPUT
        )
    return sweep_of(fields, file)


def sweep_of(fields: dict[str, Any], path: Path) -> Sweep:
    """The sweep in what `bench.results.load.read_fields` found at `path`. Raises BenchError (bad input)."""
    return validated(Sweep, _with_migrated_runs(fields), SWEEP_VERSION, path)


def _with_migrated_runs(fields: dict[str, Any]) -> dict[str, Any]:
    runs = fields.get("runs")
    if not isinstance(runs, list):
        return fields
    return {**fields, "runs": [migrated(run) if isinstance(run, dict) else run for run in runs]}

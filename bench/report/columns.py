"""The columns of every table: each figure's name, its unit, its value and how it is rounded, once for all forms.

A table is a tuple of columns, and which form shows it is decided elsewhere. What a column is about is an item: a
subject with its result, a row with its subject, a ratio. Computes nothing: every figure is already in the result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.machine.findings import Finding
from bench.report.table import Cell, Column, Look, Scalar
from bench.report.wording import (
    NOTHING,
    TIMING_WORDS,
    binding_words,
    milliseconds,
    per_s,
    ratio_words,
    spread_words,
)
from bench.results.compare import Compared
from bench.results.queries import champion, finished_rows, right_rows
from bench.results.roofline import Point
from bench.results.scenario import LoadGenRun, ScenarioRow
from bench.results.schema import Against, BundleFacts, Percentiles, Result, Row, SubjectResult, find_ratio
from bench.results.statistics import PairedRatio
from bench.results.studies import Candidate
from bench.results.terms import TIMINGS, Scenario, Timing
from export.bundle import CpuVerdict, FoldReport
from export.bundle.int8 import CPU_WORDS
from export.bundle.verdict import OutputVerdict, Verdict

MIB = 2**20


@dataclass(frozen=True)
class Judged:
    """A subject of a result. `name` is what the result is called; `output` is one of several, None for the first and
    for what all come to.
    """

    result: Result
    subject: SubjectResult
    name: str = ""
    output: OutputVerdict | None = None


@dataclass(frozen=True)
class Measured(Judged):
    """A row with its subject; in a file for programs, of one `timing`, and without a row where nothing was timed."""

    row: Row | None = None
    timing: Timing = "device_resident"


@dataclass(frozen=True)
class ComparedFiles:
    """The ratios of one subject over another at a batch size."""

    result: Result
    against: Against
    numerator: str
    denominator: str
    batch_size: int


@dataclass(frozen=True)
class Listed:
    """A result among several: where on the page it is, and whether anything is wrong with it."""

    place: str
    name: str
    result: Result
    wrong: bool


@dataclass(frozen=True)
class OnCpu:
    """An int8 file on a kind of CPU."""

    file: str
    verdict: CpuVerdict


@dataclass(frozen=True)
class Norm:
    """What became of a BatchNorm."""

    name: str
    method: str | None
    into_or_why_not: str
    error: float | None


def judged(result: Result) -> list[Judged]:
    """The subjects that have a verdict; of models with several outputs once for each."""
    return [
        Judged(result, subject, output=output)
        for subject in result.subjects
        if subject.parity is not None
        for output in (None, *subject.parity.further)
    ]


def measured(result: Result, rows: Sequence[Row] | None = None) -> list[Measured]:
    """The rows of the subjects that finished, or those given."""
    subjects = {subject.label: subject for subject in result.subjects}
    chosen = finished_rows(result) if rows is None else rows
    return [Measured(result, subjects[row.subject], row=row) for row in chosen]


def timed(result: Result, name: str) -> Iterator[Measured]:
    """A line for each subject, batch size and timing; of a subject that was judged and not timed, one without a row."""
    for subject in result.subjects:
        rows = [row for row in finished_rows(result) if row.subject == subject.label]
        yield from (Measured(result, subject, name, row=row, timing=timing) for row in rows for timing in TIMINGS)
        if not rows:
            yield Measured(result, subject, name)


def compared_files(result: Result, against: Against) -> list[ComparedFiles]:
    """What was compared with that."""
    keys = dict.fromkeys((r.numerator, r.denominator, r.batch_size) for r in result.ratios if r.against == against)
    return [ComparedFiles(result, against, *key) for key in keys]


def norms(fold: FoldReport) -> list[Norm]:
    """The BatchNorms that were folded, then those that were kept."""
    folded = [Norm(norm.name, norm.method, ", ".join(norm.into), norm.error) for norm in fold.folded]
    return folded + [Norm(norm.name, None, norm.reason, None) for norm in fold.kept]


# -- how values are written ------------------------------------------------------------------------------------------


def rounded(digits: str) -> Callable[[Any], str]:
    """With so many digits, as in a format."""
    return lambda value: f"{value:{digits}}"


def looking(look: Look) -> Callable[[Any], Cell]:
    """The text, set off."""
    return lambda value: Cell(str(value), look)


def passed(value: bool) -> Cell:
    """A verdict."""
    return Cell("pass", "good") if value else Cell("FAIL", "bad")


def itself(value: Any) -> Scalar:
    """A value that programs read as it is."""
    scalar: Scalar = value
    return scalar


def whole(value: int) -> str:
    """A count."""
    return f"{value:,}"


def ratio_text(digits: str) -> Callable[[PairedRatio], str]:
    """A ratio with its interval; for people nothing, where noise drowns it."""
    return lambda ratio: NOTHING if ratio.drowned else ratio_words(ratio, digits)


# -- a row -----------------------------------------------------------------------------------------------------------


def of_row(value: Callable[[Row], Any]) -> Callable[[Measured], Any]:
    """The value of a row, where there is one."""
    return lambda item: None if item.row is None else value(item.row)


def lifted(column: Column[Row]) -> Column[Measured]:
    """A column about rows, for rows with their subjects."""
    return Column(**{**vars(column), "value": of_row(column.value)})


def throughput(timing: Timing, name: str | None = None) -> Column[Measured]:
    """Images per second: the median of the processes, with its interval."""
    return lifted(row_throughput(timing, name))


def row_throughput(timing: Timing, name: str | None = None) -> Column[Row]:
    """As `throughput`, of a row alone."""
    return Column(
        name or f"images/s, {TIMING_WORDS[timing]}",
        operator.methodcaller("throughput", timing),
        spread_words,
        fields={
            "processes": lambda spread: spread.processes,
            "rounds": lambda spread: spread.n,
            "throughput_images_per_s": lambda spread: spread.median,
            "throughput_low_images_per_s": lambda spread: spread.low,
            "throughput_high_images_per_s": lambda spread: spread.high,
        },
    )


def percentile(timing: Timing, percent: int, *, name: str | None = None, bounded: bool = False) -> Column[Measured]:
    """A percentile of the calls, in ms. `bounded`: with what it does not exceed with 95 % confidence."""

    def value(item: Measured) -> tuple[float, float | None] | None:
        measured = _percentile(item, timing, percent)
        return None if measured is None or measured[0] is None else (measured[0], measured[1])

    def text(measured: tuple[float, float | None]) -> str:
        bound = f" ≤ {milliseconds(measured[1])}" if bounded and measured[1] is not None else ""
        return milliseconds(measured[0]) + bound

    return Column(name or f"p{percent} ms, {TIMING_WORDS[timing]}", value, text)


def _percentile(item: Measured, timing: Timing, percent: int) -> tuple[float | None, float | None] | None:
    if item.row is None:
        return None
    percentiles: Percentiles = item.row.latency(timing)
    return getattr(percentiles, f"p{percent}"), getattr(percentiles, f"p{percent}_upper")


def p99_at_most(timing: Timing) -> Column[Measured]:
    """What the p99 does not exceed with 95 % confidence."""
    return Column("p99, at most", of_row(lambda row: row.latency(timing).p99_upper), milliseconds)


def ratio(against: Against, timing: Timing, digits: str = ".3g") -> Column[Measured]:
    """Throughput over that of what the subject is compared with."""

    def value(item: Measured) -> PairedRatio | None:
        if item.row is None:
            return None
        return find_ratio(item.result.ratios, against, item.row.subject, item.row.batch_size, timing)

    fields: Mapping[str, Callable[[Any], Scalar]] = {
        f"throughput_ratio_to_{against}": lambda paired: paired.median,
        f"throughput_ratio_to_{against}_low": lambda paired: paired.low,
        f"throughput_ratio_to_{against}_high": lambda paired: paired.high,
    }
    name = f"× {against}, {TIMING_WORDS[timing]}"
    return Column(name, value, ratio_text(digits), optional=True, fields=fields)


def point_of(item: Measured) -> Point | None:
    """The row's place under the roofline."""
    points = item.result.roofline
    row = item.row
    return next((p for p in points if row and (p.subject, p.batch_size) == (row.subject, row.batch_size)), None)


def of_point(value: Callable[[Point], Any]) -> Callable[[Measured], Any]:
    """The value of a row's place under the roofline."""
    return lambda item: None if (point := point_of(item)) is None else value(point)


def energy(counter: str) -> Callable[[Measured], Any]:
    """Joules an image by a counter."""
    return of_row(lambda row: row.energy_per_image_j.get(counter))


def unbeaten(item: Measured) -> bool:
    """Whether no other that is right is at least as good in throughput and p99, and better in one."""

    def goods(row: Row) -> tuple[float, float]:
        return row.end_to_end_throughput_images_per_s.median, -(row.end_to_end_latency_ms.p99 or 0.0)

    def beats(other: Row, row: Row) -> bool:
        theirs, its = goods(other), goods(row)
        return theirs != its and theirs[0] >= its[0] and theirs[1] >= its[1]

    row, right = item.row, [row for row in right_rows(item.result) if row.end_to_end_latency_ms.p99 is not None]
    return row in right and not any(beats(other, row) for other in right if row is not None)


BACKEND: Column[Judged] = Column(
    "backend", lambda item: item.subject.label, looking("subject"), words=True, fields={"subject": itself}
)
EMULATED: Column[Judged] = Column(
    "emulated",
    lambda item: item.subject.emulated,
    lambda _: "in float32",
    words=True,
    optional=True,
    wide=True,
    fields={"emulated": itself},
)
"""Whether the file's precision is not what is computed in; in a file for programs, why."""
ROW_BATCH: Column[Row] = Column("batch", lambda row: row.batch_size, whole, fields={"batch_size": itself})
BATCH = lifted(ROW_BATCH)
SYSTEM: Column[Measured] = Column(
    "% system",
    of_row(lambda row: row.system_share_percent),
    rounded(".0f"),
    wide=True,
    fields={"system_share_percent": itself},
)
"""The operating system's part of the CPU time, end to end."""
GPU_P50: Column[Measured] = Column(
    "p50 ms by the GPU's clock",
    of_row(lambda row: row.gpu_latency_p50_ms),
    milliseconds,
    optional=True,
    fields={"gpu_latency_p50_ms": itself},
)
ARITHMETIC: Column[Measured] = Column(
    "% of arithmetic",
    of_point(lambda point: point.arithmetic_percent),
    rounded(".1f"),
    fields={"arithmetic_percent_of_peak": itself},
)
MEMORY: Column[Measured] = Column(
    "% of memory",
    of_point(lambda point: point.memory_percent),
    rounded(".1f"),
    fields={"memory_percent_of_peak": itself},
)
BINDS: Column[Measured] = Column(
    "what binds",
    of_point(lambda point: point),
    binding_words,
    fields={"binds": lambda point: str(point.binds)},
)
ENERGY: Column[Measured] = Column(
    "mJ an image",
    of_row(lambda row: row.energy_per_image_j or None),
    lambda joules: ", ".join(f"{joule * 1000:.3g} ({counter})" for counter, joule in joules.items()),
    optional=True,
)
UNBEATEN: Column[Measured] = Column("unbeaten", unbeaten, lambda value: "yes" if value else "")

# -- a verdict -------------------------------------------------------------------------------------------------------


def of_parity(value: Callable[[Verdict], Any]) -> Callable[[Judged], Any]:
    """The value of a verdict, where there is one."""

    def of(item: Judged) -> Any:
        verdict = item.subject.parity if item.output is None else item.output.verdict
        return None if verdict is None else value(verdict)

    return of


def _output(item: Judged) -> str | None:
    several = item.subject.parity is not None and item.subject.parity.further
    if not several:
        return None
    return "first, and all" if item.output is None else item.output.name


OUTPUT: Column[Judged] = Column("output", _output, words=True, optional=True)
CHANGED: Column[Judged] = Column("changed %", of_parity(lambda p: p.changed_percent), rounded(".3g"), optional=True)
PASSED: Column[Judged] = Column("parity", of_parity(lambda p: p.passed), passed, fields={"parity_passed": itself})
WHY_NOT: Column[Judged] = Column(
    "why not", of_parity(lambda p: p.failures or None), "; ".join, words=True, optional=True
)
IMAGES: Column[Judged] = Column("images", of_parity(lambda p: p.images), whole, fields={"images": itself})
TOP1: Column[Judged] = Column(
    "top-1 %", of_parity(lambda p: p.top1_percent), rounded(".2f"), fields={"top1_percent": itself}
)
ORACLE_TOP1: Column[Judged] = Column(
    "oracle's top-1 %",
    of_parity(lambda p: p.oracle_top1_percent),
    rounded(".2f"),
    fields={"oracle_top1_percent": itself},
)
FLIPS: Column[Judged] = Column(
    "flips", of_parity(lambda p: None if p.flips is None else len(p.flips)), whole, fields={"flips": itself}
)
RMS_ERROR: Column[Judged] = Column(
    "RMS error", of_parity(lambda p: p.rms_error), rounded(".2g"), fields={"rms_error": itself}
)
FLOAT32_ERRORS: Column[Judged] = Column(
    "× float32 torch's",
    of_parity(lambda p: p.rms_error_in_float32_errors),
    rounded(".2f"),
    fields={"rms_error_in_float32_errors": itself},
)
MAX_ERROR: Column[Judged] = Column(
    "max error", of_parity(lambda p: p.max_abs_error), rounded(".2g"), fields={"max_abs_error": itself}
)
MCNEMAR: Column[Judged] = Column("McNemar b, c", of_parity(lambda p: p.mcnemar), lambda test: f"{test.b}, {test.c}")
P_VALUE: Column[Judged] = Column(
    "p",
    of_parity(lambda p: None if p.mcnemar is None else p.mcnemar.p_value),
    rounded(".3g"),
    fields={"mcnemar_p_value": itself},
)

# -- a subject: its file, its place, its memory ----------------------------------------------------------------------


def of_file(field: str) -> Callable[[Judged], Any]:
    """What is known of the subject's file."""
    return lambda item: None if item.subject.file is None else getattr(item.subject.file, field)


def memory(field: str, name: str) -> Column[Judged]:
    """The most that its process held."""
    return Column(
        f"peak {name} memory of its process, MiB",
        lambda item: getattr(item.subject, field),
        lambda held: f"{held / MIB:,.0f}",
        fields={field: itself},
    )


FILE: Column[Judged] = Column("file", of_file("path"), looking("code"), words=True, fields={"file": itself})
SHA256: Column[Judged] = Column(
    "its SHA-256",
    of_file("sha256"),
    lambda digest: Cell(digest[:12], "code"),
    words=True,
    fields={"file_sha256": itself},
)
NODES: Column[Judged] = Column(
    "compute nodes by place",
    lambda item: item.subject.placement,
    lambda place: ", ".join(f"{where}: {count}" for where, count in place.nodes.items()),
    words=True,
)
EVIDENCE: Column[Judged] = Column(
    "evidence", lambda item: item.subject.placement, lambda place: str(place.evidence), words=True
)
HOST_MEMORY, GPU_MEMORY = memory("peak_memory_bytes", "host"), memory("peak_gpu_memory_bytes", "GPU")

# -- the tables for people -------------------------------------------------------------------------------------------

RUN: tuple[Column[Measured], ...] = (
    BACKEND,
    EMULATED,
    BATCH,
    replace(throughput("device_resident"), wide=True),
    throughput("end_to_end"),
    percentile("end_to_end", 50, name="p50, ms"),
    replace(percentile("end_to_end", 90, name="p90, ms"), wide=True),
    percentile("end_to_end", 99, name="p99, ms"),
    replace(p99_at_most("end_to_end"), wide=True),
    SYSTEM,
    PASSED,
    *(replace(column, wide=True) for column in (TOP1, FLIPS, MAX_ERROR)),
    replace(ratio("torch", "device_resident"), wide=True),
    ratio("torch", "end_to_end"),
)
"""A run in short, as a terminal has room for it."""
SO_FAR: tuple[Column[Row], ...] = (
    Column("backend", lambda row: row.subject, looking("subject"), words=True),
    ROW_BATCH,
    *(row_throughput(timing) for timing in TIMINGS),
    Column("p50, ms", lambda row: row.end_to_end_latency_ms.p50, milliseconds),
)
"""Rows while a run goes on: of no subject is all known."""
SPEED: tuple[Column[Measured], ...] = (
    BACKEND,
    EMULATED,
    BATCH,
    *(throughput(timing) for timing in TIMINGS),
    *(percentile(timing, percent) for timing in TIMINGS for percent in (50, 99)),
    GPU_P50,
    *(ratio("torch", timing) for timing in TIMINGS),
    ARITHMETIC,
    MEMORY,
    BINDS,
    ENERGY,
)
"""All that a page says of a row's speed."""
THROUGHPUTS: tuple[Column[Measured], ...] = (
    BACKEND,
    EMULATED,
    BATCH,
    *(throughput(timing) for timing in TIMINGS),
    *(ratio("torch", timing) for timing in TIMINGS),
    SYSTEM,
)
LATENCIES: tuple[Column[Measured], ...] = (
    BACKEND,
    BATCH,
    *(percentile(timing, percent, bounded=True) for timing in TIMINGS for percent in (50, 90, 99)),
    GPU_P50,
)
TRADE_OFF: tuple[Column[Measured], ...] = (
    BACKEND,
    BATCH,
    throughput("end_to_end", "images/s"),
    percentile("end_to_end", 99, name="p99, ms"),
    TOP1,
    UNBEATEN,
)
ROOFLINE: tuple[Column[Measured], ...] = (BACKEND, BATCH, ARITHMETIC, MEMORY, BINDS)
PARITY: tuple[Column[Judged], ...] = (
    BACKEND,
    OUTPUT,
    replace(PASSED, name="verdict"),
    FILE,
    IMAGES,
    CHANGED,
    TOP1,
    ORACLE_TOP1,
    FLIPS,
    MCNEMAR,
    P_VALUE,
    MAX_ERROR,
    RMS_ERROR,
    FLOAT32_ERRORS,
)
CPUS: tuple[Column[OnCpu], ...] = (
    Column("file", lambda item: item.file, words=True),
    Column("CPU", lambda item: CPU_WORDS[item.verdict.cpu], words=True),
    Column("verdict", lambda item: item.verdict.passed, passed),
    Column("known by", lambda item: item.verdict.proof, words=True),
    Column("images", lambda item: item.verdict.images or None, whole),
    Column("flips", lambda item: item.verdict.flips, whole),
    Column("RMS error %", lambda item: item.verdict.rms_error_percent, rounded(".2f")),
    Column("layers that saturate", lambda item: item.verdict.layers or None, ", ".join, words=True, optional=True),
)
PLACEMENT: tuple[Column[Judged], ...] = (BACKEND, FILE, SHA256, NODES, EVIDENCE, HOST_MEMORY, GPU_MEMORY)


def _between(timing: Timing) -> Callable[[ComparedFiles], Any]:
    return lambda item: find_ratio(item.result.ratios, item.against, item.numerator, item.batch_size, timing)


COMPARED: tuple[Column[ComparedFiles], ...] = (
    Column("backend", lambda item: item.numerator, looking("subject"), words=True),
    Column("over", lambda item: item.denominator, looking("code"), words=True),
    Column("batch", lambda item: item.batch_size, whole),
    *(Column(TIMING_WORDS[timing], _between(timing), ratio_text(".3f")) for timing in TIMINGS),
    Column("rounds", _between("device_resident"), lambda ratio: str(ratio.rounds)),
)
"""Each file over what it is compared with: throughput, paired by round."""


def _bounded_ratio(compared: Compared) -> str:
    words = ratio_words(compared.throughput_ratio, ".3f")
    return words if compared.throughput_ratio.low is not None else f"{words} ({NOTHING})"


TWO_RUNS: tuple[Column[Compared], ...] = (
    Column("backend", lambda compared: compared.subject, looking("subject"), words=True),
    Column("batch", lambda compared: compared.batch_size, whole),
    Column("timing", lambda compared: compared.timing.replace("_", " "), words=True),
    Column("base, images/s", lambda compared: compared.throughput_ratio.denominator_median, per_s),
    Column("head, images/s", lambda compared: compared.throughput_ratio.numerator_median, per_s),
    Column("ratio", lambda compared: compared, _bounded_ratio),
)
FINDINGS: tuple[Column[Finding], ...] = (
    Column("severity", lambda finding: str(finding.severity), words=True),
    Column("check", lambda finding: finding.check, words=True),
    Column("seen", lambda finding: finding.seen, words=True),
    Column("fix", lambda finding: finding.fix or "", words=True),
)
BACKENDS: tuple[Column[tuple[str, str | None]], ...] = (
    Column("backend", lambda entry: entry[0], words=True),
    Column(
        "available",
        lambda entry: entry[1] is None,
        lambda value: Cell("yes", "good") if value else Cell("no", "bad"),
        words=True,
    ),
    Column("why not and what would fix it", lambda entry: entry[1] or "", words=True),
)
FACTS: tuple[Column[tuple[str, str]], ...] = (
    Column("what", lambda pair: pair[0], words=True),
    Column("", lambda pair: pair[1], words=True),
)


def _champion(value: Callable[[Row], Any]) -> Callable[[Listed], Any]:
    """Of the fastest row that is right."""
    return lambda item: None if (best := champion([item.result])) is None else value(best.row)


OVERVIEW: tuple[Column[Listed], ...] = (
    Column("result", lambda item: item, lambda item: Cell(item.name, link=item.place), words=True),
    Column("profile", lambda item: str(item.result.settings.profile), words=True),
    Column("parity", lambda item: not item.wrong, passed, words=True),
    Column("fastest end to end", _champion(lambda row: row.subject), looking("code"), words=True),
    Column("threads", lambda item: item.result.settings.threads),
    Column("batch", _champion(lambda row: row.batch_size), whole),
    Column("images/s", _champion(lambda row: row.end_to_end_throughput_images_per_s), spread_words),
)
"""Every result, with the fastest of it that is right."""
NORMS: tuple[Column[Norm], ...] = (
    Column("BatchNorm", lambda norm: norm.name, looking("code"), words=True),
    Column("how", lambda norm: norm.method or Cell("kept", "bad"), lambda how: how, words=True),
    Column("into, or why not", lambda norm: norm.into_or_why_not, words=True),
    Column("error of the fold", lambda norm: norm.error, rounded(".1g")),
)
CANDIDATES: tuple[Column[Candidate], ...] = (
    Column("backend", lambda candidate: f"{candidate.backend} {candidate.variant}", words=True),
    Column("threads", lambda candidate: candidate.threads, wide=True),
    Column("batch", lambda candidate: candidate.batch_size, whole),
    Column("images/s", lambda candidate: candidate.throughput_images_per_s, spread_words),
    Column("p99, ms", lambda candidate: candidate.latency_ms.p99, milliseconds, wide=True),
    Column("p99, at most", lambda candidate: candidate.latency_ms.p99_upper, milliseconds),
    Column("× torch", lambda candidate: candidate.times_torch, ratio_text(".3g")),
    Column("top-1 %", lambda candidate: candidate.top1_percent, rounded(".2f")),
    Column("flips", lambda candidate: candidate.flips, whole, wide=True),
    Column("file, MB", lambda candidate: candidate.file_bytes / 1e6, rounded(".2f")),
    Column("memory of its process, MiB", lambda candidate: candidate.memory_bytes / MIB, rounded(".0f"), wide=True),
)


def scenario(asked: Scenario) -> tuple[Column[ScenarioRow], ...]:
    """What LoadGen found, of the run that counts."""

    def of_run(value: Callable[[LoadGenRun], Any]) -> Callable[[ScenarioRow], Any]:
        return lambda row: None if row.reported is None else value(row.runs[row.reported])

    def latency(percent: int) -> Column[ScenarioRow]:
        # Offline is one query: its latency is that of the whole run.
        value = of_run(lambda run: None if asked is Scenario.OFFLINE else getattr(run.latency_ms, f"p{percent}"))
        return Column(f"p{percent}, ms", value, rounded(".3g"))

    return (
        Column("backend", lambda row: row.subject.label, looking("subject"), words=True),
        Column("result", of_run(lambda run: _reported(run, asked))),
        Column(
            "verdict", of_run(lambda run: run.verdict), lambda said: Cell(said, "good" if said == "VALID" else "bad")
        ),
        *map(latency, (50, 90, 99)),
        Column("queries", of_run(lambda run: run.queries), whole),
        Column("images", of_run(lambda run: run.images), whole),
        Column("parity", lambda row: row.subject.parity and row.subject.parity.passed, passed),
        Column("top-1 %", lambda row: row.subject.parity and row.subject.parity.top1_percent, rounded(".2f")),
    )


def _reported(run: LoadGenRun, asked: Scenario) -> str | None:
    """The figure that MLPerf reports for a scenario."""
    if asked is Scenario.SERVER:
        return None if run.verdict == "INVALID" else f"{per_s(run.queries_per_s or 0.0)} queries/s"
    if asked is Scenario.OFFLINE:
        return None if run.images_per_s is None else f"{run.images_per_s:,.0f} images/s"
    if asked is Scenario.SINGLE_STREAM:
        return f"p90 {run.latency_ms.p90:.3g} ms"
    return f"p99 {run.latency_ms.p99:.3g} ms"


# -- the table for programs ------------------------------------------------------------------------------------------


def fact(name: str, value: Callable[[Measured], Any]) -> Column[Measured]:
    """A column that only programs read."""
    return Column(name, value, fields={name: itself})


def of_timing(make: Callable[[Timing], Column[Measured]]) -> Column[Measured]:
    """A column of which each line has that of its own timing."""
    columns = {timing: make(timing) for timing in TIMINGS}
    some = columns["end_to_end"]
    return Column(some.name, lambda item: columns[item.timing].value(item), some.text, fields=some.fields)


def on_device(column: Column[Measured]) -> Column[Measured]:
    """A column that says something of calls on the device only."""
    value = column.value
    return Column(
        column.name,
        lambda item: value(item) if item.timing == "device_resident" else None,
        column.text,
        fields=column.fields,
    )


def bundle_of(item: Judged) -> BundleFacts:
    """The bundle that the subject's file is of."""
    bundles = item.result.bundles
    return next((bundle for bundle in bundles if bundle.letter == item.subject.letter), bundles[0])


def _percentile_facts(percent: int) -> Iterator[Column[Measured]]:
    for place, suffix in enumerate(("", "_upper")):
        yield fact(
            f"latency_p{percent}{suffix}_ms",
            lambda item, place=place: (_percentile(item, item.timing, percent) or (None, None))[place],  # type: ignore[misc]
        )


LINES: tuple[Column[Measured], ...] = (
    fact("result", lambda item: item.name),
    fact("started_at_utc", lambda item: item.result.started_at.isoformat()),
    fact(
        "machine",
        lambda item: ", ".join(gpu.name for gpu in item.result.environment.gpus) or item.result.environment.cpu,
    ),
    fact("commit", lambda item: item.result.environment.git_commit),
    fact("bundle", lambda item: bundle_of(item).name),
    fact("bundle_digest", lambda item: bundle_of(item).digest),
    fact("profile", lambda item: str(item.result.settings.profile)),
    BACKEND,
    fact("backend", lambda item: item.subject.backend),
    fact("device", lambda item: item.subject.device),
    fact("variant", lambda item: item.subject.variant),
    EMULATED,
    fact("threads", lambda item: item.subject.threads or item.result.settings.threads),
    FILE,
    SHA256,
    fact("folded", of_file("folded")),
    BATCH,
    fact("timing", lambda item: None if item.row is None else item.timing),
    of_timing(throughput),
    SYSTEM,
    *(column for percent in (50, 90, 99) for column in _percentile_facts(percent)),
    on_device(GPU_P50),
    of_timing(lambda timing: ratio("torch", timing)),
    of_timing(lambda timing: ratio("control", timing)),
    of_timing(lambda timing: ratio("base", timing)),
    on_device(ARITHMETIC),
    on_device(MEMORY),
    on_device(BINDS),
    on_device(fact("energy_cpu_j_per_image", energy("cpu"))),
    on_device(fact("energy_gpu_j_per_image", energy("gpu"))),
    PASSED,
    IMAGES,
    TOP1,
    ORACLE_TOP1,
    FLIPS,
    RMS_ERROR,
    FLOAT32_ERRORS,
    MAX_ERROR,
    P_VALUE,
    fact("failure", lambda item: (failure := item.subject.failure) and f"{failure.kind}: {failure.message}"),
    HOST_MEMORY,
    GPU_MEMORY,
    fact("command", lambda item: item.result.command),
)
"""A line for each subject, batch size and timing."""

"""A suite as files: its JSON, the figures of its runs, and a page in Markdown that says what was found.

Owns the page's tables and sentences, and the names of the files. Computes nothing: every figure is already in the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.report import sentences
from bench.report.png import draw_latency, draw_throughput
from bench.report.wording import NOTHING, flips_words, milliseconds, number, ratio_words, rounds_words, spread_words
from bench.results.files import check_writable, write_result, write_whole
from bench.results.parity import ParityVerdict
from bench.results.queries import finished_rows
from bench.results.roofline import Point
from bench.results.schema import Percentiles, Result, Row, SubjectResult, find_ratio
from bench.results.studies import Suite, SuiteRun, suite_run_of
from bench.results.terms import TIMINGS

JSON_NAME, PAGE_NAME = "suite.json", "summary.md"
OPTION = "--out"
FIGURES: dict[str, Callable[[Result, Path], None]] = {"throughput": draw_throughput, "latency": draw_latency}


def check_folder(out: Path) -> None:
    """Find out before anything is measured that the files can be written. Makes the folder. Raises BenchError (bad
    input).
    """
    for name in (JSON_NAME, PAGE_NAME):
        check_writable(out / name, OPTION)


def write_suite(suite: Suite, out: Path) -> None:
    """Write the JSON, the page, and the figures of the newest run: those of the others stand there already. Raises
    BenchError (bad input).
    """
    write_result(suite, out / JSON_NAME, OPTION)
    try:
        for kind, draw in FIGURES.items():
            draw(suite.runs[-1], out / _figure_name(kind, suite_run_of(suite.runs[-1])))
    except OSError as error:
        raise BenchError(
            f"a figure can't be written to {out}: {error.strerror}. Name another place with {OPTION}.", EXIT_BAD_INPUT
        ) from None
    write_whole(page(suite), out / PAGE_NAME, OPTION)


def page(suite: Suite) -> str:
    """The whole page."""
    first = suite.runs[0]
    names = ", ".join(bundle.name for bundle in first.bundles)
    best = bullets(f"{suite_run_of(result).words}, {line}" for result in suite.runs for line in sentences.best(result))
    parts = [f"# {one_line(names)} on {sentences.machine_name(first)}, {suite.started_at:%Y-%m-%d}"]
    parts += [f"**{sentences.verdict(suite.runs, suite.left_out)}**", best, table(("what", ""), _facts(suite))]
    for result in suite.runs:
        parts += _run(result, suite.raw_bytes_per_image)
    parts += ["## The machine, as `bench doctor` sees it", _findings(suite), "## Left out"]
    parts += [bullets(sentences.not_measured(suite.runs, suite.left_out)) or "Nothing."]
    return "\n\n".join(parts) + "\n"


def _facts(suite: Suite) -> Iterator[tuple[str, str]]:
    yield from sentences.machine(suite.runs)
    seconds = (suite.finished_at - suite.started_at).total_seconds()
    yield "when", f"{suite.started_at:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s of at most about {suite.time_limit_s:g}"


def _run(result: Result, raw_bytes_per_image: int) -> Iterator[str]:
    """A run: parity, speed, what folding is worth, where the time goes, what the machine did."""
    settings, leg = result.settings, suite_run_of(result)
    yield f"## {leg.words[0].upper()}{leg.words[1:]}"
    yield (
        f"Threads: {settings.threads}; interleaved rounds: {rounds_words(result)}, each with blocks of "
        f"{settings.block_s * 1000:g} ms. "
        + " ".join(f"![{kind} by batch size]({_figure_name(kind, leg)})" for kind in FIGURES)
    )
    yield "### Parity with the float64 oracle"
    yield parity_table(result)
    yield "### Speed"
    yield speed(result)
    peaks = [] if result.survey is None else list(sentences.peaks(result.survey, raw_bytes_per_image))
    yield bullets(peaks or ["the machine's peaks could not be measured, so no shares of them are known"])
    if controlled := [ratio for ratio in result.ratios if ratio.against == "control"]:
        yield "### Folded against unfolded: throughput, paired by round, with its 95 % interval"
        keys = dict.fromkeys((ratio.numerator, ratio.batch_size) for ratio in controlled)
        yield table(
            ("backend", "batch", "on the device", "end to end"),
            ((f"`{name}`", f"{size:,}", *_ratio_cells(result, "control", name, size)) for name, size in keys),
        )
    yield "### Placement and memory"
    yield table(
        ("backend", "file", "compute nodes by place", "evidence", "peak host MiB", "peak GPU MiB"),
        (_placement_cells(subject) for subject in result.subjects),
    )
    yield bullets(sentences.readings(result.readings))


def parity_table(result: Result) -> str:
    """The verdict on every backend, with what it rests on."""
    return table(
        ("backend", "verdict", "RMS error, × float32 torch's", "max error", "flips", "top-1 %", "oracle's top-1 %"),
        (_parity_cells(subject, subject.parity) for subject in result.subjects if subject.parity is not None),
    )


def _parity_cells(subject: SubjectResult, parity: ParityVerdict) -> Iterator[str]:
    yield f"`{subject.label}`"
    yield "pass" if parity.passed else "**FAIL**: " + "; ".join(parity.failures)
    yield number(parity.rms_error_in_float32_errors, ".2f")
    yield number(parity.max_abs_error, ".2g")
    yield f"{flips_words(parity)} of {parity.images:,}"
    yield number(parity.top1_percent, ".2f")
    yield number(parity.oracle_top1_percent, ".2f")


def speed(result: Result) -> str:
    """The table of the rows, each with its place under the roofline, and what its words mean."""
    points = {(point.subject, point.batch_size): point for point in result.roofline}
    rows = finished_rows(result)
    by_gpu = any(row.gpu_latency_p50_ms is not None for row in rows)
    energy = any(row.energy_per_image_j for row in rows)
    header = ["backend", "batch", "images/s, on the device", "images/s, end to end", "p50 / p99 ms, on the device"]
    header += ["p50 / p99 ms, end to end", *(["p50 ms by the GPU's clock"] if by_gpu else [])]
    header += ["× torch, on the device", "× torch, end to end", "% of arithmetic", "% of memory", "what binds"]
    header += ["mJ an image"] if energy else []

    def cells(row: Row) -> Iterator[str]:
        yield f"`{row.subject}`"
        yield f"{row.batch_size:,}"
        yield from (spread_words(row.throughput(timing)) for timing in TIMINGS)
        yield from (_latency(row.latency(timing)) for timing in TIMINGS)
        if by_gpu:
            yield milliseconds(row.gpu_latency_p50_ms)
        yield from _ratio_cells(result, "torch", row.subject, row.batch_size)
        yield from _place(points.get((row.subject, row.batch_size)))
        if energy:
            yield _energy(row)

    legend = (
        "images/s: median of the rounds ± half of its 95 % interval. On the device: the model on prepared input; end "
        "to end: from raw input to logits in host memory. × torch: throughput over eager torch's of the unfolded "
        "program, paired by round, with its 95 % interval."
    )
    return f"{table(header, map(cells, rows))}\n\n{legend}"


def _place(point: Point | None) -> tuple[str, str, str]:
    """The row's place under the roofline."""
    if point is None:
        return NOTHING, NOTHING, NOTHING
    return f"{point.arithmetic_percent:.1f}", f"{point.memory_percent:.1f}", point.binds


def _ratio_cells(result: Result, against: Literal["torch", "control"], name: str, batch_size: int) -> Iterator[str]:
    for timing in TIMINGS:
        yield ratio_words(find_ratio(result.ratios, against, name, batch_size, timing), ".3f")


def _latency(found: Percentiles) -> str:
    return f"{milliseconds(found.p50)} / {milliseconds(found.p99)}"


def _energy(row: Row) -> str:
    found = (f"{joule * 1000:.3g} ({counter})" for counter, joule in row.energy_per_image_j.items())
    return ", ".join(found) or NOTHING


def _placement_cells(subject: SubjectResult) -> Iterator[str]:
    placement = subject.placement
    yield f"`{subject.label}`"
    yield NOTHING if subject.file is None else f"`{subject.file.path}`"
    yield NOTHING if placement is None else ", ".join(f"{place}: {count}" for place, count in placement.nodes.items())
    yield NOTHING if placement is None else placement.evidence
    for held in (subject.peak_memory_bytes, subject.peak_gpu_memory_bytes):
        yield NOTHING if held is None else f"{held / 2**20:,.0f}"


def _findings(suite: Suite) -> str:
    return table(
        ("severity", "check", "seen", "fix"),
        ((finding.severity, finding.check, finding.seen, finding.fix or "") for finding in suite.findings),
    )


def _figure_name(kind: str, leg: SuiteRun) -> str:
    return f"{kind}-{leg.name}.png"


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {one_line(line)}" for line in lines)


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. A bar or a line's end inside a cell would end the cell."""
    lines = [header, ["---"] * len(header)]
    lines += [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(text: str) -> str:
    """Text of a result as part of a line, that can't begin any markup of HTML."""
    return " ".join(text.split()).replace("<", "&lt;")

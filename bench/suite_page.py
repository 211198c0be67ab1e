"""A suite as files: its JSON, the figures of its runs, and a page in Markdown that says what was found.

Owns the page's tables and sentences, and the names of the files. Computes nothing: every figure is already in the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from bench.charts import draw_latency, draw_throughput
from bench.environment import Environment
from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.parity import ParityVerdict
from bench.results import Percentiles, Result, Row, SubjectResult, check_writable, find_ratio, write_result, write_whole
from bench.roofline import Point, Survey
from bench.sensors import Reading
from bench.suite import Leg, Suite, leg_of
from bench.summary import TIMINGS
from bench.wording import NOTHING, flips_words, milliseconds, number, per_s, ratio_words, rounds_words, spread_words

JSON_NAME, PAGE_NAME = "suite.json", "summary.md"
OPTION = "--out"
FIGURES: dict[str, Callable[[Result, Path], None]] = {"throughput": draw_throughput, "latency": draw_latency}
# What a runtime says of itself in its settings and a reader wants to know of a machine.
VERSIONS = ("torch", "cuda", "cudnn", "onnxruntime")


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
            draw(suite.runs[-1], out / _figure_name(kind, leg_of(suite.runs[-1])))
    except OSError as error:
        raise BenchError(
            f"a figure can't be written to {out}: {error.strerror}. Name another place with {OPTION}.", EXIT_BAD_INPUT
        ) from None
    write_whole(page(suite), out / PAGE_NAME, OPTION)


def page(suite: Suite) -> str:
    """The whole page."""
    first = suite.runs[0]
    names = ", ".join(bundle.name for bundle in first.bundles)
    parts = [f"# {names} on {_machine_name(first.environment)}, {suite.started_at:%Y-%m-%d}", _verdict(suite)]
    parts += [_table(("what", ""), _facts(suite))]
    for result in suite.runs:
        parts += _run(result, suite.raw_bytes_per_image)
    parts += ["## The machine, as `bench doctor` sees it", _findings(suite), "## Left out"]
    parts += [_list(_left_out(suite)) or "Nothing."]
    return "\n\n".join(parts) + "\n"


def _verdict(suite: Suite) -> str:
    """What is right or wrong with all of it, and the best figures of every run."""
    judged = [(result, subject) for result in suite.runs for subject in result.subjects if subject.parity is not None]
    wrong = [f"parity of {_named(s, r)} failed" for r, s in judged if s.parity is not None and not s.parity.passed]
    wrong += [f"{_named(s, r)} did not finish" for r in suite.runs for s in r.subjects if s.failure is not None]
    wrong += [f"{entry.what} could not be measured" for entry in suite.left_out if entry.failed]
    verdict = f"All {len(judged)} parity verdicts are good, and every backend that can run here finished."
    if wrong:
        verdict = f"Not all is well: {'; '.join(wrong)}. {len(judged)} parity verdicts were made."
    return f"**{verdict}**\n\n{_list(line for result in suite.runs for line in _best(result))}"


def _named(subject: SubjectResult, result: Result) -> str:
    return f"`{subject.label}` ({leg_of(result).words})"


def _best(result: Result) -> Iterator[str]:
    """The lowest latency at the smallest batch and the highest throughput, of those that finished and are right."""
    wrong = {subject.label for subject in result.subjects if subject.parity and not subject.parity.passed}
    rows = [row for row in _finished_rows(result) if row.subject not in wrong]
    if not rows:
        return
    smallest, where = min(row.batch_size for row in rows), leg_of(result).words
    timed = [row for row in rows if row.batch_size == smallest and row.device_resident_latency_ms.p50 is not None]
    if timed:
        quickest = min(timed, key=lambda row: row.device_resident_latency_ms.p50 or 0.0)
        yield (
            f"{where}, batch {smallest}: `{quickest.subject}` is the quickest, with a p50 of "
            f"{milliseconds(quickest.device_resident_latency_ms.p50)} ms on the device and "
            f"{milliseconds(quickest.end_to_end_latency_ms.p50)} ms end to end"
        )
    for timing, words in zip(TIMINGS, ("on the device", "end to end"), strict=True):
        _, place = max((row.throughput(timing).median, place) for place, row in enumerate(rows))
        row = rows[place]
        yield (
            f"{where}, highest throughput {words}: {spread_words(row.throughput(timing))} images/s, "
            f"`{row.subject}` at batch {row.batch_size:,}"
        )


def _facts(suite: Suite) -> Iterator[tuple[str, str]]:
    """What was measured on what."""
    first, machine = suite.runs[0], suite.runs[0].environment
    for gpu in machine.gpus:
        limit = "" if gpu.power_limit_w is None else f", may draw {gpu.power_limit_w:.0f} W"
        yield "GPU", f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, driver {gpu.driver}{limit}"
    yield "CPU", f"{machine.cpu}, {machine.usable_cpus} of {machine.logical_cpus} usable"
    yield "memory", f"{machine.memory_bytes / 2**30:.0f} GiB"
    versions = {name: str(value) for result in suite.runs for name, value in _runtimes(result)}
    versions = {"Python": machine.python} | versions | machine.versions
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "system", machine.platform
    yield "commit", machine.git_commit or "unknown (no git checkout)"
    for bundle in first.bundles:
        yield "bundle", f"{bundle.name}, manifest's SHA-256 {bundle.digest}"
    seconds = (suite.finished_at - suite.started_at).total_seconds()
    yield "when", f"{suite.started_at:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s of at most about {suite.time_limit_s:g}"


def _runtimes(result: Result) -> Iterator[tuple[str, object]]:
    for subject in result.subjects:
        yield from ((name, subject.settings[name]) for name in VERSIONS if name in subject.settings)


def _run(result: Result, raw_bytes_per_image: int) -> Iterator[str]:
    """A run: parity, speed, what folding is worth, where the time goes, what the machine did."""
    settings, leg = result.settings, leg_of(result)
    yield f"## {leg.words[0].upper()}{leg.words[1:]}"
    yield (
        f"Threads: {settings.threads}; interleaved rounds: {rounds_words(result)}, each with blocks of "
        f"{settings.block_s * 1000:g} ms. "
        + " ".join(f"![{kind} by batch size]({_figure_name(kind, leg)})" for kind in FIGURES)
    )
    yield "### Parity with the float64 oracle"
    yield _table(
        ("backend", "verdict", "RMS error, × float32 torch's", "max error", "flips", "top-1 %", "oracle's top-1 %"),
        (_parity_cells(subject, subject.parity) for subject in result.subjects if subject.parity is not None),
    )
    yield "### Speed"
    yield _speed(result)
    peaks = [] if result.survey is None else list(_peaks(result.survey, raw_bytes_per_image))
    yield _list(peaks or ["the machine's peaks could not be measured, so no shares of them are known"])
    if controlled := [ratio for ratio in result.ratios if ratio.against == "control"]:
        yield "### Folded against unfolded: throughput, paired by round, with its 95 % interval"
        keys = dict.fromkeys((ratio.numerator, ratio.batch_size) for ratio in controlled)
        yield _table(
            ("backend", "batch", "on the device", "end to end"),
            ((f"`{name}`", f"{size:,}", *_ratio_cells(result, "control", name, size)) for name, size in keys),
        )
    yield "### Placement and memory"
    yield _table(
        ("backend", "file", "compute nodes by place", "evidence", "peak host MiB", "peak GPU MiB"),
        (_placement_cells(subject) for subject in result.subjects),
    )
    yield _list(_readings(result.readings))


def _parity_cells(subject: SubjectResult, parity: ParityVerdict) -> Iterator[str]:
    yield f"`{subject.label}`"
    yield "pass" if parity.passed else "**FAIL**: " + "; ".join(parity.failures)
    yield number(parity.rms_error_in_float32_errors, ".2f")
    yield number(parity.max_abs_error, ".2g")
    yield f"{flips_words(parity)} of {parity.images:,}"
    yield number(parity.top1_percent, ".2f")
    yield number(parity.oracle_top1_percent, ".2f")


def _speed(result: Result) -> str:
    """The table of the rows, each with its place under the roofline, and what its words mean."""
    points = {(point.subject, point.batch_size): point for point in result.roofline}
    rows = _finished_rows(result)
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
    return f"{_table(header, map(cells, rows))}\n\n{legend}"


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


def _peaks(survey: Survey, raw_bytes_per_image: int) -> Iterator[str]:
    """What the shares are shares of, and what end-to-end rows can't exceed."""
    work = survey.work
    yield (
        f"the model's work: {work.flops_per_image * 1e-6:,.3g} MFLOP and {work.activation_bytes_per_image * 1e-3:,.3g} "
        f"kB an image, {work.weight_bytes * 1e-6:,.3g} MB of weights a call"
    )
    for peak in survey.peaks:
        yield (
            f"measured peaks of {peak.device}, of which % of arithmetic and % of memory are shares: "
            f"{peak.flops_per_s * 1e-12:,.3g} TFLOP/s in one matrix product, {peak.copy_bytes_per_s * 1e-9:,.3g} GB/s "
            "in one copy, reading and writing counted"
        )
        if peak.host_to_device_bytes_per_s is not None:
            yield (
                f"the limit of end-to-end rows: an image is {raw_bytes_per_image:,} bytes of raw input, and one copy "
                f"to the device was measured at {peak.host_to_device_bytes_per_s * 1e-9:,.3g} GB/s, which is "
                f"{per_s(peak.host_to_device_bytes_per_s / raw_bytes_per_image)} images/s for the copy alone"
            )


def _placement_cells(subject: SubjectResult) -> Iterator[str]:
    placement = subject.placement
    yield f"`{subject.label}`"
    yield NOTHING if subject.file is None else f"`{subject.file.path}`"
    yield NOTHING if placement is None else ", ".join(f"{place}: {count}" for place, count in placement.nodes.items())
    yield NOTHING if placement is None else placement.evidence
    for held in (subject.peak_memory_bytes, subject.peak_gpu_memory_bytes):
        yield NOTHING if held is None else f"{held / 2**20:,.0f}"


def _readings(readings: tuple[Reading, Reading]) -> Iterator[str]:
    """The sensors before the first block and after the last."""
    for when, reading in zip(("before", "after"), readings, strict=True):
        facts = [f"CPU at {number(reading.cpu_frequency_mhz, ',.0f')} MHz"]
        for gpu in reading.gpus:
            throttled = f", slowed down by: {', '.join(gpu.throttled_by)}" if gpu.throttled_by else ""
            facts.append(
                f"{gpu.name} at {number(gpu.sm_clock_mhz, ',')} MHz (memory {number(gpu.memory_clock_mhz, ',')}), "
                f"{number(gpu.temperature_celsius, '')} °C, {number(gpu.power_watts, '.0f')} W{throttled}"
            )
        yield f"{when} the rounds: {'; '.join(facts)}"


def _findings(suite: Suite) -> str:
    return _table(
        ("severity", "check", "seen", "fix"),
        ((finding.severity, finding.check, finding.seen, finding.fix or "") for finding in suite.findings),
    )


def _left_out(suite: Suite) -> Iterator[str]:
    for entry in suite.left_out:
        yield f"{entry.what}: {entry.reason}"
    for result in suite.runs:
        by_reason: dict[str, list[str]] = {}
        for skipped in result.skipped:
            by_reason.setdefault(skipped.reason, []).append(f"`{skipped.backend}`")
        for reason, backends in by_reason.items():
            yield f"{', '.join(backends)} ({leg_of(result).words}): {reason}"
        for subject in result.subjects:
            if subject.failure is not None:
                yield f"{_named(subject, result)} {subject.failure.kind}: {subject.failure.message}"


def _finished_rows(result: Result) -> list[Row]:
    failed = {subject.label for subject in result.subjects if subject.failure is not None}
    return [row for row in result.rows if row.subject not in failed]


def _machine_name(machine: Environment) -> str:
    return ", ".join(gpu.name for gpu in machine.gpus) or machine.cpu


def _figure_name(kind: str, leg: Leg) -> str:
    return f"{kind}-{leg.name}.png"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. A bar or a line's end inside a cell would end the cell."""
    lines = [header, ["---"] * len(header)]
    lines += [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

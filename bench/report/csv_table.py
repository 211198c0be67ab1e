"""Results as a short page in Markdown, for a pull request, and as CSV, for whatever reads tables.

Owns what stands in the two and their columns' names. Computes nothing: every figure is already in the results.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from bench.report import sentences
from bench.results.load import Source
from bench.results.parity import ParityVerdict
from bench.results.queries import finished_rows
from bench.results.roofline import Point
from bench.results.schema import Against, Result, Row, SubjectResult, find_ratio
from bench.results.terms import TIMINGS, Timing

Cell = str | int | float | bool | None
# What a spreadsheet would take for a formula, were it the first character of a text.
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def csv_table(sources: Sequence[Source]) -> str:
    """A line for each subject, batch size and timing; of a subject that was judged and not timed, one without speed."""
    lines = [
        dict(_cells(name, result, subject, row, timing))
        for source in sources
        for name, result in zip(source.names, source.results, strict=True)
        for subject, row, timing in _timed(result)
    ]
    columns = dict.fromkeys(column for line in lines for column in line)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _told(cell) for column, cell in line.items()} for line in lines)
    return out.getvalue()


def _timed(result: Result) -> Iterator[tuple[SubjectResult, Row | None, Timing | None]]:
    for subject in result.subjects:
        rows = [row for row in finished_rows(result) if row.subject == subject.label]
        yield from ((subject, row, timing) for row in rows for timing in TIMINGS)
        if not rows:
            yield subject, None, None


def _told(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS):
        return f"'{cell}"
    return cell


def _cells(
    name: str, result: Result, subject: SubjectResult, row: Row | None, timing: Timing | None
) -> Iterator[tuple[str, Cell]]:
    yield from _conditions(name, result, subject)
    if row is not None and timing is not None:
        yield from _speed(result, row, timing)
    yield from _parity(subject.parity)
    yield "failure", None if subject.failure is None else f"{subject.failure.kind}: {subject.failure.message}"
    yield "peak_memory_bytes", subject.peak_memory_bytes
    yield "peak_gpu_memory_bytes", subject.peak_gpu_memory_bytes
    yield "command", result.command


def _conditions(name: str, result: Result, subject: SubjectResult) -> Iterator[tuple[str, Cell]]:
    bundle = next((b for b in result.bundles if b.letter == subject.letter), result.bundles[0])
    file, settings = subject.file, result.settings
    yield "result", name
    yield "started_at_utc", result.started_at.isoformat()
    yield "machine", sentences.machine_name(result)
    yield "commit", result.environment.git_commit
    yield "bundle", bundle.name
    yield "bundle_digest", bundle.digest
    yield "profile", str(settings.profile)
    yield "subject", subject.label
    yield "backend", subject.backend
    yield "device", subject.device
    yield "variant", subject.variant
    yield "threads", subject.threads or settings.threads
    yield "file", None if file is None else file.path
    yield "file_sha256", None if file is None else file.sha256
    yield "folded", None if file is None else file.folded


def _speed(result: Result, row: Row, timing: Timing) -> Iterator[tuple[str, Cell]]:
    found, latency = row.throughput(timing), row.latency(timing)
    on_device = timing == "device_resident"
    yield "batch_size", row.batch_size
    yield "timing", timing
    yield "rounds", found.n
    yield "throughput_images_per_s", found.median
    yield "throughput_low_images_per_s", found.low
    yield "throughput_high_images_per_s", found.high
    yield "stable", row.verdict == "stable"
    for percent in ("p50", "p90", "p99"):
        yield f"latency_{percent}_ms", getattr(latency, percent)
        yield f"latency_{percent}_upper_ms", getattr(latency, f"{percent}_upper")
    yield "gpu_latency_p50_ms", row.gpu_latency_p50_ms if on_device else None
    for against in ("torch", "control", "base"):
        yield from _ratio(result, row, timing, against)
    yield from _place(result, row if on_device else None)
    for counter in ("cpu", "gpu"):
        yield f"energy_{counter}_j_per_image", row.energy_per_image_j.get(counter) if on_device else None


def _ratio(result: Result, row: Row, timing: Timing, against: Against) -> Iterator[tuple[str, Cell]]:
    found = find_ratio(result.ratios, against, row.subject, row.batch_size, timing)
    yield f"throughput_ratio_to_{against}", None if found is None else found.median
    yield f"throughput_ratio_to_{against}_low", None if found is None else found.low
    yield f"throughput_ratio_to_{against}_high", None if found is None else found.high


def _place(result: Result, row: Row | None) -> Iterator[tuple[str, Cell]]:
    """The place under the roofline, which is of the time on the device."""
    points: dict[tuple[str, int], Point] = {(p.subject, p.batch_size): p for p in result.roofline}
    point = None if row is None else points.get((row.subject, row.batch_size))
    yield "arithmetic_percent_of_peak", None if point is None else point.arithmetic_percent
    yield "memory_percent_of_peak", None if point is None else point.memory_percent
    yield "binds", None if point is None else point.binds


def _parity(parity: ParityVerdict | None) -> Iterator[tuple[str, Cell]]:
    yield "parity_passed", None if parity is None else parity.passed
    yield "images", None if parity is None else parity.images
    yield "top1_percent", None if parity is None else parity.top1_percent
    yield "oracle_top1_percent", None if parity is None else parity.oracle_top1_percent
    yield "flips", None if parity is None or parity.flips is None else len(parity.flips)
    yield "rms_error", None if parity is None else parity.rms_error
    yield "rms_error_in_float32_errors", None if parity is None else parity.rms_error_in_float32_errors
    yield "max_abs_error", None if parity is None else parity.max_abs_error
    yield "mcnemar_p_value", None if parity is None or parity.mcnemar is None else parity.mcnemar.p_value

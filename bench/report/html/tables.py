"""Tables of a result in HTML.

Owns how a table is made, so that it scrolls in its own box, is reached by keyboard and can be filtered, and which
tables a result has. Computes nothing that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.machine.findings import Finding
from bench.report.html.figures import finished_points, looks, ranges
from bench.report.html.markup import Child, Html, element
from bench.report.html.plot import swatch
from bench.report.sentences import TIMING_WORDS
from bench.report.wording import NOTHING, flips_words, milliseconds, number, ratio_words, spread_words
from bench.results.parity import ParityVerdict
from bench.results.queries import finished_rows, right_rows, tailed_rows
from bench.results.schema import Against, BundleFacts, Percentiles, Result, Row, SubjectResult, find_ratio
from bench.results.terms import TIMINGS


@dataclass(frozen=True)
class Line:
    """A row of a table; `subject` is the subject's number and `batch_size` the row's, by which the page hides it."""

    cells: tuple[Child, ...]
    subject: int | None = None
    batch_size: int | None = None


def table(id_: str, caption: str, header: Sequence[str], lines: Iterable[Line], text_columns: int = 1) -> Html:
    """A table in a box of its own. The first `text_columns` columns hold words, the others figures."""
    titles = [
        element("th", title, scope="col", class_=None if place < text_columns else "n")
        for place, title in enumerate(header)
    ]
    rows = [
        element("tr", _cells(line.cells, text_columns), data_s=line.subject, data_b=line.batch_size) for line in lines
    ]
    content = element(
        "table", element("caption", caption), element("thead", element("tr", titles)), element("tbody", rows), id=id_
    )
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cells(cells: tuple[Child, ...], text_columns: int) -> Iterator[Html]:
    for place, cell in enumerate(cells):
        if place == 0:
            yield element("th", cell, scope="row")
        else:
            yield element("td", cell, class_=None if place < text_columns else "n")


def throughputs(result: Result, id_: str) -> Html:
    """Images per second by subject and batch size, with the ratios to torch where there are any."""
    against_torch = any(ratio.against == "torch" for ratio in result.ratios)

    def cells(row: Row) -> Iterator[Child]:
        yield from (f"{row.batch_size:,}", *(spread_words(row.throughput(timing)) for timing in TIMINGS))
        if against_torch:
            yield from _ratios(result, "torch", row.subject, row.batch_size)
        yield row.verdict

    header = ["backend", "batch", *(f"images/s, {TIMING_WORDS[timing]}" for timing in TIMINGS)]
    header += [f"× torch, {TIMING_WORDS[timing]}" for timing in TIMINGS] if against_torch else []
    caption = "Throughput: median of the rounds, ± half of its 95 % interval"
    return table(id_, caption, [*header, "verdict"], _by_row(result, cells))


def _ratios(result: Result, against: Against, label: str, batch_size: int) -> Iterator[str]:
    for timing in TIMINGS:
        yield ratio_words(find_ratio(result.ratios, against, label, batch_size, timing), ".3f")


def latencies(result: Result, id_: str) -> Html:
    """Percentiles of the calls, each with what it does not exceed with 95 % confidence."""
    by_gpu = any(row.gpu_latency_p50_ms is not None for row in result.rows)

    def cells(row: Row) -> Iterator[Child]:
        yield f"{row.batch_size:,}"
        yield from (cell for timing in TIMINGS for cell in _percentiles(row.latency(timing)))
        if by_gpu:
            yield milliseconds(row.gpu_latency_p50_ms)

    header = ["backend", "batch", *(f"p{p} {TIMING_WORDS[timing]}" for timing in TIMINGS for p in (50, 90, 99))]
    header += ["p50 by the GPU's clock"] if by_gpu else []
    caption = "Latency of a call in ms, and at most, with 95 % confidence (–: too few calls)"
    return table(id_, caption, header, _by_row(result, cells))


def _percentiles(found: Percentiles) -> Iterator[Child]:
    for value, upper in ((found.p50, found.p50_upper), (found.p90, found.p90_upper), (found.p99, found.p99_upper)):
        bound = [] if value is None or upper is None else [element("small", f" ≤ {milliseconds(upper)}")]
        yield (milliseconds(value), *bound)


def trade_off(result: Result, id_: str) -> Html:
    """Throughput, p99 and top-1, the fastest first; what no other beats both ways is marked."""
    right = [row for row in right_rows(result) if row.end_to_end_latency_ms.p99 is not None]
    parities = {subject.label: subject.parity for subject in result.subjects}
    style = looks(result)

    def line(row: Row) -> Line:
        parity = parities[row.subject]
        unbeaten = row in right and not any(_beats(other, row) for other in right)
        cells: tuple[Child, ...] = (
            _name(row.subject, result),
            f"{row.batch_size:,}",
            spread_words(row.end_to_end_throughput_images_per_s),
            milliseconds(row.end_to_end_latency_ms.p99),
            NOTHING if parity is None else number(parity.top1_percent, ".2f"),
            "yes" if unbeaten else "",
        )
        return Line(cells, style[row.subject].index, row.batch_size)

    by_speed = sorted(tailed_rows(result), key=lambda row: -row.end_to_end_throughput_images_per_s.median)
    caption = "The same points, the fastest first"
    header = ("backend", "batch", "images/s", "p99, ms", "top-1 %", "unbeaten")
    return table(id_, caption, header, map(line, by_speed))


def _beats(one: Row, other: Row) -> bool:
    """Whether `one` is at least as good both ways, and better in one. Both have a p99."""
    mine = (one.end_to_end_throughput_images_per_s.median, -(one.end_to_end_latency_ms.p99 or 0.0))
    its = (other.end_to_end_throughput_images_per_s.median, -(other.end_to_end_latency_ms.p99 or 0.0))
    return mine != its and mine[0] >= its[0] and mine[1] >= its[1]


def parity(result: Result, id_: str) -> Html:
    """The verdicts, and what each rests on."""
    style = looks(result)
    lines = [
        Line((_name(subject.label, result), *_parity_cells(subject, found)), style[subject.label].index)
        for subject in result.subjects
        if (found := subject.parity) is not None
    ]
    found_by = ("top-1 %", "oracle's", "flips", "of images", "RMS error", "× float32 torch's", "max error")
    header = ("backend", "verdict", "file", *found_by, "McNemar b, c", "p")
    return table(id_, "Parity with the float64 oracle of the unfolded model", header, lines, text_columns=3)


def _parity_cells(subject: SubjectResult, found: ParityVerdict) -> Iterator[Child]:
    yield element("span", "holds" if found.passed else "fails", class_="good" if found.passed else "bad")
    yield NOTHING if subject.file is None else subject.file.path
    yield number(found.top1_percent, ".2f")
    yield number(found.oracle_top1_percent, ".2f")
    yield flips_words(found)
    yield f"{found.images:,}"
    yield number(found.rms_error, ".2g")
    yield number(found.rms_error_in_float32_errors, ".2f")
    yield number(found.max_abs_error, ".2g")
    test = found.mcnemar
    yield NOTHING if test is None else f"{test.b}, {test.c}"
    yield NOTHING if test is None else number(test.p_value, ".3g")


def errors(result: Result, id_: str) -> Html:
    """The histograms as figures: how many images in each range, for every subject that has one."""
    found = [
        (s.label, s.parity.errors) for s in result.subjects if s.parity is not None and s.parity.errors is not None
    ]
    columns = [list(ranges(spread)) for _, spread in found]
    lines = [
        Line((f"10^{line[0][0]:g} to 10^{line[0][1]:g}", *(f"{count:,}" for _, _, count in line)))
        for line in zip(*columns, strict=True)
        if any(count for _, _, count in line)
    ]
    caption = "Images by the largest absolute error of their logits"
    return table(id_, caption, ("error", *(label for label, _ in found)), lines)


def roofline(result: Result, id_: str) -> Html:
    """The share of each peak, and what binds."""
    style = looks(result)
    lines = [
        Line(
            (
                _name(point.subject, result),
                f"{point.batch_size:,}",
                f"{point.arithmetic_percent:.1f}",
                f"{point.memory_percent:.1f}",
                point.binds,
            ),
            style[point.subject].index,
            point.batch_size,
        )
        for point in finished_points(result)
    ]
    return table(
        id_, "Share of the measured peaks", ("backend", "batch", "% of arithmetic", "% of memory", "what binds"), lines
    )


def norms(bundle: BundleFacts, id_: str) -> Html:
    """What became of each BatchNorm of a bundle."""
    assert bundle.fold is not None
    lines = [
        Line((element("code", norm.name), norm.method, ", ".join(norm.into), f"{norm.error:.1g}"))
        for norm in bundle.fold.folded
    ]
    kept = element("span", "kept", class_="bad")
    lines += [Line((element("code", norm.name), kept, norm.reason, NOTHING)) for norm in bundle.fold.kept]
    caption = "Each BatchNorm: how it was folded into which layers, or why it was kept"
    return table(id_, caption, ("BatchNorm", "how", "into, or why not", "error of the fold"), lines, text_columns=3)


def compared(result: Result, against: Against, caption: str, id_: str) -> Html:
    """Ratios of throughput, paired by round."""
    style = looks(result)
    keys = dict.fromkeys((r.numerator, r.denominator, r.batch_size) for r in result.ratios if r.against == against)

    def line(name: str, base: str, size: int) -> Line:
        cells = (_name(name, result), element("code", base), f"{size:,}", *_ratios(result, against, name, size))
        return Line(cells, style[name].index, size)

    header = ("backend", "over", "batch", *(TIMING_WORDS[timing] for timing in TIMINGS))
    return table(id_, caption, header, (line(*key) for key in keys), text_columns=2)


def placement(result: Result, id_: str) -> Html:
    """Where the compute nodes ran, of which file, and the memory that took."""
    style = looks(result)
    lines = [Line(tuple(_placement_cells(s, result)), style[s.label].index) for s in result.subjects]
    header = ("backend", "file", "its SHA-256", "nodes by place", "evidence", "peak host MiB", "peak GPU MiB")
    return table(id_, "What ran where", header, lines, text_columns=5)


def _placement_cells(subject: SubjectResult, result: Result) -> Iterator[Child]:
    place, file = subject.placement, subject.file
    yield _name(subject.label, result)
    yield NOTHING if file is None else file.path
    yield NOTHING if file is None else element("code", file.sha256[:12])
    yield NOTHING if place is None else ", ".join(f"{where}: {count}" for where, count in place.nodes.items())
    yield NOTHING if place is None else place.evidence
    for held in (subject.peak_memory_bytes, subject.peak_gpu_memory_bytes):
        yield NOTHING if held is None else f"{held / 2**20:,.0f}"


def findings(found: Iterable[Finding], id_: str) -> Html:
    """What the doctor of a suite said of the machine."""
    lines = [Line((finding.check, str(finding.severity), finding.seen, finding.fix or "")) for finding in found]
    return table(id_, "The machine before the runs", ("check", "severity", "seen", "fix"), lines, text_columns=4)


def _by_row(result: Result, cells: Callable[[Row], Iterable[Child]]) -> Iterator[Line]:
    """A line for each row of those that finished."""
    style = looks(result)
    for row in finished_rows(result):
        yield Line((_name(row.subject, result), *cells(row)), style[row.subject].index, row.batch_size)


def _name(label: str, result: Result) -> Html:
    """A subject's name behind its line and marker."""
    return element("span", swatch(looks(result)[label]), element("code", label), class_="subject")

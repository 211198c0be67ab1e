"""Which tables a result has on the page, each of the columns that `bench.report.columns` lists."""

from __future__ import annotations

from collections.abc import Iterable

from bench.machine.findings import Finding
from bench.report import columns
from bench.report.columns import ComparedFiles, Judged, Measured
from bench.report.html.figures import looks, ranges
from bench.report.html.markup import Html
from bench.report.html.table import Line, table
from bench.report.table import Column
from bench.results.queries import tailed_rows
from bench.results.schema import Against, BundleFacts, Result


def throughputs(result: Result, id_: str) -> Html:
    """Images per second by subject and batch size, with the ratios to torch where there are any."""
    caption = "Throughput: median of the rounds, ± half of its 95 % interval"
    return table(id_, caption, columns.THROUGHPUTS, columns.measured(result), _of_row, looks(result))


def latencies(result: Result, id_: str) -> Html:
    """Percentiles of the calls, each with what it does not exceed with 95 % confidence."""
    caption = "Latency of a call in ms, and at most, with 95 % confidence (–: too few calls)"
    return table(id_, caption, columns.LATENCIES, columns.measured(result), _of_row, looks(result))


def trade_off(result: Result, id_: str) -> Html:
    """Throughput, p99 and top-1, the fastest first; what no other beats both ways is marked."""
    by_speed = sorted(tailed_rows(result), key=lambda row: -row.end_to_end_throughput_images_per_s.median)
    caption = "The same points, the fastest first"
    return table(id_, caption, columns.TRADE_OFF, columns.measured(result, by_speed), _of_row, looks(result))


def parity(result: Result, id_: str) -> Html:
    """The verdicts, and what each rests on."""
    caption = "Parity with the float64 oracle of the unfolded model"
    return table(id_, caption, columns.PARITY, columns.judged(result), _of_subject, looks(result))


def errors(result: Result, id_: str) -> Html:
    """The histograms as figures: how many images in each range, for every subject that has one."""
    histograms = [
        (s.label, s.parity.errors) for s in result.subjects if s.parity is not None and s.parity.errors is not None
    ]
    by_range = zip(*(list(ranges(spread)) for _, spread in histograms), strict=True)
    lines = [line for line in by_range if any(count for _, _, count in line)]
    shown: list[Column[tuple[tuple[float, float, int], ...]]] = [
        Column("error", lambda line: f"10^{line[0][0]:g} to 10^{line[0][1]:g}", words=True),
        *(
            Column(label, lambda line, place=place: line[place][2], columns.whole)  # type: ignore[misc]
            for place, (label, _) in enumerate(histograms)
        ),
    ]
    return table(id_, "Images by the largest absolute error of their logits", shown, lines)


def roofline(result: Result, id_: str) -> Html:
    """The share of each peak, and what binds."""
    placed = [item for item in columns.measured(result) if columns.point_of(item) is not None]
    return table(id_, "Share of the measured peaks", columns.ROOFLINE, placed, _of_row, looks(result))


def norms(bundle: BundleFacts, id_: str) -> Html:
    """What became of each BatchNorm of a bundle."""
    assert bundle.fold is not None
    caption = "Each BatchNorm: how it was folded into which layers, or why it was kept"
    return table(id_, caption, columns.NORMS, columns.norms(bundle.fold))


def compared(result: Result, against: Against, caption: str, id_: str) -> Html:
    """Ratios of throughput, paired by round."""

    def line(item: ComparedFiles) -> Line:
        return Line(item.numerator, item.batch_size)

    return table(id_, caption, columns.COMPARED, columns.compared_files(result, against), line, looks(result))


def placement(result: Result, id_: str) -> Html:
    """Where the compute nodes ran, of which file, and the memory that took."""
    items = [Judged(result, subject) for subject in result.subjects]
    return table(id_, "What ran where", columns.PLACEMENT, items, _of_subject, looks(result))


def findings(items: Iterable[Finding], id_: str) -> Html:
    """What the doctor of a suite said of the machine."""
    return table(id_, "The machine before the runs", columns.FINDINGS, items)


def _of_row(item: Measured) -> Line:
    return Line(item.subject.label, None if item.row is None else item.row.batch_size)


def _of_subject(item: Judged) -> Line:
    return Line(item.subject.label)

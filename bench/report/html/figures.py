"""Which charts a result has.

Owns what is drawn against what, and the words that a pointer finds on a mark. Computes nothing: every figure is
already in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bench.report.html.markup import Html, element
from bench.report.html.plot import (
    Axis,
    Look,
    Mark,
    Series,
    State,
    batch_axis,
    histogram,
    log_axis,
    percent_axis,
    scatter,
    short,
)
from bench.report.png import PANELS
from bench.report.wording import TIMING_WORDS, binding_words, milliseconds, number, spread_words
from bench.results.queries import finished_rows, is_right, subject_of, tailed_rows
from bench.results.roofline import Point
from bench.results.schema import Percentiles, Result, Row, SubjectResult
from bench.results.terms import CONTROL_SUFFIX, TIMINGS, Timing
from export.bundle.verdict import ErrorHistogram

# What a top-1 may be below the oracle's without being called worse: half of the last digit shown.
TOP1_POINTS = 0.005


def looks(result: Result) -> dict[str, Look]:
    """How each subject is drawn. A control looks like what it is the control of."""
    labels = [subject.label for subject in result.subjects]
    places = list(dict.fromkeys(label.removesuffix(CONTROL_SUFFIX) for label in labels))
    return {
        label: Look(index, places.index(label.removesuffix(CONTROL_SUFFIX)), label.endswith(CONTROL_SUFFIX))
        for index, label in enumerate(labels)
    }


def figure(title: str, chart: Html) -> Html:
    """A chart below its title."""
    return element("figure", element("figcaption", title), chart)


def throughput(result: Result, table: str) -> Iterator[Html]:
    """Images per second over the batch size, a chart for each timing, with the medians' 95 % intervals."""
    rows = finished_rows(result)
    values = [value for row in rows for timing in TIMINGS for value in _ends(row, timing)]
    x, y = batch_axis(sorted({row.batch_size for row in rows})), log_axis("images/s", values)
    for timing in TIMINGS:
        marks = [(row.subject, _throughput_mark(row, timing)) for row in rows]
        what = f"Throughput {TIMING_WORDS[timing]} over the batch size, with 95 % intervals."
        yield figure(_sentence(PANELS[timing]), scatter(what, table, x, y, _series(result, marks)))


def _throughput_mark(row: Row, timing: Timing) -> Mark:
    spread = row.throughput(timing)
    words = f"{row.subject}, batch {row.batch_size:,}: {spread_words(spread)} images/s"
    return Mark(row.batch_size, row.batch_size, spread.median, words, spread.low, spread.high)


def _ends(row: Row, timing: Timing) -> Iterator[float]:
    spread = row.throughput(timing)
    yield from (spread.median, spread.low or spread.median, spread.high or spread.median)


def latency(result: Result, table: str) -> Iterator[Html]:
    """The p50 and the p99 over the batch size, a chart for each timing; bars reach up to the 95 % bounds."""
    rows = finished_rows(result)
    x = batch_axis(sorted({row.batch_size for row in rows}))
    values = [value for row in rows for timing in TIMINGS for value in _bounds(row.latency(timing))]
    y = log_axis("ms", values)
    for percent in (50, 99):
        for timing in TIMINGS:
            marks = [(row.subject, mark) for row in rows if (mark := _latency_mark(row, timing, percent)) is not None]
            what = f"Latency of a call {TIMING_WORDS[timing]}, p{percent}, over the batch size."
            title = f"p{percent}, {TIMING_WORDS[timing]}"
            yield figure(title, scatter(what, table, x, y, _series(result, marks)))


def _latency_mark(row: Row, timing: Timing, percent: int) -> Mark | None:
    percentiles = row.latency(timing)
    value, upper = (
        (percentiles.p50, percentiles.p50_upper) if percent == 50 else (percentiles.p99, percentiles.p99_upper)
    )
    if value is None:
        return None
    bound = "" if upper is None else f", at most {milliseconds(upper)}"
    words = f"{row.subject}, batch {row.batch_size:,}: p{percent} {milliseconds(value)} ms{bound}"
    return Mark(row.batch_size, row.batch_size, value, words, None if upper is None else value, upper)


def _bounds(percentiles: Percentiles) -> Iterator[float]:
    yield from (
        value
        for value in (percentiles.p50, percentiles.p50_upper, percentiles.p99, percentiles.p99_upper)
        if value is not None
    )


def pareto(result: Result, table: str) -> Html | None:
    """Throughput against the p99 of a call, end to end; None where nothing has a p99."""
    rows = tailed_rows(result)
    if not rows:
        return None
    marks = [(row.subject, _pareto_mark(row, subject_of(result, row.subject))) for row in rows]
    x = log_axis("images/s", (mark.x for _, mark in marks))
    y = log_axis("p99 of a call, ms", (mark.y for _, mark in marks))
    what = "Throughput against the 99th percentile of the latency, end to end; further right and lower is better."
    return figure(
        "Right and low is better", scatter(what, table, x, y, _series(result, marks), joined=False, frontier=True)
    )


def _pareto_mark(row: Row, subject: SubjectResult) -> Mark:
    throughput, p99 = row.end_to_end_throughput_images_per_s, row.end_to_end_latency_ms.p99
    parity = subject.parity
    assert p99 is not None
    top1 = "" if parity is None or parity.top1_percent is None else f", top-1 {parity.top1_percent:.2f} %"
    words = f"{row.subject}, batch {row.batch_size:,}: {spread_words(throughput)} images/s, p99 {p99:.3g} ms{top1}"
    return Mark(row.batch_size, throughput.median, p99, words, label=short(row.batch_size), state=_state(subject))


def _state(subject: SubjectResult) -> State:
    if not is_right(subject):
        return "wrong"
    if subject.emulated is not None:
        return "emulated"
    parity = subject.parity
    if parity is None or parity.top1_percent is None or parity.oracle_top1_percent is None:
        return "right"
    return "worse" if parity.top1_percent < parity.oracle_top1_percent - TOP1_POINTS else "right"


def errors(result: Result, table: str) -> Iterator[Html]:
    """For each subject how the images' largest logit errors are distributed, on the same axes."""
    histograms = [(s, s.parity.errors) for s in result.subjects if s.parity is not None and s.parity.errors is not None]
    used = [(low, high) for _, spread in histograms for low, high, count in ranges(spread) if count]
    if not used:
        return
    low, high = math.floor(min(low for low, _ in used)), math.ceil(max(high for _, high in used))
    x = Axis("largest error of an image's logits", low, high, tuple(_powers(low, high)), log=False)
    top, style = max(max(spread.counts) for _, spread in histograms), looks(result)
    for subject, spread in histograms:
        what = f"Errors of {subject.label}: the images by the largest absolute error of their logits."
        chart = histogram(what, table, style[subject.label], x, list(ranges(spread)), top)
        yield element(
            "figure", element("figcaption", element("code", subject.label)), chart, data_s=style[subject.label].index
        )


def _powers(low: int, high: int) -> Iterator[tuple[float, str]]:
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    yield from ((float(power), "10" + str(power).translate(digits)) for power in range(low, high + 1))


def ranges(spread: ErrorHistogram) -> Iterator[tuple[float, float, int]]:
    """From and to, as powers of ten, and how many images."""
    for place, count in enumerate(spread.counts):
        low = spread.log10_from + place * spread.log10_step
        yield low, low + spread.log10_step, count


def roofline(result: Result, table: str) -> Iterator[Html]:
    """The share of each of the two peaks over the batch size."""
    points = finished_points(result)
    if not points:
        return
    x = batch_axis(sorted({point.batch_size for point in points}))
    shares = [share for point in points for share in (point.arithmetic_percent, point.memory_percent)]
    for kind, words in (("arithmetic", "% of the peak's FLOP/s"), ("memory", "% of the peak's bytes/s")):
        y = percent_axis(words, shares)
        marks = [(point.subject, _roofline_mark(point, kind)) for point in points]
        what = f"Share of the measured peak of {kind} that each backend reaches, over the batch size."
        yield figure(f"Share of the peak of {kind}", scatter(what, table, x, y, _series(result, marks)))


def finished_points(result: Result) -> list[Point]:
    """The places under the roofline of the subjects that finished."""
    finished = {row.subject for row in finished_rows(result)}
    return [point for point in result.roofline if point.subject in finished]


def _roofline_mark(point: Point, kind: str) -> Mark:
    share = point.arithmetic_percent if kind == "arithmetic" else point.memory_percent
    words = f"{point.subject}, batch {point.batch_size:,}: {number(share, '.1f')} %, what binds: {binding_words(point)}"
    return Mark(point.batch_size, point.batch_size, share, words)


def _series(result: Result, marks: Sequence[tuple[str, Mark]]) -> list[Series]:
    """The marks of each subject that has any."""
    by_label = [
        (look, tuple(mark for marks_of_label, mark in marks if marks_of_label == label))
        for label, look in looks(result).items()
    ]
    return [Series(look, marks_of_label) for look, marks_of_label in by_label if marks_of_label]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]

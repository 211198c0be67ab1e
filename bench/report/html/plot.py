"""Charts as inline SVG: points with their bars over two axes, and histograms.

Owns scales, ticks and marks. Every mark says in `data-b` and `data-s` which batch size and which subject it belongs to,
so that the page's script can hide it and join the rest anew. Knows no result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.report.html.markup import Html, element, join
from bench.report.png import COLOURS

# Wide enough for two beside each other on a desk, and still legible at the width of a phone.
WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 30, 38
# Where bars of several subjects stand at the same batch size, they stand beside each other.
DODGE, WIDEST_DODGE = 3.0, 18.0
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 300, 140
# A logarithmic axis shows at least this factor: a fraction of a percent must not look like a mountain.
LEAST_FACTOR = 4.0
# As `bench.report.png` has them: circle, square, triangle, diamond, triangle upside down, plus, cross.
SHAPES = (
    "M-4.3 0a4.3 4.3 0 1 0 8.6 0a4.3 4.3 0 1 0-8.6 0z",
    "M-3.9-3.9h7.8v7.8h-7.8z",
    "M0-5.1L4.8 3.7H-4.8z",
    "M0-5.4L5.4 0L0 5.4L-5.4 0z",
    "M0 5.1L4.8-3.7H-4.8z",
    "M-1.8-5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z",
    "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",
)

State = Literal["right", "worse", "emulated", "wrong"]
UNRANKED: tuple[State, ...] = ("emulated", "wrong")
"""What is on no frontier; `script.js` leaves the same out."""
"""Of a mark: as it is, in a ring, crossed out."""


@dataclass(frozen=True)
class Look:
    """How a subject is drawn everywhere: colour and shape by `place`, hollow and dashed for a control. `index` is its
    number among the subjects, by which it is hidden.
    """

    index: int
    place: int
    control: bool

    @property
    def classes(self) -> str:
        """For the style sheet."""
        return f"c{self.place % len(COLOURS)}" + (" control" if self.control else "")

    def shape(self) -> Html:
        """Its marker, around the origin. Where the colours begin again, shapes are shifted by one."""
        return element("use", href=f"#m{(self.place + self.place // len(COLOURS)) % len(SHAPES)}")


@dataclass(frozen=True)
class Mark:
    """A point. `low` and `high` are the ends of its bar; `words` are shown where a pointer rests on it."""

    batch_size: int
    x: float
    y: float
    words: str
    low: float | None = None
    high: float | None = None
    label: str = ""
    state: State = "right"


@dataclass(frozen=True)
class Series:
    """The points of one subject."""

    look: Look
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its ends, its ticks with their words, and whether it is logarithmic."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool

    def share(self, value: float) -> float:
        """How far along a value lies, 0 to 1."""
        bend: Callable[[float], float] = math.log if self.log else float
        low, high = bend(self.low), bend(self.high)
        return (bend(value) - low) / (high - low)


@dataclass(frozen=True)
class Frame:
    """Where things stand: two axes around a rectangle, with room for words to its left and below."""

    x: Axis
    y: Axis
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def right(self) -> float:
        """Where the rectangle ends."""
        return self.width - RIGHT

    @property
    def floor(self) -> float:
        """Where it stands."""
        return self.height - BOTTOM

    def across(self, value: float) -> float:
        """The coordinate of a value of the x axis."""
        return LEFT + self.x.share(value) * (self.right - LEFT)

    def up(self, value: float) -> float:
        """The coordinate of a value of the y axis."""
        return self.floor - self.y.share(value) * (self.floor - TOP)


def log_axis(title: str, values: Iterable[float]) -> Axis:
    """Around all values, with ticks at 1, 2 and 5 times a power of ten, or at the powers alone where they are many."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.15, max(positive) * 1.15
    missing = math.sqrt(max(1.0, LEAST_FACTOR / (high / low)))
    low, high = low / missing, high * missing
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    if len(ticks) > 9:
        ticks = [10.0**power for power in powers if low <= 10.0**power <= high]
    return Axis(title, low, high, tuple((tick, short(tick)) for tick in ticks), log=True)


def batch_axis(batch_sizes: Sequence[int]) -> Axis:
    """A tick for every batch size."""
    low, high = min(batch_sizes) / 1.5, max(batch_sizes) * 1.5
    return Axis("batch size, images", low, high, tuple((size, f"{size:,}") for size in batch_sizes), log=True)


def percent_axis(title: str, values: Iterable[float]) -> Axis:
    """From 0 to 100, or to what exceeds that."""
    high = max(100.0, *(1.05 * value for value in values), 100.0)
    step = 25 * math.ceil(high / 125)
    return Axis(title, 0, high, tuple((float(tick), str(tick)) for tick in range(0, int(high) + 1, step)), log=False)


def short(value: float) -> str:
    """A tick's number: ``5,000``, ``20k``, ``1M``, ``0.02``."""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def scatter(
    what: str, table: str, x: Axis, y: Axis, series: Sequence[Series], joined: bool = True, frontier: bool = False
) -> Html:
    """A chart of points. `what` says what it shows, to who can't see it, and `table` is the id of the table that has
    its figures. Points of a subject are `joined` by a line; the `frontier` joins those that none of the others beats.
    """
    frame = Frame(x, y)
    drawn = [
        _series(line, _dodge(place, len(series)) if joined else 0.0, frame, joined) for place, line in enumerate(series)
    ]
    edge = [element("polyline", class_="frontier", points=_staircase(series, frame))] if frontier else []
    return _svg(what, table, frame, edge, drawn)


def histogram(what: str, table: str, look: Look, x: Axis, counts: Sequence[tuple[float, float, int]], top: int) -> Html:
    """Bars of `counts`: from, to, how many. `top` is the end of the upright axis, alike in all that are compared."""
    y = Axis("images", 0, top, ((0.0, "0"), (float(top), short(top))), log=False)
    frame = Frame(x, y, HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT)
    bars = [_bar(frame, low, high, count) for low, high, count in counts if count]
    return _svg(what, table, frame, element("g", bars, class_=f"bars {look.classes}"))


def _bar(frame: Frame, low: float, high: float, count: int) -> Html:
    left, top = frame.across(low) + 0.5, frame.up(count)
    return element("rect", x=left, y=top, width=frame.across(high) - 0.5 - left, height=frame.floor - top)


def swatch(look: Look) -> Html:
    """A subject's line and marker, for a legend."""
    line = element("path", class_="line", d="M-13 0H13")
    return element(
        "svg", line, look.shape(), class_=f"swatch {look.classes}", viewBox="-14 -7 28 14", aria_hidden="true"
    )


def shapes() -> Html:
    """The markers, once for the whole page."""
    paths = [element("path", id=f"m{place}", d=path) for place, path in enumerate(SHAPES)]
    return element("svg", element("defs", paths), width=0, height=0, aria_hidden="true", class_="defs")


def _svg(what: str, table: str, frame: Frame, *content: Html | list[Html]) -> Html:
    return element(
        "svg",
        element("desc", f"{what} The table named here has the figures."),
        _axes(frame),
        *content,
        class_="chart",
        viewBox=f"0 0 {frame.width} {frame.height}",
        role="img",
        aria_label=what,
        aria_details=table,
    )


def _axes(frame: Frame) -> Html:
    """Lines across at the ticks, the words beside them, and what the axes are."""
    lines = "".join(f"M{LEFT} {frame.up(tick):.1f}H{frame.right}" for tick, _ in frame.y.ticks)
    words = [element("text", word, x=LEFT - 8, y=frame.up(tick) + 4, class_="end") for tick, word in frame.y.ticks]
    words += [element("text", word, x=place, y=frame.floor + 16, class_="mid") for place, word in _apart(frame)]
    titles = (
        element("text", frame.y.title, x=LEFT - 8, y=14),
        element("text", frame.x.title, x=frame.right, y=frame.floor + 33, class_="end"),
    )
    return join((element("path", class_="grid", d=lines), words, titles))


def _apart(frame: Frame) -> Iterator[tuple[float, str]]:
    """The ticks of the x axis whose words don't run into those before them."""
    free = 0.0
    for tick, word in frame.x.ticks:
        place, half = frame.across(tick), 3.5 * len(word)
        if place - half >= free:
            free = place + half + 4
            yield place, word


def _series(series: Series, dodge: float, frame: Frame, joined: bool) -> Html:
    places = [(frame.across(mark.x) + dodge, frame.up(mark.y)) for mark in series.marks]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = [element("polyline", class_="line", points=points)] if joined else []
    marks = [_mark(mark, series.look, x, y, frame) for mark, (x, y) in zip(series.marks, places, strict=True)]
    return element("g", line, marks, class_=f"s {series.look.classes}", data_s=series.look.index)


def _mark(mark: Mark, look: Look, x: float, y: float, frame: Frame) -> Html:
    bar = []
    if mark.low is not None and mark.high is not None:
        above, below = frame.up(mark.high) - y, frame.up(mark.low) - y
        bar = [element("path", class_="bar", d=f"M0 {above:.1f}V{below:.1f}M-3 {above:.1f}H3M-3 {below:.1f}H3")]
    label = [element("text", mark.label, x=7, y=-6)] if mark.label else []
    sign = {
        "right": (),
        "worse": element("circle", class_="ring", r=8.5),
        "emulated": element("path", class_="crossed", d="M-6 6L6-6"),
        "wrong": element("path", class_="crossed", d="M-6-6L6 6M-6 6L6-6"),
    }[mark.state]
    return element(
        "g",
        bar,
        look.shape(),
        sign,
        label,
        element("title", mark.words),
        class_=None if mark.state == "right" else mark.state,
        data_b=mark.batch_size,
        transform=f"translate({x:.1f},{y:.1f})",
    )


def _dodge(place: int, count: int) -> float:
    return (place - (count - 1) / 2) * min(DODGE, WIDEST_DODGE / max(1, count))


def _staircase(series: Sequence[Series], frame: Frame) -> str:
    """The corners between the points that no other beats both ways, further right and lower being better; none of a
    wrong one. `frontier` in the page's script finds the same among what is shown.
    """
    marks = [mark for shown in series for mark in shown.marks if mark.state not in UNRANKED]
    places = [(frame.across(mark.x), frame.up(mark.y)) for mark in marks]
    corners: list[str] = []
    lowest = -math.inf
    for x, y in sorted(places, key=lambda place: (-place[0], -place[1])):
        if y > lowest:
            corners += [f"{x:.1f},{lowest:.1f}"] if corners else []
            corners.append(f"{x:.1f},{y:.1f}")
            lowest = y
    return " ".join(corners)

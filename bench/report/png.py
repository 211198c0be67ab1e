"""A result as figures: throughput and latency over the batch size.

Owns how they look. Computes nothing: every point and every bar is already in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results.schema import Result, Row
from bench.results.terms import CONTROL_SUFFIX, TIMINGS, Timing

# Okabe & Ito's palette, which people with any colour vision can tell apart, less its yellow: too pale on white. The
# marker differs with the colour, so that a print in grey can be read too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS: dict[Timing, str] = {
    "device_resident": "device-resident: the model alone, input and output on the device",
    "end_to_end": "end to end: from raw input to logits in host memory",
}


@dataclass(frozen=True)
class Dot:
    """A point of a line, with its bar. `low` and `high` are the point itself where there is no interval."""

    batch_size: int
    value: float
    low: float
    high: float


def draw_throughput(result: Result, path: Path) -> None:
    """Images per second over the batch size; bars are the medians' 95 % intervals. Raises OSError."""

    def dot(row: Row, timing: Timing) -> Dot:
        spread = row.throughput(timing)
        low, high = (spread.median if end is None else end for end in (spread.low, spread.high))
        return Dot(row.batch_size, spread.median, low, high)

    _draw(result, path, "throughput, images/s", "bars: the median's 95 % interval", dot)


def draw_latency(result: Result, path: Path) -> None:
    """The median latency of a call over the batch size; bars reach up to the 99th percentile. Raises OSError."""

    def dot(row: Row, timing: Timing) -> Dot | None:
        latency = row.latency(timing)
        if latency.p50 is None:
            return None
        return Dot(row.batch_size, latency.p50, latency.p50, latency.p99 or latency.p50)

    _draw(result, path, "latency of a call, ms: p50", "bars: from p50 to p99", dot)


def _draw(result: Result, path: Path, what: str, bars: str, dot: Callable[[Row, Timing], Dot | None]) -> None:
    """Two panels, one for each timing, with a line for each backend that finished."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(1, len(TIMINGS), sharex=True, sharey=True)
    finished = [subject.label for subject in result.subjects if subject.failure is None]
    batch_sizes = sorted({row.batch_size for row in result.rows})
    for axes, timing in zip(panels, TIMINGS, strict=True):
        for label in finished:
            points = [dot(row, timing) for row in result.rows if row.subject == label]
            _line(axes, label, [point for point in points if point is not None], _style(label, finished))
        axes.set_title(PANELS[timing], fontsize=11)
        axes.set_xlabel("batch size, images")
        _scale(axes, batch_sizes)
    panels[0].set_ylabel(f"{what} ({bars})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(result))
    figure.savefig(path, dpi=120, format="png")


def _scale(axes: Any, batch_sizes: Sequence[int]) -> None:
    """Logarithms both ways, with plain numbers beside them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(batch_sizes, [f"{size:,}" for size in batch_sizes], rotation=45)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", alpha=0.3)


def _line(axes: Any, label: str, dots: Sequence[Dot], style: dict[str, Any]) -> None:
    if not dots:  # bars of nothing would leave the axis without limits
        return
    reach = [[dot.value - dot.low for dot in dots], [dot.high - dot.value for dot in dots]]
    sizes, values = [dot.batch_size for dot in dots], [dot.value for dot in dots]
    axes.errorbar(sizes, values, yerr=reach, label=label, linewidth=1.5, markersize=6, capsize=3, **style)


def _style(label: str, finished: Sequence[str]) -> dict[str, Any]:
    """The control looks like the backend whose control it is, but dashed and hollow."""
    control = label.endswith(CONTROL_SUFFIX)
    place = list(dict.fromkeys(name.removesuffix(CONTROL_SUFFIX) for name in finished)).index(
        label.removesuffix(CONTROL_SUFFIX)
    )
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "--" if control else "-",
        "markerfacecolor": "white" if control else COLOURS[place % len(COLOURS)],
    }


def _title(result: Result) -> str:
    machine, names = result.environment, ", ".join(bundle.name for bundle in result.bundles)
    on_gpu = any(subject.device == "cuda" for subject in result.subjects)
    device = machine.gpus[0].name if on_gpu and machine.gpus else f"{machine.cpu}, threads: {result.settings.threads}"
    return f"{names} on {device}, profile {result.settings.profile}, {result.started_at:%Y-%m-%d}"

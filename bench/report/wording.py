"""Figures as people read them, alike in a terminal and in a file.

Owns how many digits are shown and how an interval is written. Knows neither tables nor markup.
"""

from __future__ import annotations

from bench.results.roofline import Point
from bench.results.schema import Result
from bench.results.statistics import MedianRatio, PairedRatio, Spread
from bench.results.terms import Timing

NOTHING = "–"
"""Too few samples, or nothing to compare."""
TIMING_WORDS: dict[Timing, str] = {"device_resident": "on the device", "end_to_end": "end to end"}


def spread_words(spread: Spread) -> str:
    """The median, with half the width of its interval where there is one: ``12,345 ±0.8%``."""
    half = spread.half_width_percent
    return per_s(spread.median) + ("" if half is None else f" ±{half:.1f}%")


def per_s(value: float) -> str:
    """Something per second: ``12,345``, or ``98.7`` where it is little."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def ratio_words(ratio: PairedRatio | MedianRatio | None, digits: str) -> str:
    """A ratio with its interval where it has one: ``1.052 (1.049…1.062)``."""
    if ratio is None:
        return NOTHING
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:{digits}}"
    return f"{ratio.median:{digits}} ({ratio.low:{digits}}…{ratio.high:{digits}})"


def rounds_words(result: Result) -> str:
    """How many rounds were done in how many processes, and of how many where the time limit came first."""
    rounds: dict[int, set[int]] = {}
    for sample in result.samples:
        rounds.setdefault(sample.process, set()).add(sample.round)
    asked, counts = result.settings, [len(done) for done in rounds.values()] or [0]
    least, most = min(counts), max(counts)
    each = f"{most}" if least == most else f"{least} to {most}"
    short = asked.rounds is not None and least < asked.rounds
    short = short or (asked.processes is not None and len(rounds) < asked.processes and bool(rounds))
    ended = " (interrupted)" if result.interrupted else " (time limit)" if short else ""
    processes = f"{len(rounds)} processes" if len(rounds) != 1 else "1 process"
    return f"{processes} of {each} rounds{ended}"


def binding_words(point: Point) -> str:
    """What binds a row; for one that nothing binds, how much of its time the roofline accounts for."""
    return f"overheads ({point.accounted_percent:.0f} % accounted for)" if point.binds == "overheads" else point.binds


def number(value: float | None, digits: str) -> str:
    """A number with so many digits."""
    return NOTHING if value is None else f"{value:{digits}}"


def milliseconds(value: float | None) -> str:
    """A latency in ms: three digits, and no more than that after 100."""
    return number(value, ".3g" if (value or 0) < 100 else ",.0f")

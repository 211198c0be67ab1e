"""A suite as files: its JSON, the figures of its runs, and a page in Markdown that says what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.report.pages import FIGURE_KINDS, figure_name, page
from bench.report.png import draw_latency, draw_throughput
from bench.results.files import check_writable, write_result, write_whole
from bench.results.schema import Result
from bench.results.studies import Suite, suite_run_of

JSON_NAME, PAGE_NAME = "suite.json", "summary.md"
OPTION = "--out"
FIGURES: dict[str, Callable[[Result, Path], None]] = dict(
    zip(FIGURE_KINDS, (draw_throughput, draw_latency), strict=True)
)


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
            draw(suite.runs[-1], out / figure_name(kind, suite_run_of(suite.runs[-1])))
    except OSError as error:
        raise BenchError(
            f"a figure can't be written to {out}: {error.strerror}. Name another place with {OPTION}.", EXIT_BAD_INPUT
        ) from None
    write_whole(page(suite), out / PAGE_NAME, OPTION)

"""Results in each form that `bench report` knows."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console

from bench.report import columns, csv_table
from bench.report.formats import ReportFormat
from bench.report.pages import markdown_page, page
from bench.report.terminal.console import WIDE, console
from bench.report.terminal.run import print_run
from bench.results.load import Source


def rendered(sources: Sequence[Source], chosen: ReportFormat) -> str:
    """The whole text of a file in that form."""
    if chosen is ReportFormat.HTML:
        from bench.report.html.document import html_page

        return html_page(sources)
    if chosen is ReportFormat.TEXT:
        text = io.StringIO()
        print_sources(sources, Console(file=text, width=WIDE, highlight=False))
        return text.getvalue()
    return markdown_page(sources) if chosen is ReportFormat.MARKDOWN else csv_lines(sources)


def csv_lines(sources: Sequence[Source]) -> str:
    """A line for each subject, batch size and timing of every result."""
    named = [entry for source in sources for entry in zip(source.names, source.results, strict=True)]
    return csv_table.table(columns.LINES, [line for name, result in named for line in columns.timed(result, name)])


def print_sources(sources: Sequence[Source], out: Console | None = None, wide: bool = False) -> None:
    """The tables of each result, and of a suite its page in Markdown; on stdout where no console is given."""
    target = out or console(wide=wide)
    for source in sources:
        if len(sources) > 1:
            target.print(str(source.path), markup=False, style="bold")
        if source.suite is not None:
            target.out(page(source.suite), end="", highlight=False)
            continue
        for name, result in zip(source.names, source.results, strict=True):
            if len(source.results) > 1:
                target.print(name, markup=False, style="bold")
            print_run(result, target)

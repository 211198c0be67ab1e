"""In which form `bench report` shows results.

Owns the forms there are and which is meant where none is named. Imports nothing heavy: the command line needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from bench.errors import EXIT_USAGE, BenchError


class ReportFormat(StrEnum):
    """A form of the report."""

    HTML = "html"
    MARKDOWN = "markdown"
    CSV = "csv"
    TEXT = "text"


ENDINGS = {
    ".html": ReportFormat.HTML,
    ".htm": ReportFormat.HTML,
    ".md": ReportFormat.MARKDOWN,
    ".csv": ReportFormat.CSV,
    ".txt": ReportFormat.TEXT,
}


def chosen_format(named: ReportFormat | None, out: Path | None, results: Sequence[Path]) -> ReportFormat:
    """The form that was named, else that of the file's ending, else text. Raises BenchError (usage), also where the
    report would take the place of one of the results.
    """
    if out is not None and out.resolve() in [path.resolve() for path in results]:
        raise BenchError(f"the report would overwrite the result {out}. Name another place with -o.", EXIT_USAGE)
    if named is None and out is not None and out.suffix.lower() not in ENDINGS:
        raise BenchError(
            f"{out} does not say what it is to be: its name ends in none of {', '.join(ENDINGS)}. Name it so, or say "
            f"--format with one of: {', '.join(ReportFormat)}.",
            EXIT_USAGE,
        )
    chosen = named or (ReportFormat.TEXT if out is None else ENDINGS[out.suffix.lower()])
    if chosen is ReportFormat.HTML and out is None:
        raise BenchError("an HTML page is no text for a terminal. Name its file: -o report.html.", EXIT_USAGE)
    return chosen

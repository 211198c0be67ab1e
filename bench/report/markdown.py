"""Tables and lists in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.report.table import Cell, Column, T, used
from bench.report.wording import NOTHING

WRAPPED = {"subject": "`", "code": "`", "bad": "**"}


def table(columns: Sequence[Column[T]], items: Iterable[T]) -> str:
    """The items' lines. A bar or a line's end inside a cell would end the cell."""
    lines = list(items)
    shown = used(columns, lines)
    rows = [[column.name for column in shown], ["---"] * len(shown)]
    rows += [[_text(column.cell(item)) for column in shown] for item in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _text(cell: Cell) -> str:
    wrap = "" if cell.text == NOTHING else WRAPPED.get(cell.look, "")
    return f"{wrap}{one_line(cell.text)}{wrap}".replace("|", "\\|")


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {one_line(line)}" for line in lines)


def one_line(text: str) -> str:
    """Text of a result as part of a line, that can't begin any markup of HTML."""
    return " ".join(text.split()).replace("<", "&lt;")

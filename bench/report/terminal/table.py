"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from bench.report.table import Cell, Column, T, used

SHORT = 12
COLOURS = {"good": "green", "bad": "red"}


def table(columns: Sequence[Column[T]], items: Iterable[T]) -> Table:
    """The items' lines. A long name is broken at its comma: room is dear, and figures are never cut off."""
    lines = list(items)
    shown = used(columns, lines)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, column in enumerate(shown):
        name = column.name if len(column.name) <= SHORT else column.name.replace(", ", "\n")
        made.add_column(name, justify="left" if column.words else "right", overflow="fold", no_wrap=not place)
    for item in lines:
        made.add_row(*(_text(column.cell(item)) for column in shown))
    return made


def _text(cell: Cell) -> str:
    colour = COLOURS.get(cell.look)
    return escape(cell.text) if colour is None else f"[{colour}]{escape(cell.text)}[/]"

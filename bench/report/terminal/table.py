"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from bench.report.table import Cell, Column, T, used

SHORT = 12
ENDLESS = 10_000
COLOURS = {"good": "green", "bad": "red"}


def print_table(columns: Sequence[Column[T]], items: Iterable[T], out: Console) -> None:
    """Print the items' lines: with all columns where there is room for them, else without the `wide` ones. Figures are
    never cut off: where even those don't fit, lines are longer than the window.
    """
    lines = list(items)
    made = table(columns, lines)
    if _least_width(made, out) > out.width:
        made = table([column for column in columns if not column.wide], lines)
    out.print(made, width=max(out.width, _least_width(made, out)), crop=False)


def _least_width(made: Table, out: Console) -> int:
    return Measurement.get(out, out.options.update(max_width=ENDLESS), made).minimum


def table(columns: Sequence[Column[T]], items: Iterable[T]) -> Table:
    """The items' lines. A long name is broken at its comma: room is dear. So may words be, but no subject's name."""
    lines = list(items)
    shown = used(columns, lines)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    cells = [[column.cell(item) for column in shown] for item in lines]
    for place, column in enumerate(shown):
        name = column.name if len(column.name) <= SHORT else column.name.replace(", ", "\n")
        texts = [*name.split("\n"), *(line[place].text for line in cells)]
        width = None if column.words and place else max(map(len, texts))
        made.add_column(name, justify="left" if column.words else "right", overflow="fold", min_width=width)
    for line in cells:
        made.add_row(*map(_text, line))
    return made


def _text(cell: Cell) -> str:
    colour = COLOURS.get(cell.look)
    return escape(cell.text) if colour is None else f"[{colour}]{escape(cell.text)}[/]"

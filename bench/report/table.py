"""What a table is, whoever writes it: columns of a name, a value and how that is written, and cells of text.

The writers (`terminal.table`, `markdown`, `csv_table`, `html.table`) know this and nothing of what was measured;
`columns` knows what was measured and nothing of any writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from bench.report.wording import NOTHING

T = TypeVar("T", contravariant=True)
Look = Literal["plain", "code", "subject", "good", "bad"]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Cell:
    """A text and how it is set off: as a name of code, as the subject of the line, or as good or bad news.

    `link` is where on the page it leads, in a form that has links.
    """

    text: str
    look: Look = "plain"
    link: str | None = None


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table about items of one kind.

    Attributes:
        name: what stands above it, its unit included.
        value: the item's value; None where it has none.
        text: the value as people read it: this decides how it is rounded.
        words: it holds words, the others figures.
        optional: left out where no item has a value.
        wide: left out where there is no room for all.
        fields: the columns that programs read in its place, by their names, which say the unit.
    """

    name: str
    value: Callable[[T], Any]
    text: Callable[[Any], str | Cell] = str
    words: bool = False
    optional: bool = False
    wide: bool = False
    fields: Mapping[str, Callable[[Any], Scalar]] = field(default_factory=dict)

    def cell(self, item: T) -> Cell:
        """What stands in the item's line."""
        value = self.value(item)
        shown = NOTHING if value is None else self.text(value)
        return shown if isinstance(shown, Cell) else Cell(shown)


def used(columns: Sequence[Column[T]], items: Iterable[T]) -> list[Column[T]]:
    """The columns less the optional ones in which nothing would stand."""
    lines = list(items)
    return [c for c in columns if not c.optional or any(c.value(item) is not None for item in lines)]

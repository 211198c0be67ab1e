"""Tables in HTML: each scrolls in a box of its own, is reached by keyboard and can be filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.report.html.markup import Child, Html, element
from bench.report.html.plot import Look, swatch
from bench.report.table import Cell, Column, T, used


@dataclass(frozen=True)
class Line:
    """What the page hides a line by: the subject that it is of, which the page shows as `looks` says, and the batch
    size.
    """

    subject: str | None = None
    batch_size: int | None = None


def no_line(item: object) -> Line:
    """Of a line that is never hidden."""
    return Line()


def table(
    id_: str,
    caption: str,
    columns: Sequence[Column[T]],
    items: Iterable[T],
    line: Callable[[T], Line] = no_line,
    looks: Mapping[str, Look] | None = None,
) -> Html:
    """The items' lines below a caption."""
    lines = list(items)
    shown = used(columns, lines)
    titles = [element("th", column.name, scope="col", class_=None if column.words else "n") for column in shown]
    styles = looks or {}

    def row(item: T) -> Html:
        about = line(item)
        look = None if about.subject is None else styles.get(about.subject)
        cells = _cells(shown, item, look)
        return element("tr", cells, data_s=None if look is None else look.index, data_b=about.batch_size)

    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", titles)),
        element("tbody", map(row, lines)),
        id=id_,
    )
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cells(columns: Sequence[Column[T]], item: T, look: Look | None) -> Iterator[Html]:
    for place, column in enumerate(columns):
        content = _content(column.cell(item), look)
        if place == 0:
            yield element("th", content, scope="row")
        else:
            yield element("td", content, class_=None if column.words else "n")


def _content(cell: Cell, look: Look | None) -> Child:
    if cell.look == "subject":
        return element("span", () if look is None else swatch(look), element("code", cell.text), class_="subject")
    if cell.link is not None:
        return element("a", cell.text, href=cell.link)
    if cell.look == "code":
        return element("code", cell.text)
    return cell.text if cell.look == "plain" else element("span", cell.text, class_=cell.look)

"""HTML and SVG as values, so that no text of a result can become markup.

Owns escaping, and nothing else: `element` escapes every child that is not `Html` itself. Knows no page.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "circle", "img", "input", "line", "link", "meta", "path", "polyline", "rect", "use"})
"""Elements without content, of those that the page uses. In SVG they must be closed, in HTML they may be."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Iterable["Child"]
"""Text, `Html`, or several of them."""


def element(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. An underscore in an attribute's name stands for a hyphen, one at its end for nothing; an attribute
    that is None or False is left out, and of one that is True the name alone stands there.
    """
    written = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    return Html(f"<{name}{written}/>" if name in VOID else f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """All of it, one after the other."""
    if isinstance(children, str):
        return children if isinstance(children, Html) else Html(escape(children))
    return Html("".join(map(join, children)))


def prose(text: str) -> Html:
    """A sentence with names between backquotes, as `bench.report.sentences` makes them."""
    parts = text.split("`")
    return join(element("code", part) if place % 2 else part for place, part in enumerate(parts))


def _attribute(key: str, value: str | int | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    written = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
    return f' {name}="{escape(written)}"'

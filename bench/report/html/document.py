"""The page as one file: the verdict, a chooser where there are several results, and the results.

Owns what stands around the results, and that the file asks the network for nothing: style, script and pictures are in
it, and its content security policy forbids everything else, any other script included.

Charts are SVG that Python draws, not Vega's. A page of nine charts of nine points by altair 6.3, with what vl-convert
1.9 inlines so that it opens offline, is 0.91 MB, of which the charts are a few kB; it takes 8 s to write, its first
chart is in the document 0.90 s after it was opened, drawn by a script, and it is loaded after 1.06 s. This page's style
and script are 10 kB, its first chart is there after 0.09 s without any script, all of it after 0.25 s; its marks are
elements that a filter hides, and a table beside each chart says the same. (Medians of five, Chromium 150, two cores at
2.5 GHz.)

The first result is plain HTML. The others are compressed, and unpacked when one is chosen: 200 results of nine rows
would be 10 MB as they are, and are 0.83 MB so (`tests/benchmarks/report_page.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain

from bench.report import sentences
from bench.report.columns import OVERVIEW, Listed
from bench.report.html.markup import Html, element, prose
from bench.report.html.plot import shapes
from bench.report.html.sections import panel, status
from bench.report.html.table import table
from bench.report.png import COLOURS
from bench.results.load import Source
from bench.results.schema import Result

# Black on a dark page would be invisible.
DARK = {"#000000": "#f2f2f2"}


def html_page(sources: Sequence[Source]) -> str:
    """The whole file."""
    entries = [entry for source in sources for entry in _entries(source)]
    results = [result for _, result, _ in entries]
    panels = [panel(name, result, source, f"r{place}-") for place, (name, result, source) in enumerate(entries)]
    title = _title(results)
    left_out = tuple(chain.from_iterable(source.left_out for source in sources))
    head = element(
        "header",
        element("h1", title),
        element("p", prose(sentences.fastest_words(results)), class_="lead"),
        status(results, left_out),
    )
    script = _asset("script.js")
    body = element(
        "body",
        shapes(),
        element("main", head, _several(entries) if len(entries) > 1 else (), element("article", panels[0], id="stage")),
        _packed(panels[1:]),
        element("script", Html(script)),
    )
    return "<!doctype html>\n" + element("html", _document_head(title, script), body, lang="en") + "\n"


def _entries(source: Source) -> Iterator[tuple[str, Result, Source]]:
    for name, result in zip(source.names, source.results, strict=True):
        yield name, result, source


def _title(results: Sequence[Result]) -> str:
    names = dict.fromkeys(bundle.name for result in results for bundle in result.bundles)
    machines = dict.fromkeys(map(sentences.machine_name, results))
    return f"{', '.join(names)} on {', '.join(machines)}"


def _document_head(title: str, script: str) -> Html:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(_asset("style.css") + _colours())),
    )


def _several(entries: Sequence[tuple[str, Result, Source]]) -> Html:
    """A line for each result, and the chooser."""
    listed = [
        Listed(f"#r{place}", name, result, bool(sentences.problems([result])))
        for place, (name, result, _) in enumerate(entries)
    ]
    options = [element("option", name, value=place) for place, (name, _, _) in enumerate(entries)]
    return element(
        "nav",
        element("h2", f"{len(entries)} results"),
        table("overview", "Every result, with the fastest of it that is right", OVERVIEW, listed),
        element("label", "Shown below ", element("select", options, id="chooser")),
        element("p", "Only the first result can be shown without scripts.", id="unscripted", class_="note"),
        aria_label="Results",
    )


def _packed(panels: Sequence[Sequence[Html]]) -> Html:
    """The results that are not shown at first, for the script to unpack: the first section of each, then the second of
    each, and so on. Sections of a kind differ in their figures alone, and near each other they compress to half.
    """
    sections = [[panel[place] for panel in panels] for place in range(len(panels[0]))] if panels else []
    text = json.dumps(sections, ensure_ascii=False, separators=(",", ":"))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return element("script", Html(packed), type_="text/plain", id="packed")


def _asset(name: str) -> str:
    return resources.files("bench.report.html").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """The palette as classes; marks take `--c` from the group that they are in."""
    light = "".join(f".c{place}{{--c:{colour}}}" for place, colour in enumerate(COLOURS))
    dark = "".join(f".c{place}{{--c:{DARK[colour]}}}" for place, colour in enumerate(COLOURS) if colour in DARK)
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"

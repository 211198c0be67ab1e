"""Results as a short page in Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from bench.report import sentences
from bench.report.suite import bullets, one_line, parity_table, speed, table
from bench.results.load import Source
from bench.results.schema import Result


def markdown_page(sources: Sequence[Source]) -> str:
    """Verdict, speed, parity and environment of every result."""
    results = [result for source in sources for result in source.results]
    left_out = tuple(chain.from_iterable(source.left_out for source in sources))
    parts = [f"**{one_line(sentences.fastest_words(results))}** {one_line(sentences.verdict(results, left_out))}"]
    for source in sources:
        for name, result in zip(source.names, source.results, strict=True):
            parts += _result(name, result)
        if source.left_out:
            parts.append(f"Not measured in {one_line(str(source.path))}:")
            parts.append(bullets(sentences.not_measured((), source.left_out)))
    return "\n\n".join(parts) + "\n"


def _result(name: str, result: Result) -> Iterator[str]:
    bundles = ", ".join(bundle.name for bundle in result.bundles)
    yield f"## {one_line(bundles)}: {one_line(name)}"
    if result.command is not None:
        yield f"    {' '.join(result.command.split())}"
    yield bullets(sentences.best(result))
    if result.rows:
        yield speed(result)
    yield "### Parity with the float64 oracle"
    yield parity_table(result)
    yield "### Environment"
    yield table(("what", ""), sentences.machine([result]))
    if absent := list(sentences.not_measured([result], ())):
        yield bullets(absent)

"""Pages in Markdown: a suite's summary, and results in short for a pull request.

Owns the order of their tables and sentences. Computes nothing: every figure is already in the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from bench.report import columns, sentences, warnings
from bench.report.columns import Judged
from bench.report.markdown import bullets, one_line, table
from bench.report.wording import rounds_words
from bench.results.load import Source
from bench.results.schema import Result
from bench.results.studies import Suite, SuiteRun, suite_run_of

FIGURE_KINDS = ("throughput", "latency")


def page(suite: Suite) -> str:
    """The whole page."""
    first = suite.runs[0]
    names = ", ".join(bundle.name for bundle in first.bundles)
    best = bullets(f"{suite_run_of(result).words}, {line}" for result in suite.runs for line in sentences.best(result))
    parts = [f"# {one_line(names)} on {sentences.machine_name(first)}, {suite.started_at:%Y-%m-%d}"]
    parts += [f"**{sentences.verdict(suite.runs, suite.left_out)}**", best, table(columns.FACTS, _facts(suite))]
    for result in suite.runs:
        parts += _run(result, suite.raw_bytes_per_image)
    parts += ["## The machine, as `bench doctor` sees it", table(columns.FINDINGS, suite.findings), "## Left out"]
    parts += [bullets(sentences.not_measured(suite.runs, suite.left_out)) or "Nothing."]
    return "\n\n".join(parts) + "\n"


def _facts(suite: Suite) -> Iterator[tuple[str, str]]:
    yield from sentences.machine(suite.runs)
    seconds = (suite.finished_at - suite.started_at).total_seconds()
    yield "when", f"{suite.started_at:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s of at most about {suite.time_limit_s:g}"


def _run(result: Result, raw_bytes_per_image: int) -> Iterator[str]:
    """A run: parity, speed, what folding is worth, where the time goes, what the machine did."""
    settings, leg = result.settings, suite_run_of(result)
    yield f"## {leg.words[0].upper()}{leg.words[1:]}"
    yield (
        f"Threads: {settings.threads}; {rounds_words(result)}, interleaved, each with blocks of "
        f"{settings.block_s * 1000:g} ms. "
        + " ".join(f"![{kind} by batch size]({figure_name(kind, leg)})" for kind in FIGURE_KINDS)
    )
    yield from _warnings(result)
    yield "### Parity with the float64 oracle"
    yield parity_table(result)
    yield "### Speed"
    yield speed(result)
    peaks = [] if result.survey is None else list(sentences.peaks(result.survey, result.roofline, raw_bytes_per_image))
    yield bullets(peaks or ["the machine's peaks could not be measured, so no shares of them are known"])
    if controlled := columns.compared_files(result, "control"):
        yield "### Folded against unfolded: throughput, paired by round, with its 95 % interval"
        yield table(columns.COMPARED, controlled)
    yield "### Placement and memory"
    yield table(columns.PLACEMENT, [Judged(result, subject) for subject in result.subjects])
    yield bullets(sentences.readings(result.readings))


def figure_name(kind: str, run: SuiteRun) -> str:
    """The file of a run's figure."""
    return f"{kind}-{run.name}.png"


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
    yield from _warnings(result)
    if result.rows:
        yield speed(result)
    yield "### Parity with the float64 oracle"
    yield parity_table(result)
    yield "### Environment"
    yield table(columns.FACTS, sentences.machine([result]))
    if absent := list(sentences.not_measured([result], ())):
        yield bullets(absent)


def _warnings(result: Result) -> Iterator[str]:
    """What spoils the figures, if anything does."""
    if seen := list(warnings.of_page(result)):
        yield bullets(f"warning: {warned}" for warned in seen)


def parity_table(result: Result) -> str:
    """The verdict on every backend, with what it rests on."""
    return table((*columns.PARITY, columns.WHY_NOT), columns.judged(result))


def speed(result: Result) -> str:
    """The table of the rows, each with its place under the roofline, and what its words mean."""
    legend = (
        "images/s: median of the rounds ± half of its 95 % interval. On the device: the model on prepared input; end "
        "to end: from raw input to logits in host memory. × torch: throughput over eager torch's of the unfolded "
        "program, paired by round, with its 95 % interval."
    )
    return f"{table(columns.SPEED, columns.measured(result))}\n\n{legend}"

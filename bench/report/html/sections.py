"""A result as sections of the page: what it says first, then what it says it from.

Owns their order and their words. Every chart stands beside the table of its figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.report import sentences, warnings
from bench.report.html import figures, tables
from bench.report.html.figures import looks
from bench.report.html.markup import Child, Html, element, join, prose
from bench.report.html.pictures import Missing, data_uri, inputs_of
from bench.report.html.plot import swatch
from bench.report.wording import rounds_words
from bench.results.load import Source
from bench.results.parity import ParityVerdict
from bench.results.queries import finished_rows
from bench.results.schema import BundleFacts, Result, SubjectResult
from bench.results.studies import LeftOut
from export.bundle.verdict import Flip

# Each is a picture of a few hundred bytes. Of what failed by more, a few dozen show enough.
PICTURES_SHOWN = 24
NONE = Html("")
NO_COMMAND = "The command was not recorded: an earlier bench wrote this result."


def panel(name: str, result: Result, source: Source, prefix: str) -> list[Html]:
    """All of a result of a file, section by section, empty ones included. `prefix` begins every id."""
    return [
        _head(name, result),
        _filters(result),
        _throughput(result, prefix),
        _latency(result, prefix),
        _trade_off(result, prefix),
        _parity(result, prefix),
        _folding(result, prefix),
        _roofline(result, prefix),
        _environment(result, source, prefix),
    ]


def command_block(result: Result) -> Html:
    """The command that made the result, to be copied."""
    if result.command is None:
        return element("p", NO_COMMAND, class_="note")
    return element("pre", element("code", result.command), class_="command", tabindex=0)


def _head(name: str, result: Result) -> Html:
    bundles = ", ".join(bundle.name for bundle in result.bundles)
    settings = result.settings
    conditions = (
        f"{sentences.machine_name(result)} · profile {settings.profile} · {settings.threads} threads · "
        f"{rounds_words(result)}, interleaved, in blocks of {settings.block_s * 1000:g} ms · "
        f"{result.started_at:%Y-%m-%d %H:%M} UTC"
    )
    return element(
        "header",
        element("h2", bundles, id="result"),
        element("p", conditions, class_="note"),
        element("p", name, class_="note path"),
        status([result], ()),
        _bullets(sentences.best(result)),
        _warnings(result),
        command_block(result),
    )


def status(results: Sequence[Result], left_out: Sequence[LeftOut]) -> Html:
    """Whether all is well."""
    bad = sentences.problems(results) or any(entry.failed for entry in left_out)
    sign = element("span", "✗" if bad else "✓", class_="sign", aria_hidden="true")
    words = element("span", prose(sentences.verdict(results, left_out)))
    return element("p", sign, words, class_=f"status {'bad' if bad else 'good'}")


def _warnings(result: Result) -> Html:
    """What spoils the figures."""
    seen = (str(warned) for warned in warnings.of_page(result))
    return join(element("p", f"{words[0].upper()}{words[1:]}.", class_="warning") for words in seen)


def _filters(result: Result) -> Html:
    """What is shown: the batch sizes and the backends, each to be switched off. The backends are the legend too."""
    sizes = sorted({row.batch_size for row in finished_rows(result)})
    if not sizes:
        return NONE
    batches = [
        element("label", element("input", type="checkbox", checked=True, data_batch=size), f"{size:,}")
        for size in sizes
    ]
    backends = []
    for subject in result.subjects:
        look, parity = looks(result)[subject.label], subject.parity
        top1 = "" if parity is None or parity.top1_percent is None else f"{parity.top1_percent:.2f} %"
        box = element("input", type="checkbox", checked=True, data_subject=look.index)
        caption = element("code", subject.label), element("small", top1)
        backends.append(element("label", box, swatch(look), *caption))
    return element(
        "form",
        element("fieldset", element("legend", "Batch sizes"), batches),
        element("fieldset", element("legend", "Backends, with their top-1"), backends),
        class_="filters",
        aria_label="What the charts and tables show",
    )


def _throughput(result: Result, prefix: str) -> Html:
    if not finished_rows(result):
        return NONE
    id_ = f"{prefix}throughput"
    charts = element("div", figures.throughput(result, id_), class_="charts")
    return _section(
        "Throughput",
        "Bars, where they reach beyond the mark, are the 95 % intervals of the medians.",
        charts,
        tables.throughputs(result, id_),
    )


def _latency(result: Result, prefix: str) -> Html:
    if not finished_rows(result):
        return NONE
    id_ = f"{prefix}latency"
    charts = element("div", figures.latency(result, id_), class_="charts")
    words = "Bars reach from the percentile up to what it does not exceed with 95 % confidence."
    return _section("Latency", words, charts, tables.latencies(result, id_))


def _trade_off(result: Result, prefix: str) -> Html:
    if not finished_rows(result):
        return NONE
    id_ = f"{prefix}pareto"
    chart = figures.pareto(result, id_)
    if chart is None:
        return _section("Throughput against latency", "Nothing has enough calls for a 99th percentile.")
    words = (
        "Each point is a backend at the batch size beside it, from raw input to logits. The grey line joins those that "
        "none beats both ways. In a ring: top-1 is lower than the oracle's; struck out: emulated; crossed out: parity "
        "failed."
    )
    beside = element("div", chart, tables.trade_off(result, id_), class_="charts beside")
    return _section("Throughput against latency", words, beside)


def _parity(result: Result, prefix: str) -> Html:
    judged = [(subject, subject.parity) for subject in result.subjects if subject.parity is not None]
    if not judged:
        return _section("Parity", "Nothing was judged.")
    return _section(
        "Parity",
        "Every logit is compared with the float64 logits of the unfolded model, the oracle.",
        tables.parity(result, f"{prefix}parity"),
        _bullets(line for subject, verdict in judged for line in _failures(subject, verdict)),
        _errors(result, f"{prefix}errors"),
        [_flips(result, subject, verdict) for subject, verdict in judged if verdict.flips],
    )


def _failures(subject: SubjectResult, parity: ParityVerdict) -> Iterator[str]:
    yield from (f"`{subject.label}` fails: {failure}" for failure in parity.failures)
    yield from (f"`{subject.label}` was held to a laxer limit: {limit}" for limit in parity.laxer)
    if subject.bisection is not None:
        yield f"`{subject.label}`: {subject.bisection.in_words()}"


def _errors(result: Result, id_: str) -> Html:
    charts = list(figures.errors(result, id_))
    if not charts:
        return element("p", "An earlier bench wrote this result: it has no histogram of the errors.", class_="note")
    figures_ = element("details", element("summary", "The histograms as a table"), tables.errors(result, id_))
    return join((element("h4", "Errors, by image"), element("div", charts, class_="charts small"), figures_))


def _flips(result: Result, subject: SubjectResult, parity: ParityVerdict) -> Html:
    """The changed predictions, the clearest first: those with the widest margin count most."""
    flips = sorted(parity.flips or (), key=lambda flip: -flip.margin)
    shown = flips[:PICTURES_SHOWN]
    bundle = next((b for b in result.bundles if b.letter == subject.letter), result.bundles[0])
    note, items = _pictured(shown, bundle)
    more = f" Of these, the {len(shown)} with the widest margin are shown." if len(flips) > len(shown) else ""
    title = element("h4", element("code", subject.label), f": {len(flips)} of {parity.images:,} predictions changed")
    words = element(
        "p", prose(f"Margin: the oracle's logit of its prediction less its next.{more}{note}"), class_="note"
    )
    return element(
        "div", title, words, element("ul", items, class_="digits"), data_s=looks(result)[subject.label].index
    )


def _pictured(flips: Sequence[Flip], bundle: BundleFacts) -> tuple[str, list[Html]]:
    """A list item for each flip, and why it has no picture, if it has none."""
    inputs = inputs_of(bundle)
    if isinstance(inputs, Missing):
        return f" No pictures: {inputs.reason}.", [_digit(flip, None, None) for flip in flips]
    uris = [data_uri(inputs.raw[flip.image_index]) for flip in flips]
    note = " No pictures: the raw input is no image of bytes." if None in uris else ""
    return note, [_digit(flip, uri, inputs.class_names) for flip, uri in zip(flips, uris, strict=True)]


def _digit(flip: Flip, uri: str | None, class_names: tuple[str, ...] | None) -> Html:
    def called(class_: int) -> str:
        return str(class_) if class_names is None or class_ >= len(class_names) else class_names[class_]

    alt = f"image {flip.image_index}" + ("" if flip.label is None else f", label {called(flip.label)}")
    picture = () if uri is None else element("img", src=uri, alt=alt, width=56, height=56)
    label = () if flip.label is None else (element("dt", "label"), element("dd", called(flip.label)))
    return element(
        "li",
        picture,
        element(
            "dl",
            element("dt", "image"),
            element("dd", f"{flip.image_index}"),
            label,
            element("dt", "oracle"),
            element("dd", called(flip.oracle_prediction)),
            element("dt", "here"),
            element("dd", called(flip.prediction)),
            element("dt", "margin"),
            element("dd", f"{flip.margin:.2g}"),
        ),
    )


def _folding(result: Result, prefix: str) -> Html:
    parts: list[Child] = []
    for place, bundle in enumerate(result.bundles):
        letter = "" if bundle.letter is None else f"{bundle.letter}: "
        if bundle.fold is None:
            parts.append(
                element("p", f"{letter}{bundle.name}: the result does not say what was folded.", class_="note")
            )
            continue
        folded, kept = len(bundle.fold.folded), len(bundle.fold.kept)
        parts.append(element("p", f"{letter}{bundle.name}: {folded} of {folded + kept} BatchNorms are folded away."))
        if folded + kept:
            parts.append(tables.norms(bundle, f"{prefix}norms{place}"))
    captions = {
        "control": "Folded over unfolded: throughput, paired by round, with its 95 % interval",
        "base": "Each bundle over the first: throughput, paired by round, with its 95 % interval",
    }
    if any(ratio.against == "control" for ratio in result.ratios):
        parts.append(tables.compared(result, "control", captions["control"], f"{prefix}control"))
    if any(ratio.against == "base" for ratio in result.ratios):
        parts.append(tables.compared(result, "base", captions["base"], f"{prefix}base"))
    return _section("Before and after folding", "", parts)


def _roofline(result: Result, prefix: str) -> Html:
    id_ = f"{prefix}roofline"
    charts = list(figures.roofline(result, id_))
    if result.survey is None or not charts:
        return _section("Roofline", "The machine's peaks were not measured, so no shares of them are known.")
    words = "How near each row comes to the best that this machine was seen to do in its precision."
    peaks = _bullets(sentences.peaks(result.survey, result.roofline, None))
    return _section("Roofline", words, element("div", charts, class_="charts"), tables.roofline(result, id_), peaks)


def _environment(result: Result, source: Source, prefix: str) -> Html:
    settings = result.settings
    pairs = list(sentences.machine([result]))
    pairs.append(("batch sizes", ", ".join(f"{size:,}" for size in settings.batch_sizes)))
    looked = (result.environment.cpu_busy_percent, *result.cpu_busy_percents)
    busy = f"{', '.join(f'{percent:.0f}' for percent in looked)} % of the CPUs, before and after each process"
    pairs.append(("other processes", busy))
    pairs += [(f"bundle at{'' if b.letter is None else f' {b.letter}'}", b.path) for b in result.bundles]
    absent = list(sentences.not_measured([result], source.left_out))
    findings = [] if source.suite is None else source.suite.findings
    return _section(
        "Environment",
        "",
        element("dl", ((element("dt", name), element("dd", value)) for name, value in pairs), class_="facts"),
        _bullets(sentences.readings(result.readings)),
        tables.placement(result, f"{prefix}placement"),
        (element("h4", "As bench doctor saw it"), tables.findings(findings, f"{prefix}doctor")) if findings else (),
        (element("h4", "Not measured"), _bullets(absent)) if absent else (),
    )


def _bullets(lines: Iterable[str]) -> Html:
    items = [element("li", prose(line[0].upper() + line[1:])) for line in lines]
    return element("ul", items) if items else NONE


def _section(title: str, words: str, *content: Child) -> Html:
    said = element("p", words, class_="note") if words else ()
    return element("section", element("h3", title), said, *content)

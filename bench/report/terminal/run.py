"""A run's result on a terminal: its tables, and the sentences around them."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from bench.report import columns, sentences, warnings
from bench.report.terminal.around import print_absent, print_machine, print_warnings
from bench.report.terminal.parity import print_failed
from bench.report.terminal.table import print_table
from bench.report.wording import rounds_words
from bench.results.roofline import Survey
from bench.results.schema import Against, Result
from bench.results.statistics import DROWNED_PERCENT


def print_run(result: Result, out: Console) -> None:
    """The table of a run, its ratios against the control, and what failed or was skipped."""
    settings = result.settings
    for bundle in result.bundles:
        letter = "" if bundle.letter is None else f"{bundle.letter}: "
        out.print(f"{letter}[bold]{escape(bundle.name)}[/] (bundle {bundle.digest[:12]}) at {escape(bundle.path)}")
    if result.interrupted:
        out.print("[yellow]interrupted[/]: what follows is of the rounds that were done")
    out.print(
        f"profile {settings.profile}, {settings.threads} threads, {rounds_words(result)}, interleaved, in blocks of "
        f"{settings.block_s * 1000:g} ms"
    )
    print_machine(result.environment, max(result.cpu_busy_percents, default=0.0), out)
    if result.rows:
        print_table(columns.RUN, columns.measured(result), out)
        out.print(
            "images/s: median ± half of its 95 % interval, which is that of the processes where there were three or "
            "more, else of the rounds. on the device: the model on prepared input. end to end, and the latency: from "
            "raw input to logits in host memory. p99 at most: what it does not exceed with 95 % confidence. × torch: "
            "throughput over torch's, paired by round, with its 95 % interval. –: too few samples, nothing to compare, "
            f"or known to no better than ±{DROWNED_PERCENT:g} %.\n"
        )
        _print_sensors(result, out)
    if result.survey is not None:
        _print_roofline(result, result.survey, out)
    compared: dict[Against, str] = {"control": "folded against unfolded", "base": "each bundle against the first"}
    for against, title in compared.items():
        if ratios := columns.compared_files(result, against):
            out.print(f"[bold]{title}[/]: throughput, paired by round, with its 95 % interval")
            print_table(columns.COMPARED, ratios, out)
    print_failed(result.subjects, out)
    print_absent(result.subjects, result.skipped, out)
    for line in result.settings.left_out:
        out.print(f"[dim]left out for lack of time: {escape(line)}[/]")


def _print_roofline(result: Result, survey: Survey, out: Console) -> None:
    """The model's work, the machine's peaks, and the share that each row reaches."""
    first, *others = sentences.peaks(survey, result.roofline, None)
    out.print(f"[bold]roofline[/]: {escape(first)}")
    for line in others:
        out.print(escape(line))
    placed = [item for item in columns.measured(result) if columns.point_of(item) is not None]
    print_table(columns.ROOFLINE, placed, out)


def _print_sensors(result: Result, out: Console) -> None:
    """Energy where the machine counts it, and what to be warned of in the rows."""
    for row in result.rows:
        joules = ", ".join(f"{joule * 1000:.3g} mJ ({counter})" for counter, joule in row.energy_per_image_j.items())
        if joules:
            out.print(f"energy per image, {escape(row.subject)} at batch {row.batch_size}: {joules}")
    seen = (*warnings.of_gpus(result), *warnings.of_emulation(result.subjects), *warnings.of_rows(result))
    print_warnings(seen, out)

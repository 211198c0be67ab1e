"""A result as a person reads it.

Owns the tables and the sentences around them. Computes nothing: every figure is already in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.report.terminal.around import print_absent, print_machine
from bench.report.terminal.parity import print_failed, verdict_words
from bench.report.wording import flips_words, milliseconds, number, ratio_words, rounds_words, spread_words
from bench.results.roofline import Point, Survey
from bench.results.schema import Against, Ratio, Result, Row, SubjectResult, find_ratio

# The clock's own share of a call, in percent, from which on a row says so.
TIMER_PERCENT = 0.1


def print_run(result: Result, out: Console) -> None:
    """The table of a run, its ratios against the control, and what failed or was skipped."""
    settings = result.settings
    for bundle in result.bundles:
        letter = "" if bundle.letter is None else f"{bundle.letter}: "
        out.print(f"{letter}[bold]{escape(bundle.name)}[/] (bundle {bundle.digest[:12]}) at {escape(bundle.path)}")
    out.print(
        f"profile {settings.profile}, {settings.threads} threads, {rounds_words(result)} interleaved rounds of "
        f"{settings.block_s * 1000:g} ms"
    )
    print_machine(result.environment, result.cpu_busy_percent_at_end, out)
    if result.rows:
        out.print(_rows_table(result))
        out.print(
            "images/s: median of the rounds ± half of its 95 % interval; stable: at most 1 %. device: the model on\n"
            "prepared input. end to end, and the latency: from raw input to logits in host memory. p99 at most: what\n"
            "it does not exceed with 95 % confidence. × torch: device throughput over torch's, paired by round, with\n"
            "its 95 % bootstrap interval. –: too few samples, or nothing to compare.\n"
        )
        _print_sensors(result, out)
    if result.survey is not None:
        failed = {subject.label for subject in result.subjects if subject.failure is not None}
        _print_roofline(result.survey, [point for point in result.roofline if point.subject not in failed], out)
    compared: dict[Against, str] = {"control": "folded against unfolded", "base": "each bundle against the first"}
    for against, title in compared.items():
        if found := [ratio for ratio in result.ratios if ratio.against == against]:
            out.print(f"[bold]{title}[/]: throughput, paired by round, with its 95 % bootstrap interval")
            out.print(_ratios_table(found))
    print_failed(result.subjects, out)
    print_absent(result.subjects, result.skipped, out)


def _rows_table(result: Result) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("backend", no_wrap=True)
    for name in (
        "batch",
        "images/s\ndevice",
        "images/s\nend to end",
        "p50\nms",
        "p90\nms",
        "p99\nms",
        "p99\nat most",
        "verdict",
        "parity",
        "top-1\n%",
        "flips",
        "max\nerror",
        "× torch\ndevice",
    ):
        table.add_column(name, justify="right", overflow="fold")
    subjects = {subject.label: subject for subject in result.subjects}
    for row in result.rows:
        subject = subjects[row.subject]
        if subject.failure is None:
            table.add_row(*_cells(row, subject, result.ratios))
    return table


def _cells(row: Row, subject: SubjectResult, ratios: Iterable[Ratio]) -> Iterator[str]:
    yield escape(row.subject)
    yield str(row.batch_size)
    yield spread_words(row.device_resident_throughput_images_per_s)
    yield spread_words(row.end_to_end_throughput_images_per_s)
    latency = row.end_to_end_latency_ms
    for value in (latency.p50, latency.p90, latency.p99, latency.p99_upper):
        yield milliseconds(value)
    yield row.verdict
    yield "–" if subject.parity is None else verdict_words(subject.parity)
    yield "–" if subject.parity is None else number(subject.parity.top1_percent, ".2f")
    yield "–" if subject.parity is None else flips_words(subject.parity)
    yield "–" if subject.parity is None else number(subject.parity.max_abs_error, ".1e")
    yield ratio_words(find_ratio(ratios, "torch", row.subject, row.batch_size, "device_resident"), ".3g")


def _print_roofline(survey: Survey, points: Iterable[Point], out: Console) -> None:
    """The model's work, the machine's peaks, and the share that each row reaches."""
    peaks = "; ".join(
        f"{peak.device} {peak.flops_per_s * 1e-9:,.0f} GFLOP/s, {peak.copy_bytes_per_s * 1e-9:,.1f} GB/s"
        for peak in survey.peaks
    )
    work = survey.work
    out.print(
        f"[bold]roofline[/]: {work.flops_per_image * 1e-6:,.3g} MFLOP and "
        f"{work.activation_bytes_per_image * 1e-3:,.3g} kB an image, "
        f"{work.weight_bytes * 1e-6:,.3g} MB of weights a call; measured peaks: {peaks}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("backend", overflow="fold")
    for name in ("batch", "% of arithmetic", "% of memory", "what binds"):
        table.add_column(name, justify="right", overflow="fold")
    for point in points:
        shares = f"{point.arithmetic_percent:.0f}", f"{point.memory_percent:.0f}"
        table.add_row(escape(point.subject), str(point.batch_size), *shares, point.binds)
    out.print(table)


def _print_sensors(result: Result, out: Console) -> None:
    """What throttled a GPU, energy where the machine counts it, and rows in which the clock itself is felt."""
    for gpu in (gpu for reading in result.readings for gpu in reading.gpus if gpu.throttled_by):
        out.print(f"[yellow]warning[/] {escape(gpu.name)} was slowed down by: {', '.join(gpu.throttled_by)}")
    for row in result.rows:
        joules = ", ".join(f"{joule * 1000:.3g} mJ ({counter})" for counter, joule in row.energy_per_image_j.items())
        if joules:
            out.print(f"energy per image, {escape(row.subject)} at batch {row.batch_size}: {joules}")
        if (row.timer_share_percent or 0) > TIMER_PERCENT and row.subject != "null":
            out.print(
                f"[yellow]warning[/] {escape(row.subject)} at batch {row.batch_size}: the clock itself is "
                f"{row.timer_share_percent:.2g} % of a call"
            )


def _ratios_table(ratios: list[Ratio]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("backend", overflow="fold")
    for name in ("batch", "device", "end to end", "rounds"):
        table.add_column(name, justify="right", overflow="fold")
    for against, name, batch_size in dict.fromkeys((r.against, r.numerator, r.batch_size) for r in ratios):
        device = find_ratio(ratios, against, name, batch_size, "device_resident")
        whole = find_ratio(ratios, against, name, batch_size, "end_to_end")
        rounds = device.rounds if device else 0
        table.add_row(name, str(batch_size), ratio_words(device, ".3f"), ratio_words(whole, ".3f"), str(rounds))
    return table

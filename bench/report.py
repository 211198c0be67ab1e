"""A result as a person reads it.

Owns the tables and the sentences around them. Computes nothing: every figure is already in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.measure import Timing
from bench.parity import ParityVerdict
from bench.results import Against, Ratio, Result, Row, SubjectResult
from bench.statistics import PairedRatio, Spread
from bench.summary import slower

FLIPS_SHOWN = 20
# What a machine that does nothing else uses for itself stays well below.
BUSY_PERCENT = 10
# What the widest table needs. In a narrower window or a log its lines are long; rich would cut figures off instead.
MIN_WIDTH = 140


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr), as wide as the window, and never narrower than the table."""
    made = Console(stderr=stderr, highlight=False)
    made.width = max(made.width, MIN_WIDTH)
    return made


def print_run(result: Result, out: Console) -> None:
    """The table of a run, its ratios against the control, and what failed or was skipped."""
    settings, machine = result.settings, result.environment
    for bundle in result.bundles:
        letter = "" if bundle.letter is None else f"{bundle.letter}: "
        out.print(f"{letter}[bold]{escape(bundle.name)}[/] (bundle {bundle.digest[:12]}) at {escape(bundle.path)}")
    out.print(
        f"profile {settings.profile}, {settings.threads} threads, {_rounds(result)} interleaved rounds of "
        f"{settings.block_s * 1000:g} ms"
    )
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    out.print(f"{machine.cpu}, {machine.usable_cpus} of {machine.logical_cpus} CPUs{gpus}, {machine.platform}\n")
    busy = max(machine.cpu_busy_percent, result.cpu_busy_percent_at_end)
    if busy > BUSY_PERCENT:
        out.print(
            f"[yellow]warning[/] other processes used {busy:.0f} % of the CPUs while no backend ran: expect these "
            "figures to be low and to scatter. Run again on a quiet machine.\n"
        )
    if result.rows:
        out.print(_rows_table(result))
        out.print(
            "images/s: median of the rounds ± half their interquartile range. device: the model on prepared input.\n"
            "end to end, and the latency: from raw input to logits in host memory. × torch: device throughput over\n"
            "torch's, paired by round, with its 95 % bootstrap interval. –: too few samples, or nothing to compare.\n"
        )
    compared: dict[Against, str] = {"control": "folded against unfolded", "base": "each bundle against the first"}
    for against, title in compared.items():
        if found := [ratio for ratio in result.ratios if ratio.against == against]:
            out.print(f"[bold]{title}[/]: throughput, paired by round, with its 95 % bootstrap interval")
            out.print(_ratios_table(found))
    _print_verdicts(result.subjects, out, only_failed=True)
    _print_absent(result, out)


def print_comparison(result: Result, threshold_percent: float, out: Console) -> None:
    """The verdict on every bundle against the first."""
    found = slower(result.ratios, threshold_percent)
    for ratio in found:
        timing = ratio.timing.replace("_", " ")
        out.print(
            f"[red]slower[/] {escape(ratio.numerator)} at batch {ratio.batch_size}, {timing}: "
            f"{_ratio(ratio.throughput_ratio, '.3f')} of {escape(ratio.denominator)}"
        )
    if not found:
        out.print(f"none is slower than the first by more than {threshold_percent:g} %")


def print_parity(result: Result, out: Console) -> None:
    """The verdict of every backend, with every flip up to a limit."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in (
        "backend",
        "verdict",
        "images",
        "top-1 %",
        "oracle's",
        "flips",
        "max error",
        "RMS error",
        "× float32's own",
    ):
        table.add_column(name, justify="left" if name in ("backend", "verdict") else "right", overflow="fold")
    for subject in result.subjects:
        if (parity := subject.parity) is not None:
            table.add_row(
                escape(subject.label),
                _verdict(parity),
                f"{parity.images:,}",
                _number(parity.top1_percent, ".2f"),
                _number(parity.oracle_top1_percent, ".2f"),
                _flips(parity),
                _number(parity.max_abs_error, ".2g"),
                _number(parity.rms_error, ".2g"),
                _number(parity.rms_error_in_float32_errors, ".2f"),
            )
    out.print(table)
    _print_verdicts(result.subjects, out, only_failed=False)
    _print_absent(result, out)


def print_backends(reasons: dict[str, str | None], out: Console) -> None:
    """Every backend: available, or why not and what would fix it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("backend", overflow="fold")
    table.add_column("available", overflow="fold")
    table.add_column("why not, and what would fix it")
    for name, reason in reasons.items():
        table.add_row(name, "[green]yes[/]" if reason is None else "[red]no[/]", escape(reason or ""))
    out.print(table)


def _rows_table(result: Result) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("backend", overflow="fold")
    for name in (
        "batch",
        "images/s\ndevice",
        "images/s\nend to end",
        "p50\nms",
        "p90\nms",
        "p99\nms",
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
    yield _spread(row.device_resident_throughput_images_per_s)
    yield _spread(row.end_to_end_throughput_images_per_s)
    for value in (row.end_to_end_latency_ms.p50, row.end_to_end_latency_ms.p90, row.end_to_end_latency_ms.p99):
        yield _number(value, ".3g" if (value or 0) < 100 else ".0f")
    yield "–" if subject.parity is None else _verdict(subject.parity)
    yield "–" if subject.parity is None else _number(subject.parity.top1_percent, ".2f")
    yield "–" if subject.parity is None else _flips(subject.parity)
    yield "–" if subject.parity is None else _number(subject.parity.max_abs_error, ".1e")
    yield _ratio(_find(ratios, "torch", row.subject, row.batch_size, "device_resident"), ".3g")


def _find(ratios: Iterable[Ratio], against: str, subject: str, batch_size: int, timing: Timing) -> PairedRatio | None:
    key = (against, subject, batch_size, timing)
    found = (r.throughput_ratio for r in ratios if (r.against, r.numerator, r.batch_size, r.timing) == key)
    return next(found, None)


def _ratios_table(ratios: list[Ratio]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("backend", overflow="fold")
    for name in ("batch", "device", "end to end", "rounds"):
        table.add_column(name, justify="right", overflow="fold")
    for against, name, batch_size in dict.fromkeys((r.against, r.numerator, r.batch_size) for r in ratios):
        device = _find(ratios, against, name, batch_size, "device_resident")
        whole = _find(ratios, against, name, batch_size, "end_to_end")
        rounds = device.rounds if device else 0
        table.add_row(name, str(batch_size), _ratio(device, ".3f"), _ratio(whole, ".3f"), str(rounds))
    return table


def _print_verdicts(subjects: Iterable[SubjectResult], out: Console, *, only_failed: bool) -> None:
    for subject in subjects:
        parity = subject.parity
        if parity is None or (only_failed and parity.passed):
            continue
        if not parity.passed:
            reasons = "; ".join(parity.failures)
            out.print(f"[red]parity FAILED[/] {escape(subject.label)} ({parity.profile}): {escape(reasons)}.")
        for flip in (parity.flips or ())[:FLIPS_SHOWN]:
            label = "no label" if flip.label is None else f"label {flip.label}"
            out.print(
                f"  {escape(subject.label)}: image {flip.image_index}, {label}: "
                f"the oracle says {flip.oracle_prediction} by a margin of {flip.margin:.3g}, here {flip.prediction}"
            )
        if (more := len(parity.flips or ()) - FLIPS_SHOWN) > 0:
            out.print(f"  {escape(subject.label)}: {more} more flips")


def _print_absent(result: Result, out: Console) -> None:
    for subject in result.subjects:
        if subject.failure is not None:
            out.print(f"[red]{subject.failure.kind}[/] {escape(subject.label)}: {escape(subject.failure.message)}")
            if subject.failure.trace:
                out.print(escape(subject.failure.trace), style="dim")
    by_reason: dict[str, list[str]] = {}
    for entry in result.skipped:
        by_reason.setdefault(entry.reason, []).append(entry.backend)
    for reason, backends in by_reason.items():
        out.print(f"[dim]skipped {escape(', '.join(backends))}: {escape(reason)}[/]")


def _spread(spread: Spread) -> str:
    half = 50 * (spread.upper_quartile - spread.lower_quartile) / spread.median
    digits = ",.0f" if spread.median >= 100 else ",.1f"
    return f"{spread.median:{digits}} ±{half:.1f}%"


def _ratio(ratio: PairedRatio | None, digits: str) -> str:
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:{digits}}"
    return f"{ratio.median:{digits}} ({ratio.low:{digits}}…{ratio.high:{digits}})"


def _rounds(result: Result) -> str:
    done = len({sample.round for sample in result.samples})
    return str(done) if done == result.settings.rounds else f"{done} of {result.settings.rounds} (time limit)"


def _verdict(parity: ParityVerdict) -> str:
    return "[green]pass[/]" if parity.passed else "[red]FAIL[/]"


def _flips(parity: ParityVerdict) -> str:
    return "–" if parity.flips is None else str(len(parity.flips))


def _number(value: float | None, digits: str) -> str:
    return "–" if value is None else f"{value:{digits}}"

"""A result as a person reads it.

Owns the tables and the sentences around them. Computes nothing: every figure is already in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.machine.environment import BUSY_PERCENT, Environment
from bench.report.wording import flips_words, milliseconds, number, per_s, ratio_words, rounds_words, spread_words
from bench.results.compare import Compared, Comparison, regressions
from bench.results.derive import slower
from bench.results.parity import ParityVerdict
from bench.results.roofline import Point, Survey
from bench.results.schema import Against, Ratio, Result, Row, Skipped, SubjectResult, find_ratio
from bench.worker.loadgen import OFFICIAL_MIN_DURATION_S, Scenario

if TYPE_CHECKING:
    from bench.machine.doctor import Finding
    from bench.run.scenario import ScenarioResult, ScenarioRow

FLIPS_SHOWN = 20
# What the widest table needs. In a narrower window or a log its lines are long; rich would cut figures off instead.
MIN_WIDTH = 176
# The clock's own share of a call, in percent, from which on a row says so.
TIMER_PERCENT = 0.1


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr), as wide as the window, and never narrower than the table."""
    made = Console(stderr=stderr, highlight=False)
    made.width = max(made.width, MIN_WIDTH)
    return made


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
    _print_machine(result.environment, result.cpu_busy_percent_at_end, out)
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
    _print_failed(result.subjects, out)
    _print_absent(result.subjects, result.skipped, out)


def print_comparison(result: Result, threshold_percent: float, out: Console) -> None:
    """The verdict on every bundle against the first."""
    found = slower(result.ratios, threshold_percent)
    for ratio in found:
        _print_slower(ratio.numerator, ratio, escape(ratio.denominator), out)
    if not found:
        out.print(f"none is slower than the first by more than {threshold_percent:g} %")


def print_two_runs(
    base: Result,
    head: Result,
    comparison: Comparison,
    differences: Sequence[str],
    threshold_percent: float,
    out: Console,
) -> None:
    """The head's run against the base's: the table, what can't be compared, and the verdict."""
    for name, result in (("base", base), ("head", head)):
        measured = ", ".join(f"{escape(bundle.name)} (bundle {bundle.digest[:12]})" for bundle in result.bundles)
        busy = max(result.environment.cpu_busy_percent, result.cpu_busy_percent_at_end)
        advice = " [yellow](expect the figures to scatter)[/]" if busy > BUSY_PERCENT else ""
        out.print(
            f"{name}: {measured}, {result.started_at:%Y-%m-%d %H:%M} UTC, {rounds_words(result)} rounds; other "
            f"processes used {busy:.0f} % of the CPUs{advice}"
        )
    for difference in differences:
        out.print(f"[yellow]warning[/] not the same machine: {escape(difference)}")
    out.print(_two_runs_table(comparison.found))
    out.print(
        "images/s: median of the rounds. ratio: head over base, with its 95 % bootstrap interval; –: fewer than six\n"
        "rounds. null is shown for the harness's sake and not judged. Two runs are weaker evidence than one: what\n"
        "differed between their moments is not in the interval. bench ab measures both bundles in the same rounds.\n"
    )
    for name, keys in (("base", comparison.only_in_base), ("head", comparison.only_in_head)):
        if keys:
            out.print(f"only in the {name}, not compared: {escape(', '.join(keys))}")
    for label in comparison.broken:
        out.print(f"[red]did not finish[/] {escape(label)} in the head; it did in the base")
    found = regressions(comparison, threshold_percent)
    for compared in found:
        _print_slower(compared.subject, compared, "the base", out)
    if not found:
        out.print(f"none is shown to be slower than the base by more than {threshold_percent:g} %")


def _print_slower(subject: str, found: Ratio | Compared, base: str, out: Console) -> None:
    timing = found.timing.replace("_", " ")
    out.print(
        f"[red]slower[/] {escape(subject)} at batch {found.batch_size}, {timing}: "
        f"{ratio_words(found.throughput_ratio, '.3f')} of {base}"
    )


def print_findings(findings: Sequence[Finding], out: Console) -> None:
    """What `bench doctor` saw: each finding with its fix below it, and how many there are of each severity."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        colour = {"ok": "green", "warning": "yellow", "error": "red"}[finding.severity]
        told = escape(finding.seen) + ("" if finding.fix is None else f"\n[bold]fix:[/] {escape(finding.fix)}")
        table.add_row(f"[{colour}]{finding.severity}[/]", escape(finding.check), told)
    out.print(table)
    errors, warnings, ok = (sum(f.severity == severity for f in findings) for severity in ("error", "warning", "ok"))
    out.print(f"\nerrors: {errors}, warnings: {warnings}, ok: {ok}")


def print_parity(result: Result, out: Console) -> None:
    """Every flip, then the verdict of every backend and, where it was looked for, the first node that diverges."""
    for subject in result.subjects:
        _print_flips(subject, None, out)
    table = Table(box=box.SIMPLE_HEAD)
    for name in (
        "backend",
        "verdict",
        "images",
        "top-1 %",
        "oracle's",
        "flips",
        "McNemar b, c",
        "p",
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
                number(parity.top1_percent, ".2f"),
                number(parity.oracle_top1_percent, ".2f"),
                flips_words(parity),
                "–" if parity.mcnemar is None else f"{parity.mcnemar.b}, {parity.mcnemar.c}",
                "–" if parity.mcnemar is None else number(parity.mcnemar.p_value, ".3g"),
                number(parity.max_abs_error, ".2g"),
                number(parity.rms_error, ".2g"),
                number(parity.rms_error_in_float32_errors, ".2f"),
            )
    out.print(table)
    out.print(
        "b: right by the oracle and wrong here, c: the other way round; p: two-sided exact binomial test of b against\n"
        "c. Errors are those of the logits against the float64 oracle's.\n"
    )
    for subject in result.subjects:
        _print_verdict(subject, out)
    _print_absent(result.subjects, result.skipped, out)


def print_scenario(result: ScenarioResult, out: Console) -> None:
    """What LoadGen found for every backend, and why that is no official MLPerf result."""
    settings = result.settings
    for bundle in result.bundles:
        out.print(f"[bold]{escape(bundle.name)}[/] (bundle {bundle.digest[:12]}) at {escape(bundle.path)}")
    out.print(
        f"MLPerf LoadGen {escape(result.loadgen_version or '–')}, scenario [bold]{settings.scenario}[/], runs of at "
        f"least {settings.min_duration_s:g} s, batches of {settings.batch_size}, profile {settings.profile}, "
        f"{settings.threads} threads"
    )
    out.print(
        f"[yellow]not an official MLPerf result[/]: the rules ask for runs of {OFFICIAL_MIN_DURATION_S:g} s, a model "
        "and data of the benchmark, and a review"
    )
    _print_machine(result.environment, result.cpu_busy_percent_at_end, out)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("backend", overflow="fold")
    for name in ("result", "verdict", "p50\nms", "p90\nms", "p99\nms", "queries", "images", "parity", "top-1\n%"):
        table.add_column(name, justify="right", overflow="fold")
    for row in result.rows:
        if row.reported is not None:
            run, parity = row.runs[row.reported], row.subject.parity
            latency = [run.latency_ms.p50, run.latency_ms.p90, run.latency_ms.p99]
            table.add_row(
                escape(row.subject.label),
                _scenario_result(row, settings.scenario),
                "[green]VALID[/]" if run.verdict == "VALID" else "[red]INVALID[/]",
                # Offline is one query: its latency is that of the whole run.
                *("–" if settings.scenario is Scenario.OFFLINE else number(value, ".3g") for value in latency),
                f"{run.queries:,}",
                f"{run.images:,}",
                "–" if parity is None else _verdict(parity),
                "–" if parity is None else number(parity.top1_percent, ".2f"),
            )
    out.print(table)
    out.print("latency: from when a query was due to its answer, raw input to logits in host memory, by LoadGen.\n")
    for row in result.rows:
        if row.missed_queries_per_s is not None:
            bound = f"a p99 of {settings.latency_bound_ms:g} ms"
            rates = [run.queries_per_s or 0.0 for run in row.runs if run.verdict == "VALID"]
            held = f"{per_s(max(rates))} queries/s held {bound}" if rates else f"no rate tried held {bound}"
            missed = per_s(row.missed_queries_per_s)
            out.print(f"{escape(row.subject.label)}: {held}, {missed} queries/s did not")
        if row.reported is not None and (unmet := row.runs[row.reported].unmet):
            out.print(f"[red]INVALID[/] {escape(row.subject.label)}: LoadGen calls not satisfied: {', '.join(unmet)}")
    _print_failed([row.subject for row in result.rows], out)
    _print_absent([row.subject for row in result.rows], result.skipped, out)


def _scenario_result(row: ScenarioRow, scenario: Scenario) -> str:
    """The figure that MLPerf reports for a scenario."""
    if row.reported is None:
        return "–"
    run = row.runs[row.reported]
    if scenario is Scenario.SERVER:
        return "–" if run.verdict == "INVALID" else f"{per_s(run.queries_per_s or 0.0)} queries/s"
    if scenario is Scenario.OFFLINE:
        return f"{number(run.images_per_s, ',.0f')} images/s"
    if scenario is Scenario.SINGLE_STREAM:
        return f"p90 {run.latency_ms.p90:.3g} ms"
    return f"p99 {run.latency_ms.p99:.3g} ms"


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
    yield "–" if subject.parity is None else _verdict(subject.parity)
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


def _two_runs_table(found: Iterable[Compared]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("backend", overflow="fold")
    for name in ("batch", "timing", "base\nimages/s", "head\nimages/s", "ratio"):
        table.add_column(name, justify="left" if name == "timing" else "right", overflow="fold")
    for compared in found:
        ratio = compared.throughput_ratio
        table.add_row(
            escape(compared.subject),
            str(compared.batch_size),
            compared.timing.replace("_", " "),
            per_s(ratio.denominator_median),
            per_s(ratio.numerator_median),
            ratio_words(ratio, ".3f") if ratio.low is not None else f"{ratio_words(ratio, '.3f')} (–)",
        )
    return table


def _print_failed(subjects: Iterable[SubjectResult], out: Console) -> None:
    """What is wrong with those whose parity failed, and the first of their flips."""
    for subject in subjects:
        if subject.parity is not None and not subject.parity.passed:
            _print_verdict(subject, out)
            _print_flips(subject, FLIPS_SHOWN, out)


def _print_verdict(subject: SubjectResult, out: Console) -> None:
    if (parity := subject.parity) is not None and not parity.passed:
        reasons = "; ".join(parity.failures)
        out.print(f"[red]parity FAILED[/] {escape(subject.label)} ({parity.profile}): {escape(reasons)}.")
    if subject.bisection is not None:
        out.print(f"  {escape(subject.label)}: {escape(subject.bisection.in_words())}")


def _print_flips(subject: SubjectResult, limit: int | None, out: Console) -> None:
    """The first `limit` flips, all of them where it is None."""
    flips = () if subject.parity is None else subject.parity.flips or ()
    for flip in flips[:limit]:
        label = "no label" if flip.label is None else f"label {flip.label}"
        out.print(
            f"  {escape(subject.label)}: image {flip.image_index}, {label}: "
            f"the oracle says {flip.oracle_prediction} by a margin of {flip.margin:.3g}, here {flip.prediction}"
        )
    if limit is not None and len(flips) > limit:
        out.print(f"  {escape(subject.label)}: {len(flips) - limit} more flips, see bench parity")


def _print_machine(machine: Environment, busy_percent_at_end: float, out: Console) -> None:
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    out.print(f"{machine.cpu}, {machine.usable_cpus} of {machine.logical_cpus} CPUs{gpus}, {machine.platform}\n")
    busy = max(machine.cpu_busy_percent, busy_percent_at_end)
    if busy > BUSY_PERCENT:
        out.print(
            f"[yellow]warning[/] other processes used {busy:.0f} % of the CPUs while no backend ran: expect these "
            "figures to be low and to scatter. Run again on a quiet machine.\n"
        )


def _print_absent(subjects: Iterable[SubjectResult], skipped: Iterable[Skipped], out: Console) -> None:
    for subject in subjects:
        if subject.failure is not None:
            out.print(f"[red]{subject.failure.kind}[/] {escape(subject.label)}: {escape(subject.failure.message)}")
            if subject.failure.trace:
                out.print(escape(subject.failure.trace), style="dim")
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.backend)
    for reason, backends in by_reason.items():
        out.print(f"[dim]skipped {escape(', '.join(backends))}: {escape(reason)}[/]")


def _verdict(parity: ParityVerdict) -> str:
    return "[green]pass[/]" if parity.passed else "[red]FAIL[/]"

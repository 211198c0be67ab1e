"""The `bench` command.

Owns its options, the exit code, and how the process ends. Imports what a subcommand needs inside that subcommand, so
that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends.contract import BACKENDS, Profile
from bench.cli.options import (
    DEFAULT_BUNDLE,
    DEFAULT_TIMEOUT_S,
    BackendOption,
    BatchSizeOption,
    BlockOption,
    BundleOption,
    ControlOption,
    ProfileOption,
    ThreadsOption,
    TimeoutOption,
    VariantOption,
    check_judged,
    check_names,
    command_line,
    default_place,
    shown_progress,
)
from bench.cli.sweep import recommend_command, sweep_command
from bench.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NEGATIVE,
    EXIT_TERMINATED,
    EXIT_USAGE,
    BenchError,
    Terminated,
)
from bench.report.formats import ReportFormat, chosen_format
from bench.worker.loadgen import Scenario

if TYPE_CHECKING:
    from bench.run.plan import Plan
    from bench.run.scenario import Wanted
    from bench.run.suite import Suite

# One image as it arrives, a batch that still fits the caches, and one that doesn't.
DEFAULT_BATCH_SIZES = (1, 64, 256)
DEFAULT_BLOCK_MS = 150.0
# A run that nobody asked to be long ends within two minutes even where every call is slow: no round begins after this.
DEFAULT_TIME_LIMIT_S = 90.0
# A minute for the seven or so runs of server. MLPerf's rules ask for 600 s each; their bound for images is 15 ms.
DEFAULT_MIN_DURATION_S, DEFAULT_LATENCY_BOUND_MS, DEFAULT_SAMPLES_PER_QUERY = 10.0, 15.0, 8
DEFAULT_THRESHOLD_PERCENT = 5.0
# Of a suite, which has seven times the rows of a run: many short blocks show as much as few long ones, and every call
# that fits into one is a number in the file.
SUITE_BLOCK_S, SUITE_TIME_LIMIT_S = 0.02, 240.0

# Typer's rich help costs as much start-up time as everything else together.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a bundle's files on the runtimes of this machine, and prove that they are right."""


@app.command("run")
def run_command(
    backend: BackendOption = None,
    batch_size: BatchSizeOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Where the result goes. Default: artifacts/results/<bundle>.json"),
    ] = None,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    variant: VariantOption = None,
    control: ControlOption = False,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            help="How often each backend gets its turn; an interval needs six. Default: until more tell little more.",
        ),
    ] = None,
    block_ms: BlockOption = DEFAULT_BLOCK_MS,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    scenario: Annotated[
        Scenario | None,
        typer.Option("--scenario", help="Instead of rounds, the load of MLPerf LoadGen. Needs the extra [mlperf]."),
    ] = None,
    min_duration_s: Annotated[
        float | None,
        typer.Option("--min-duration-s", min=0.1, help="Scenarios: seconds of each LoadGen run at least. Default: 10."),
    ] = None,
    latency_bound_ms: Annotated[
        float | None,
        typer.Option("--latency-bound-ms", min=0.001, help="server: what the p99 must not exceed. Default: 15."),
    ] = None,
    samples_per_query: Annotated[
        int | None, typer.Option("--samples-per-query", min=1, help="multi-stream: images of a query. Default: 8.")
    ] = None,
) -> None:
    """Accuracy parity and throughput: a table, and a JSON result with the raw samples.

    Exit code 1 when a parity failed, a backend did not finish, or LoadGen calls its scenario invalid.
    """
    check_names(backend)
    wanted = _wanted(scenario, min_duration_s, latency_bound_ms, samples_per_query, batch_size, rounds)
    from bench.report.terminal.run import console, print_run
    from bench.results.schema import check_writable, write_result

    ending = "" if scenario is None else f"-{scenario}"
    target = json or default_place(bundle, f"{ending}.json")
    from bench.machine.environment import usable_cpus
    from bench.run.plan import Plan
    from bench.run.rounds import exit_code, run

    plan = Plan(
        bundles=(bundle,),
        backends=tuple(backend) if backend else None,
        variants=_variants(variant),
        command=command_line(),
        threads=threads or usable_cpus(),
        profile=profile,
        timeout_s=timeout,
        control=tuple(BACKENDS) if control else (),
        batch_sizes=_batch_sizes(batch_size),
        rounds=rounds,
        survey=True,
        time_limit_s=DEFAULT_TIME_LIMIT_S if rounds is None else None,
        block_s=block_ms / 1000,
    )

    check_writable(target)
    if wanted is not None:
        raise typer.Exit(_run_scenario(plan, wanted, target))
    with shown_progress() as progress:
        result = run(plan, progress)
    print_run(result, console())
    write_result(result, target)
    print(f"result: {target}")
    raise typer.Exit(exit_code(result))


@app.command("suite")
def suite_command(
    backend: BackendOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Images per call; repeat for more. Default: 1, 8, 64, 256 and 1024; on a GPU 4096 and 16384 too.",
        ),
    ] = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the files go. Default: artifacts/results/<bundle>-suite"),
    ] = None,
    threads: ThreadsOption = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0, help="Seconds after which no round begins, for all runs together.")
    ] = SUITE_TIME_LIMIT_S,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """All that can be said of a bundle on this machine: suite.json, figures, and summary.md.

    The doctor's findings; then, for each profile that changes anything here, parity and throughput of every backend and
    of the unfolded controls. Each run is written when it is done.

    Exit code 1 when a parity failed, a backend did not finish, or a run that was due could not be made.
    """
    check_judged(backend)
    from bench.machine.environment import usable_cpus
    from bench.report.suite import PAGE_NAME, check_folder, write_suite
    from bench.run.suite import Wanted as WantedSuite
    from bench.run.suite import conduct, suite_exit_code

    target = out or default_place(bundle, "-suite")
    check_folder(target)
    wanted = WantedSuite(
        command=command_line(),
        bundle=bundle,
        backends=tuple(backend or ()),
        batch_sizes=tuple(sorted(set(batch_size or ()))),
        threads=threads or usable_cpus(),
        time_limit_s=time_limit,
        block_s=SUITE_BLOCK_S,
        timeout_s=timeout,
    )
    kept = 0

    def keep(so_far: Suite) -> None:
        nonlocal kept
        write_suite(so_far, target)
        kept = len(so_far.runs)

    try:
        with shown_progress() as progress:
            suite = conduct(wanted, keep, progress)
    except (KeyboardInterrupt, Terminated):
        print(f"finished runs kept in {target}: {kept}", file=sys.stderr)
        raise
    print(f"summary: {target / PAGE_NAME}")
    raise typer.Exit(suite_exit_code(suite))


@app.command("ab")
def ab_command(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE_A BUNDLE_B…", help="The base first, then what to compare with it.")
    ],
    backend: BackendOption = None,
    batch_size: BatchSizeOption = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where the result goes. Default: nowhere.")
    ] = None,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    variant: VariantOption = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=6, help="How often each gets its turn. Default: until the threshold is decided."),
    ] = None,
    block_ms: BlockOption = DEFAULT_BLOCK_MS,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=100, help="Percent that a bundle may be slower than the first.")
    ] = DEFAULT_THRESHOLD_PERCENT,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Compare bundles with the first one in the same rounds of one run.

    Exit code 1 when one is slower, its whole interval below 1 - threshold, when a parity failed, or when a backend did
    not finish.
    """
    check_names(backend)
    if len(bundles) < 2:
        raise BenchError("bench ab compares bundles: name at least two folders, the base first.", EXIT_USAGE)
    from bench.machine.environment import usable_cpus
    from bench.report.terminal.run import console, print_comparison, print_run
    from bench.results.derive import slower
    from bench.results.schema import check_writable, write_result
    from bench.run.plan import Plan
    from bench.run.rounds import exit_code, run

    if json is not None:
        check_writable(json)
    plan = Plan(
        bundles=tuple(bundles),
        backends=tuple(backend) if backend else None,
        variants=_variants(variant),
        command=command_line(),
        threads=threads or usable_cpus(),
        profile=profile,
        timeout_s=timeout,
        batch_sizes=_batch_sizes(batch_size),
        rounds=rounds,
        bound=1 - threshold / 100,
        time_limit_s=DEFAULT_TIME_LIMIT_S if rounds is None else None,
        block_s=block_ms / 1000,
    )
    with shown_progress() as progress:
        result = run(plan, progress)
    print_run(result, console())
    print_comparison(result, threshold, console())
    if json is not None:
        write_result(result, json)
        print(f"result: {json}")
    raise typer.Exit(max(exit_code(result), EXIT_NEGATIVE if slower(result.ratios, threshold) else 0))


@app.command("report")
def report_command(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT.JSON…", help="What bench run, bench ab or bench suite wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Where it goes. Its ending says the format: .html, .md, .csv."
        ),
    ] = None,
    format_: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="html is one page that opens offline, and needs -o. Default: text."),
    ] = None,
) -> None:
    """Show results again, every figure derived anew from its raw samples: as tables, or as one page with charts."""
    chosen = chosen_format(format_, out, results)
    from bench.report.render import print_sources, rendered
    from bench.results.load import results_in
    from bench.results.schema import check_writable, write_whole

    if out is not None:
        check_writable(out, "-o")
    sources = [results_in(path) for path in results]
    if out is not None:
        write_whole(rendered(sources, chosen), out, "-o")
        print(f"report: {out}")
    elif chosen is ReportFormat.TEXT:
        print_sources(sources)
    else:
        print(rendered(sources, chosen), end="")


@app.command("compare")
def compare_command(
    base: Annotated[Path, typer.Argument(metavar="BASE.JSON", help="The result from before.")],
    head: Annotated[Path, typer.Argument(metavar="HEAD.JSON", help="The result from after.")],
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=100, help="Percent that a backend may be slower than before.")
    ] = DEFAULT_THRESHOLD_PERCENT,
    allow_different_machine: Annotated[
        bool,
        typer.Option("--allow-different-machine", help="Compare although machine, threads or profile differ."),
    ] = False,
) -> None:
    """Compare two results of separate runs: weaker evidence than bench ab, for where both can't be had in one run.

    Exit code 1 when a backend is slower, its whole interval below 1 - threshold, or did not finish any more.
    """
    from bench.report.terminal.run import console, print_two_runs
    from bench.results.compare import compare, machine_differences, regressions
    from bench.results.schema import read_result

    before, after = read_result(base), read_result(head)
    differences = machine_differences(before, after)
    if differences and not allow_different_machine:
        raise BenchError(
            f"{base} and {head} were not measured alike: {'; '.join(differences)}. Measure both on one machine with "
            "the same settings, or say --allow-different-machine.",
            EXIT_BAD_INPUT,
        )
    comparison = compare(before, after)
    print_two_runs(before, after, comparison, differences, threshold, console())
    raise typer.Exit(EXIT_NEGATIVE if comparison.broken or regressions(comparison, threshold) else 0)


@app.command("doctor")
def doctor_command(threads: ThreadsOption = None) -> None:
    """What on this machine spoils measurements or keeps a backend from running, each with its fix.

    Exit code 1 when there is an error.
    """
    from bench.machine.doctor import Severity, examine
    from bench.machine.environment import usable_cpus
    from bench.report.terminal.run import console, print_findings

    findings = examine(threads or usable_cpus())
    print_findings(findings, console())
    raise typer.Exit(EXIT_NEGATIVE if any(finding.severity is Severity.ERROR for finding in findings) else 0)


@app.command("backends")
def backends_command(timeout: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Which backends can run here, and for the others why not and what would fix it."""
    from bench.report.terminal.run import console, print_backends
    from bench.run.lanes import availability

    print_backends(availability(threads=1, timeout_s=timeout), console())


@app.command("parity")
def parity_command(
    backend: BackendOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    threads: ThreadsOption = None,
    profile: ProfileOption = Profile.STRICT,
    variant: VariantOption = None,
    control: ControlOption = False,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Compare every ONNX file with the torch graph node by node, also where parity holds."
        ),
    ] = False,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """The verdict alone: each backend's logits against the bundle's float64 oracle.

    Exit code 1 when one failed; every changed prediction is listed, and of an ONNX file that failed the first node that
    diverges from the torch graph is named.
    """
    check_names(backend)
    if backend and "null" in backend:
        raise BenchError("null computes nothing, so there is nothing to judge. Leave --backend null out.", EXIT_USAGE)
    from bench.machine.environment import usable_cpus
    from bench.report.terminal.run import console, print_parity
    from bench.run.plan import Plan
    from bench.run.rounds import exit_code, run

    plan = Plan(
        bundles=(bundle,),
        backends=tuple(backend) if backend else None,
        variants=_variants(variant),
        command=command_line(),
        threads=threads or usable_cpus(),
        profile=profile,
        timeout_s=timeout,
        control=tuple(BACKENDS) if control else (),
        bisect="always" if bisect else "failed",
    )
    with shown_progress() as progress:
        result = run(plan, progress)
    print_parity(result, console())
    raise typer.Exit(exit_code(result))


app.command("sweep")(sweep_command)
app.command("recommend")(recommend_command)


def main() -> None:
    """The console script and `python -m bench`: errors become one paragraph on stderr and the exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app(prog_name="bench")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated:
        print("terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except SystemExit as ending:
        if ending.code == EXIT_INTERRUPTED:  # Typer has turned Ctrl-C into this, without a word
            print("interrupted", file=sys.stderr)
        raise


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _wanted(
    scenario: Scenario | None,
    min_duration_s: float | None,
    latency_bound_ms: float | None,
    samples_per_query: int | None,
    batch_size: list[int] | None,
    rounds: int | None,
) -> Wanted | None:
    """The load that was asked for, None without --scenario. Raises BenchError (usage) for an option that would do
    nothing.
    """
    takes: dict[str, tuple[object, tuple[Scenario, ...]]] = {
        "--min-duration-s": (min_duration_s, tuple(Scenario)),
        "--latency-bound-ms": (latency_bound_ms, (Scenario.SERVER,)),
        "--samples-per-query": (samples_per_query, (Scenario.MULTI_STREAM,)),
    }
    for option, (value, scenarios) in takes.items():
        if value is not None and scenario not in scenarios:
            names = ", ".join(scenarios)
            raise BenchError(f"{option} needs --scenario with one of: {names}. Leave it out.", EXIT_USAGE)
    if scenario is None:
        return None
    if rounds is not None:
        raise BenchError("--rounds and --scenario exclude each other: LoadGen decides how long it runs.", EXIT_USAGE)
    if batch_size and (scenario is not Scenario.OFFLINE or len(batch_size) > 1):
        raise BenchError(
            "a scenario decides how many images a call has; only offline takes --batch-size, once. Leave it out (for "
            "multi-stream there is --samples-per-query).",
            EXIT_USAGE,
        )
    from bench.run.scenario import Wanted

    images = 1
    if scenario is Scenario.MULTI_STREAM:
        images = samples_per_query or DEFAULT_SAMPLES_PER_QUERY
    elif scenario is Scenario.OFFLINE:
        images = batch_size[0] if batch_size else DEFAULT_BATCH_SIZES[-1]
    bound_ms = (latency_bound_ms or DEFAULT_LATENCY_BOUND_MS) if scenario is Scenario.SERVER else None
    return Wanted(
        scenario=scenario,
        min_duration_s=min_duration_s or DEFAULT_MIN_DURATION_S,
        images_per_call=images,
        latency_bound_s=None if bound_ms is None else bound_ms / 1000,
    )


def _run_scenario(plan: Plan, wanted: Wanted, target: Path) -> int:
    """Run, print and write; returns the exit code."""
    from bench.report.terminal.run import console, print_scenario
    from bench.results.schema import write_result
    from bench.run.scenario import log_folder, run_scenario, scenario_exit_code

    with shown_progress() as progress:
        result = run_scenario(plan, wanted, target, progress)
    print_scenario(result, console())
    write_result(result, target)
    print(f"result: {target}\nLoadGen's logs: {log_folder(target)}")
    return scenario_exit_code(result)


def _variants(given: list[str] | None) -> tuple[str, ...]:
    return tuple(given or ("float32",))


def _batch_sizes(given: list[int] | None) -> tuple[int, ...]:
    return tuple(sorted(set(given or DEFAULT_BATCH_SIZES)))

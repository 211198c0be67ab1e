"""`bench run`, `ab` and `parity`: options to a plan, and the plan to a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends.profile import Profile
from bench.cli.options import (
    DEFAULT_BUNDLE,
    DEFAULT_THRESHOLD_PERCENT,
    DEFAULT_TIMEOUT_S,
    AllowInconclusiveOption,
    BackendOption,
    BatchSizeOption,
    BlockOption,
    BundleOption,
    ControlOption,
    InputOption,
    ParityInputsOption,
    PlaceArgument,
    ProcessesOption,
    ProfileOption,
    ThreadsOption,
    TimeLimitOption,
    TimeoutOption,
    VariantOption,
    check_judged,
    check_names,
    command_line,
    default_place,
    shown_progress,
    shown_rows,
)
from bench.errors import EXIT_USAGE, BenchError
from bench.results.terms import Scenario


class CpuChoice(StrEnum):
    """`export.bundle.int8.CpuKind`, which --help doesn't wait for, and all of them."""

    AVX2 = "avx2"
    VNNI = "vnni"
    ARM_DOT = "arm-dot"
    WASM = "wasm"
    ALL = "all"


if TYPE_CHECKING:
    from bench.run.plan import Plan
    from bench.run.scenario import ScenarioRequest


# One image as it arrives, a batch that still fits the caches, and one that doesn't.
DEFAULT_BATCH_SIZES = (1, 64, 256)
DEFAULT_BLOCK_MS = 150.0
# A run that nobody asked to be long ends within two minutes even where every call is slow.
DEFAULT_TIME_LIMIT_S = 110.0
# Five processes of four backends take half of that for starting, parity and warming up (two cores); the interval of
# fewer is much wider: Student's factor is 2.8 for five, 4.3 for three.
DEFAULT_PROCESSES = 5
# A gate decides by processes. Of its time, the more goes into them the fewer rounds each has; three have a median.
AB_BATCH_SIZES, AB_ROUNDS, AB_TIME_LIMIT_S = (1, 64), 3, 240.0
# A minute for the seven or so runs of server. MLPerf's rules ask for 600 s each; their bound for images is 15 ms.
DEFAULT_MIN_DURATION_S, DEFAULT_LATENCY_BOUND_MS, DEFAULT_SAMPLES_PER_QUERY = 10.0, 15.0, 8


def run_command(
    place: PlaceArgument = None,
    backend: BackendOption = None,
    batch_size: BatchSizeOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    input: InputOption = None,
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
            help="How often each backend gets its turn in each process. Default: until more tell little more.",
        ),
    ] = None,
    processes: ProcessesOption = None,
    time_limit: TimeLimitOption = None,
    block_ms: BlockOption = None,
    parity_inputs: ParityInputsOption = None,
    fail_if_noisy: Annotated[
        float | None,
        typer.Option(
            "--fail-if-noisy",
            metavar="PERCENT",
            min=0,
            help="Exit with 1 where a throughput is not known to within so much.",
        ),
    ] = None,
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

    Of an ONNX file: folded and as it is, side by side, on random inputs, against the file itself in float64.

    Every backend is started several times, and measured in rounds each time. Ctrl-C keeps the rounds that were done.

    Exit code 1 when a parity failed, a backend did not finish, or LoadGen calls its scenario invalid.
    """
    check_names(backend)
    in_rounds = {
        "--rounds": rounds,
        "--processes": processes,
        "--time-limit": time_limit,
        "--block-ms": block_ms,
        "--parity-inputs": parity_inputs,
        "--fail-if-noisy": fail_if_noisy,
    }
    request = _scenario_request(scenario, min_duration_s, latency_bound_ms, samples_per_query, batch_size, in_rounds)
    from bench.cli.exit_codes import exit_code
    from bench.cli.onnx_file import batch_sizes_for, of_the_file, opened_place
    from bench.report.terminal.console import console
    from bench.report.terminal.run import print_run
    from bench.results.files import check_writable, write_result
    from bench.run.plan import Rounds
    from bench.run.rounds import run

    with opened_place(place, bundle, input) as where:
        ending = "" if scenario is None else f"-{scenario}"
        target = json or default_place(where.named, f"{ending}.json")
        plan = _plan((where.bundle,), backend, variant, threads, profile, timeout, control or where.file is not None)
        check_writable(target)
        if request is not None:
            raise typer.Exit(_run_scenario(plan, request, target))
        measured = Rounds(
            batch_sizes=batch_sizes_for(where, batch_size, DEFAULT_BATCH_SIZES),
            block_s=(block_ms or DEFAULT_BLOCK_MS) / 1000,
            count=rounds,
            processes=processes or DEFAULT_PROCESSES,
            time_limit_s=time_limit or (DEFAULT_TIME_LIMIT_S if rounds is None else None),
            fitted=batch_size is None,
            limit_is_default=time_limit is None,
        )
        plan = replace(plan, rounds=measured, survey=True, parity_inputs=parity_inputs)
        with shown_rows() as shown:
            result = of_the_file(run(plan, *shown), where)
    print_run(result, console())
    write_result(result, target)
    print(f"result: {target}")
    raise typer.Exit(exit_code(result, fail_if_noisy))


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
        int, typer.Option("--rounds", min=1, help="How often each gets its turn in each process.")
    ] = AB_ROUNDS,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="How often all are started anew. Default: until it is decided."),
    ] = None,
    time_limit: TimeLimitOption = None,
    block_ms: BlockOption = None,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=100, help="Percent that a bundle may be slower than the first.")
    ] = DEFAULT_THRESHOLD_PERCENT,
    allow_inconclusive: AllowInconclusiveOption = False,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Compare bundles with the first one in the same rounds of one run, which goes on until it is decided.

    Exit code 1 when one is slower, its whole interval below 1 - threshold, when a parity failed, or when a backend did
    not finish; 5 when the time was over before every interval lay on one side, or the machine was too busy to tell.
    """
    check_names(backend)
    if len(bundles) < 2:
        raise BenchError("bench ab compares bundles: name at least two folders, the base first.", EXIT_USAGE)
    from bench.cli.exit_codes import comparison_exit_code
    from bench.report.terminal.comparison import print_comparison
    from bench.report.terminal.console import console
    from bench.report.terminal.run import print_run
    from bench.results.files import check_writable, write_result
    from bench.run.plan import Rounds, batch_sizes
    from bench.run.rounds import run

    if json is not None:
        check_writable(json)
    plan = _plan(tuple(bundles), backend, variant, threads, profile, timeout, reference=backend is not None)
    measured = Rounds(
        batch_sizes=batch_sizes(bundles, batch_size, AB_BATCH_SIZES),
        block_s=(block_ms or DEFAULT_BLOCK_MS) / 1000,
        count=rounds,
        processes=processes,
        bound=1 - threshold / 100,
        time_limit_s=time_limit or (AB_TIME_LIMIT_S if processes is None else None),
        fitted=batch_size is None,
    )
    with shown_rows() as shown:
        result = run(replace(plan, rounds=measured), *shown)
    print_run(result, console())
    print_comparison(result, threshold, console())
    if json is not None:
        write_result(result, json)
        print(f"result: {json}")
    raise typer.Exit(comparison_exit_code(result, threshold, allow_inconclusive))


def parity_command(
    place: PlaceArgument = None,
    backend: BackendOption = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    input: InputOption = None,
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
    cpus: Annotated[
        list[CpuChoice] | None,
        typer.Option(
            "--cpus", help="Also the verdict on int8 files for a kind of CPU that this machine is not; repeatable."
        ),
    ] = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """The verdict alone: each backend's logits against the bundle's float64 oracle.

    Exit code 1 when one failed; every changed prediction is listed, and of an ONNX file that failed the first node that
    diverges from the torch graph is named. With --cpus, 1 also where an int8 file is wrong on such a CPU, and 5 where
    nothing is proved of it.
    """
    check_judged(backend)
    from bench.cli.exit_codes import cpus_exit_code, exit_code
    from bench.cli.onnx_file import opened_place
    from bench.report.columns import OnCpu
    from bench.report.terminal.console import console
    from bench.report.terminal.parity import print_cpus, print_parity
    from bench.results.queries import on_cpus
    from bench.run.plan import has_torch_program
    from bench.run.rounds import run
    from export.bundle import Bundle
    from export.bundle.int8 import CPU_KINDS

    with opened_place(place, bundle, input) as where:
        plan = _plan((where.bundle,), backend, variant, threads, profile, timeout, control or where.file is not None)
        plan = replace(plan, bisect="always" if bisect else "failed")
        measured = Bundle.open(where.bundle)
        if bisect and not has_torch_program(measured):
            raise BenchError(
                f"--bisect compares with the nodes of a torch graph, and {where.file or where.bundle} has none: it was "
                "not made of a model of torch. Leave it out.",
                EXIT_USAGE,
            )
        with shown_progress() as progress:
            result = run(plan, progress)
    print_parity(result, console())
    kinds = [kind for kind in CPU_KINDS if CpuChoice.ALL in (cpus or ()) or kind in (cpus or ())]
    elsewhere = [OnCpu(*found) for found in on_cpus(result, measured, kinds)]
    if cpus:
        print_cpus(elsewhere, console())
    raise typer.Exit(exit_code(result) or cpus_exit_code(each.verdict for each in elsewhere))


def _scenario_request(
    scenario: Scenario | None,
    min_duration_s: float | None,
    latency_bound_ms: float | None,
    samples_per_query: int | None,
    batch_size: list[int] | None,
    in_rounds: Mapping[str, object],
) -> ScenarioRequest | None:
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
    for option, given in in_rounds.items():
        if given is not None:
            raise BenchError(
                f"{option} and --scenario exclude each other: LoadGen decides how long it runs.", EXIT_USAGE
            )
    if batch_size and (scenario is not Scenario.OFFLINE or len(batch_size) > 1):
        raise BenchError(
            "a scenario decides how many images a call has; only offline takes --batch-size, once. Leave it out (for "
            "multi-stream there is --samples-per-query).",
            EXIT_USAGE,
        )
    from bench.run.scenario import ScenarioRequest

    images = 1
    if scenario is Scenario.MULTI_STREAM:
        images = samples_per_query or DEFAULT_SAMPLES_PER_QUERY
    elif scenario is Scenario.OFFLINE:
        images = batch_size[0] if batch_size else DEFAULT_BATCH_SIZES[-1]
    bound_ms = (latency_bound_ms or DEFAULT_LATENCY_BOUND_MS) if scenario is Scenario.SERVER else None
    return ScenarioRequest(
        scenario=scenario,
        min_duration_s=min_duration_s or DEFAULT_MIN_DURATION_S,
        images_per_call=images,
        latency_bound_s=None if bound_ms is None else bound_ms / 1000,
    )


def _run_scenario(plan: Plan, request: ScenarioRequest, target: Path) -> int:
    """Run, print and write; returns the exit code."""
    from bench.cli.exit_codes import scenario_exit_code
    from bench.report.terminal.console import console
    from bench.report.terminal.scenario import print_scenario
    from bench.results.files import write_result
    from bench.run.scenario import log_folder, run_scenario

    with shown_progress() as progress:
        result = run_scenario(plan, request, target, progress)
    print_scenario(result, console())
    write_result(result, target)
    print(f"result: {target}\nLoadGen's logs: {log_folder(target)}")
    return scenario_exit_code(result)


def _plan(
    bundles: tuple[Path, ...],
    backend: list[str] | None,
    variant: list[str] | None,
    threads: int | None,
    profile: Profile,
    timeout_s: float,
    control: bool = False,
    reference: bool = True,
) -> Plan:
    """What runs: with nothing else said, the parity alone."""
    from bench.backends.registry import registered
    from bench.machine.environment import usable_cpus
    from bench.run.plan import Plan, Selection

    selection = Selection(
        bundles=bundles,
        backends=tuple(backend) if backend else None,
        variants=tuple(variant or ("float32",)),
        control=tuple(registered()) if control else (),
        reference=reference,
    )
    return Plan(selection, threads or usable_cpus(), profile, timeout_s, command=command_line())

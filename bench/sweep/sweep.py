"""Which file on which runtime, with how many threads, in which batches: all of them, measured in as little time as it
takes.

Owns the order of things. Which choices there are is `bench.sweep.choices`, how they are measured
`bench.sweep.device_runs`, what is recommended of them `bench.sweep.recommend`.

First every choice proves its parity and is looked at in a few short rounds. Those that are wrong are out, and those
that can't win anything are not measured any further (`bench.sweep.contenders`). The rest have full rounds in one run,
the reference among them. Loading takes most of a look's time, so that parity and the look are one run: each process
starts once for both.

A float16 or bfloat16 file that is computed in float32 here is looked at, and goes on only where its variant was named.
A file that is wrong, other than in float32, is a finding: int8 may fail where float32 must not. So is one that a
runtime can't load, unless that backend was named. The exit code is 1 where a float32 file is wrong, or where something
that was due could not be measured.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from bench.backends.contract import Device
from bench.backends.registry import find_backend
from bench.errors import EXIT_NEGATIVE, BenchError
from bench.results.schema import Result
from bench.results.studies import SWEEP_VERSION, Sweep
from bench.run.availability import availability
from bench.run.plan import Choice, Progress, batch_sizes
from bench.sweep.choices import SweepRequest, chosen, offered, waves, worth_a_look
from bench.sweep.device_runs import LOOKS_SHARE, Clock, DeviceRuns
from bench.sweep.folder import SweepFolder
from export.bundle import FLOAT32

# As the suite's, less what a sweep of so many choices has no time for.
BATCH_SIZES: dict[Device, tuple[int, ...]] = {"cpu": (1, 8, 64, 256), "cuda": (1, 8, 64, 256, 1024)}


def run_sweep(request: SweepRequest, folder: SweepFolder, progress: Progress) -> Sweep:
    """Make every run that is not yet in `folder`, and return the whole.

    Raises BenchError: a damaged file of the bundle, a variant that it doesn't have, a backend that was named and can't
    run, nothing at all that can, or nothing that is right. What was finished before is in the folder.
    """
    started_at, began = datetime.now(UTC), time.monotonic()
    progress("seeing what can run here", 0.0)
    reasons = availability(request.most_threads, request.timeout_s)
    choices, skipped = offered(request, reasons)
    if request.fresh:
        folder.forget()
    by_device: dict[Device, list[Choice]] = {}
    for choice in choices:
        by_device.setdefault(find_backend(choice.backend).device, []).append(choice)
    looks: list[Result] = []
    runs: list[Result] = []
    for place, (device, its_choices) in enumerate(by_device.items()):
        reference = f"torch-{device}"
        device_runs = DeviceRuns(
            reference=None if reasons[reference] is not None else Choice(reference, FLOAT32, request.most_threads),
            batch_sizes=batch_sizes([request.path], request.batch_sizes, BATCH_SIZES[device]),
            request=request,
            folder=folder,
            progress=progress,
            clock=Clock(began, request.time_limit_s, place, len(by_device)),
        )
        first, second = waves(its_choices, request.most_threads)
        looked = list(device_runs.looks(first, 0.0, LOOKS_SHARE / 2))
        second, not_worth_it = worth_a_look(second, looked, request)
        looked += device_runs.looks(second, LOOKS_SHARE / 2, LOOKS_SHARE)
        others = [choice for choice in (*first, *second) if choice != device_runs.reference]
        left, out = chosen(others, looked, request, device_runs.clock.room)
        runs += device_runs.full_runs(left)
        looks += looked
        skipped += [*out, *not_worth_it]
    progress("done", 1.0)
    if not runs:
        reasons_given = "; ".join(f"{entry.what}: {entry.reason}" for entry in skipped)
        raise BenchError(f"nothing could be measured: {reasons_given}", EXIT_NEGATIVE)
    return Sweep(
        schema_version=SWEEP_VERSION,
        kind="sweep",
        started_at=started_at,
        finished_at=datetime.now(UTC),
        command=request.command,
        time_limit_s=request.time_limit_s,
        bundle=runs[0].bundles[0].model_copy(update={"path": str(request.path)}),
        input=request.bundle.manifest.input,
        output=request.bundle.manifest.output,
        more_inputs=request.bundle.manifest.more_inputs,
        more_outputs=request.bundle.manifest.more_outputs,
        preprocessing=request.bundle.manifest.preprocessing,
        runs=tuple(runs),
        looks=tuple(looks),
        skipped=tuple(skipped),
    )

"""The clock: warming up, a timed block of calls, and waiting until a runtime's threads are quiet.

Owns what happens inside one worker between two looks at the clock. Knows neither backends nor statistics: it times a
callable and keeps every sample. One host clock serves every device, because a session's `run` returns when its result
exists (see `bench.backends.contract.Session`); where there is a GPU in use, its own clock times some more calls after
the block, since asking it takes longer than the shortest of them.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.results.terms import Timing

GpuClock = Callable[[Callable[[], object]], "int | None"]
"""See `bench.backends.contract.Session.gpu_ns`."""

# Reached only where a call takes almost no time; keeps a result file readable.
MAX_CALLS_PER_BLOCK = 10_000
# After another backend's turn, caches and sleeping threads have to come back: the first calls are not timed.
LEAD_IN_S, LEAD_IN_CALLS = 0.01, 2
# A fresh TorchScript module compiles at its second call and CUDA convolutions search at the first of every shape.
WARM_UP_CALLS, WARM_UP_S, WARM_UP_LIMIT_CALLS, WARM_UP_LIMIT_S = 10, 0.2, 3, 2.0
STEADY_WITHIN = 0.03
OVERHEAD_S = 0.01
QUICKEST_LIMIT_S = 3.0
# Calls that the GPU's clock times after a block: enough for a median, at most a fifth of the block's time.
GPU_CALLS, GPU_SHARE = 20, 0.2
# onnxruntime's pool was seen spinning for 40 ms after a call, using one core: two orders above what counts as quiet.
QUIET_WINDOW_S, QUIET_SHARE, QUIET_LIMIT_S = 0.01, 0.1, 1.0


@dataclass(frozen=True)
class Block:
    """Calls timed one after the other, without a pause.

    Attributes:
        started_at_unix_s: wall clock when the first timed call began.
        started_at_monotonic_ns: the same moment on the clock that times the calls (`time.perf_counter_ns`).
        durations_ns: one for each call, in order.
        energy_j: what each counter of the machine counted meanwhile, everything that ran included.
        cpu_s: the CPU time that this process used during the block, all threads together.
        system_s: how much of it the operating system did for the process, as where memory is mapped.
        gpu_durations_ns: some calls right after the block, timed by the GPU's own clock; empty without a GPU.
    """

    timing: Timing
    started_at_unix_s: float
    started_at_monotonic_ns: int
    durations_ns: tuple[int, ...]
    energy_j: dict[str, float]
    cpu_s: float
    system_s: float
    gpu_durations_ns: tuple[int, ...] = ()


@dataclass(frozen=True)
class WarmUp:
    """How much was run before the first timed block. `settled` is False where the limit came before steady calls."""

    calls: int
    seconds: float
    settled: bool


def timed_block(
    call: Callable[[], object],
    timing: Timing,
    seconds: float,
    energy: Callable[[], dict[str, float]] = dict,
    gpu_ns: GpuClock | None = None,
) -> Block:
    """Time single calls of `call` until `seconds` have passed, at least one and at most `MAX_CALLS_PER_BLOCK`.

    `energy` reads the machine's counters, in joules, at both ends of the block. `gpu_ns` is the GPU's clock.
    """
    clock = time.perf_counter_ns
    lead_in_end = clock() + int(LEAD_IN_S * 1e9)
    for _ in range(LEAD_IN_CALLS):
        call()
    while clock() < lead_in_end:
        call()
    durations: list[int] = []
    append = durations.append
    collecting = gc.isenabled()
    energy_before = energy()
    used = time.process_time(), _system_s()
    gc.disable()  # a collection of the harness's own garbage would land in somebody's p99
    try:
        started_at_unix_s = time.time()
        started = clock()
        end = started + int(seconds * 1e9)
        while True:
            before = clock()
            call()
            after = clock()
            append(after - before)
            if after >= end or len(durations) == MAX_CALLS_PER_BLOCK:
                break
    finally:
        if collecting:
            gc.enable()
    cpu_s, system_s = time.process_time() - used[0], _system_s() - used[1]
    energy_j = {counter: joules - energy_before[counter] for counter, joules in energy().items()}
    by_gpu = () if gpu_ns is None else tuple(_by_gpu(call, gpu_ns, GPU_SHARE * seconds))
    return Block(timing, started_at_unix_s, started, tuple(durations), energy_j, cpu_s, system_s, by_gpu)


def _system_s() -> float:
    """The CPU time that the operating system used for this process so far."""
    if sys.platform == "win32":
        return os.times().system
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def _by_gpu(call: Callable[[], object], gpu_ns: GpuClock, seconds: float) -> Iterator[int]:
    """What each of a few calls takes by the GPU's clock; nothing where it has none."""
    end = time.perf_counter() + seconds
    for _ in range(GPU_CALLS):
        if (duration := gpu_ns(call)) is None:
            return
        yield duration
        if time.perf_counter() >= end:
            return


def timer_overhead_ns() -> float:
    """What the clock adds to the duration of a call in `timed_block`: the median over calls that do nothing."""
    return statistics.median(timed_block(_nothing, "device_resident", OVERHEAD_S).durations_ns)


def _nothing() -> None:
    pass


def quickest_s(call: Callable[[], object]) -> float:
    """The quickest of three calls, of which the first may compile; of two where they take seconds."""
    durations: list[float] = []
    while len(durations) < 2 or (len(durations) < 3 and sum(durations) < QUICKEST_LIMIT_S):
        before = time.perf_counter()
        call()
        durations.append(time.perf_counter() - before)
    return min(durations)


def warm_up(call: Callable[[], object]) -> WarmUp:
    """Call until caches, allocators, compilers and algorithm searches have had their chance.

    At least ten calls and 0.2 s, and then until the median of the newest third of all calls is that of the third before
    (within 3 %). At most 2 s; where a call is slower than that allows, three calls.
    """
    durations: list[float] = []
    look_at = WARM_UP_S
    started = before = time.perf_counter()
    while True:
        call()
        now = time.perf_counter()
        durations.append(now - before)
        before, seconds = now, now - started
        if len(durations) >= WARM_UP_CALLS and seconds >= look_at:
            if _is_steady(durations):
                return WarmUp(len(durations), seconds, settled=True)
            look_at = 1.2 * seconds
        if len(durations) >= WARM_UP_LIMIT_CALLS and seconds >= WARM_UP_LIMIT_S:
            return WarmUp(len(durations), seconds, settled=False)


def _is_steady(durations: list[float]) -> bool:
    third = len(durations) // 3
    newest, older = statistics.median(durations[-third:]), statistics.median(durations[-2 * third : -third])
    return abs(newest - older) <= STEADY_WITHIN * older


def wait_until_quiet() -> float:
    """Sleep until this process uses no CPU any more, and return how long that took, in seconds.

    A runtime's pool spins for a while after a call and would be measured together with the next worker. Spinning is
    left on, as users run it; instead the CPU time of the whole process is watched until it stands still (at most
    `QUIET_LIMIT_S`).
    """
    started = time.perf_counter()
    while True:
        busy, begin = time.process_time(), time.perf_counter()
        time.sleep(QUIET_WINDOW_S)
        now = time.perf_counter()
        if time.process_time() - busy < QUIET_SHARE * (now - begin) or now - started > QUIET_LIMIT_S:
            return now - started

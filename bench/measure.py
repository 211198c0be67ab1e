"""The clock: warming up, a timed block of calls, and waiting until a runtime's threads are quiet.

Owns what happens inside one worker between two looks at the clock. Knows neither backends nor statistics: it times a
callable and keeps every sample. One host clock serves every device, because a session's `run` returns when its result
exists (see `bench.backend.Session`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Timing = Literal["device_resident", "end_to_end"]
"""`device_resident` times `run` on an input that is on the device; `end_to_end` times `prepare`, `run` and `fetch`."""

# Reached only where a call takes almost no time; keeps a result file readable.
MAX_CALLS_PER_BLOCK = 10_000
# After another backend's turn, caches and sleeping threads have to come back: the first calls are not timed.
LEAD_IN_S = 0.01
# A fresh TorchScript module compiles at its second call and CUDA convolutions search at the first of every shape.
WARM_UP_CALLS, WARM_UP_S, WARM_UP_LIMIT_CALLS, WARM_UP_LIMIT_S = 10, 0.2, 3, 2.0
# onnxruntime's pool was seen spinning for 40 ms after a call, using one core: two orders above what counts as quiet.
QUIET_WINDOW_S, QUIET_SHARE, QUIET_LIMIT_S = 0.01, 0.1, 1.0


@dataclass(frozen=True)
class Block:
    """Calls timed one after the other, without a pause.

    Attributes:
        started_at_unix_s: wall clock when the first timed call began.
        started_at_monotonic_ns: the same moment on the clock that times the calls (`time.perf_counter_ns`).
        durations_ns: one for each call, in order.
    """

    timing: Timing
    started_at_unix_s: float
    started_at_monotonic_ns: int
    durations_ns: tuple[int, ...]


@dataclass(frozen=True)
class WarmUp:
    """How much was run before the first timed block."""

    calls: int
    seconds: float


def timed_block(call: Callable[[], object], timing: Timing, seconds: float) -> Block:
    """Time single calls of `call` until `seconds` have passed, at least one and at most `MAX_CALLS_PER_BLOCK`."""
    clock = time.perf_counter_ns
    lead_in_end = clock() + int(LEAD_IN_S * 1e9)
    call()
    while clock() < lead_in_end:
        call()
    durations: list[int] = []
    append = durations.append
    collecting = gc.isenabled()
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
    return Block(timing, started_at_unix_s, started, tuple(durations))


def warm_up(call: Callable[[], object]) -> WarmUp:
    """Call until caches, allocators, compilers and algorithm searches have had their chance.

    Ten calls and 0.2 s; where a call is so slow that this takes 2 s, three calls.
    """
    calls, started = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        seconds = time.perf_counter() - started
        if calls >= WARM_UP_CALLS and seconds >= WARM_UP_S:
            break
        if calls >= WARM_UP_LIMIT_CALLS and seconds >= WARM_UP_LIMIT_S:
            break
    return WarmUp(calls, seconds)


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

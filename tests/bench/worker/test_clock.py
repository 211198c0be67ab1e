"""The clock itself. Times are compared with wide margins: other processes may be busy."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import pytest

from bench.worker import clock as measure
from bench.worker.clock import MAX_CALLS_PER_BLOCK, timed_block, wait_until_quiet, warm_up

pytestmark = pytest.mark.serial


def test_every_timed_call_is_a_sample() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.004)

    block = timed_block(call, "end_to_end", 0.05)
    assert block.timing == "end_to_end"
    assert min(block.durations_ns) >= 4_000_000
    assert sum(block.durations_ns) >= 0.04 * 1e9
    assert len(block.durations_ns) <= 13
    assert calls > len(block.durations_ns), "the lead-in is not timed"
    assert abs(block.started_at_unix_s - time.time()) < 5


def test_a_call_longer_than_the_block_is_timed_once() -> None:
    assert len(timed_block(lambda: time.sleep(0.02), "device_resident", 0.001).durations_ns) == 1


def test_a_call_that_does_nothing_fills_no_disk() -> None:
    assert len(timed_block(lambda: None, "device_resident", 5.0).durations_ns) == MAX_CALLS_PER_BLOCK


def test_garbage_is_not_collected_in_a_block_and_is_afterwards() -> None:
    seen = []
    timed_block(lambda: seen.append(gc.isenabled()), "device_resident", 0.001)
    assert seen[-1] is False
    assert gc.isenabled()


def test_a_call_that_raises_leaves_the_collector_on() -> None:
    calls = iter(range(1_000_000))

    def call() -> None:
        time.sleep(0.005)
        if next(calls) > 5:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        timed_block(call, "device_resident", 1.0)
    assert gc.isenabled()


def test_warm_up_goes_on_for_fast_calls_and_ends_for_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = warm_up(lambda: time.sleep(0.001))
    assert fast.calls >= 10
    assert fast.seconds >= 0.2
    assert fast.settled
    monkeypatch.setattr(measure, "WARM_UP_LIMIT_S", 0.05)
    slow = warm_up(lambda: time.sleep(0.03))
    assert slow.calls == 3
    assert not slow.settled


def test_warm_up_goes_on_while_calls_get_faster() -> None:
    """From 30 ms on each takes a tenth less than the one before, down to 4 ms at the twentieth."""
    numbers = itertools.count()
    found = warm_up(lambda: time.sleep(max(0.004, 0.03 * 0.9 ** next(numbers))))
    assert found.calls > 30, "the newest third of them is steady"
    assert found.settled


def test_the_clock_costs_less_than_a_microsecond() -> None:
    assert 0 < measure.timer_overhead_ns() < 1_000


def test_waits_for_threads_that_spin_after_the_call() -> None:
    """What a runtime's pool does: it is not at work any more, and not yet asleep."""
    end = time.perf_counter() + 0.15

    def spin() -> None:
        while time.perf_counter() < end:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    wait_until_quiet()
    assert time.perf_counter() >= end
    thread.join()


def test_a_quiet_process_is_not_kept_waiting() -> None:
    time.sleep(0.05)
    assert wait_until_quiet() < 0.5


def test_gives_up_on_a_process_that_never_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "QUIET_LIMIT_S", 0.05)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert 0.05 < wait_until_quiet() < 5
    finally:
        stop.set()
        thread.join()

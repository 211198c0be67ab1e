"""A worker process: what it answers, and how it can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench.backends.contract import Options
from bench.backends.registry import BACKENDS
from bench.worker.messages import (
    Available,
    BadBundle,
    Close,
    Evaluate,
    Evaluated,
    Job,
    Loaded,
    Measure,
    Measured,
    Prepare,
    Prepared,
    Reply,
    Unavailable,
)
from bench.worker.process import Worker, WorkerFailure
from export.bundle import Bundle

pytestmark = pytest.mark.usefixtures("faulty_backends")
Start = Callable[..., Worker]


@pytest.fixture
def start(small_bundle: Path, tmp_path: Path) -> Start:  # type: ignore[misc]  # a fixture that yields
    workers = []

    def begin(name: str, bundle: Path | None = small_bundle, timeout_s: float = 60, folded: bool = True) -> Worker:
        job = Job(name, BACKENDS[name], bundle, Options(threads=1, folded=folded))
        worker = Worker(job, timeout_s, tmp_path)
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.kill()


def failure_of(action: Callable[[], Reply]) -> WorkerFailure:
    with pytest.raises(WorkerFailure) as caught:
        action()
    return caught.value


def test_a_life_from_loading_to_closing(start: Start, small_bundle: Path) -> None:
    worker = start("onnx-cpu")
    loaded = worker.receive()
    assert isinstance(loaded, Loaded)
    assert loaded.settings["intra_op_threads"] == 1
    assert sum(loaded.placement.nodes.values()) > 5

    pid = worker._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)  # as Ctrl-C does to the whole group: what it means, the parent decides
    oracle = Bundle.open(small_bundle).oracle()
    (logits,) = worker.ask(Evaluate(77), Evaluated).outputs
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, oracle.logits, atol=1e-4)

    assert worker.ask(Prepare(3), Prepared).warm_up.calls >= 10
    measured = worker.ask(Measure(3, 0.01), Measured)
    assert [block.timing for block in measured.blocks] == ["device_resident", "end_to_end"]
    assert all(min(block.durations_ns) > 0 for block in measured.blocks)
    assert measured.blocks[0].started_at_monotonic_ns < measured.blocks[1].started_at_monotonic_ns

    worker.send(Close())
    worker.join()
    assert worker._process.exitcode == 0


def test_batches_larger_than_the_oracle_start_again_from_its_first_image(start: Start) -> None:
    worker = start("onnx-cpu")
    worker.receive()
    assert worker.ask(Measure(301, 0.001), Measured).blocks


def test_waiting_costs_no_cpu(start: Start) -> None:
    """An idle worker blocks on its pipe, its runtime's threads asleep; the parent blocks on the worker."""
    worker = start("onnx-cpu")
    worker.receive()
    worker.ask(Measure(64, 0.01), Measured)
    child = psutil.Process(worker._process.pid)
    before, own = sum(child.cpu_times()[:2]), time.process_time()
    time.sleep(0.5)
    assert sum(child.cpu_times()[:2]) - before <= 0.02
    assert time.process_time() - own < 0.02


def test_without_a_bundle_it_only_says_whether_it_could(start: Start) -> None:
    assert isinstance(start("onnx-cpu", bundle=None).receive(), Available)
    reply = start("unavailable", bundle=None).receive()
    assert reply == Unavailable("there is no such accelerator. Plug one in.")


def test_a_crash_is_told_with_its_signal_and_last_words(start: Start) -> None:
    worker = start("crashing")
    assert isinstance(worker.receive(), Loaded)
    failure = failure_of(lambda: worker.ask(Evaluate(100), Evaluated))
    assert failure.kind == "crashed"
    assert "SIGABRT" in str(failure)
    assert "the last words of a library" in failure.trace


def test_a_process_that_ends_while_loading_is_a_crash(start: Start) -> None:
    failure = failure_of(start("dying").receive)
    assert failure.kind == "crashed"
    assert "exit code 7" in str(failure)


def test_a_process_killed_between_two_requests_is_a_crash(start: Start) -> None:
    worker = start("onnx-cpu")
    worker.receive()
    pid = worker._process.pid
    assert pid is not None
    os.kill(pid, 9)
    worker._process.join()
    failure = failure_of(lambda: worker.ask(Evaluate(100), Evaluated))
    assert failure.kind == "crashed"
    assert "SIGKILL" in str(failure)
    assert "memory" in str(failure)


def test_a_hang_ends_at_the_time_limit_and_so_does_the_process(start: Start) -> None:
    worker = start("hanging", timeout_s=20)
    assert isinstance(worker.receive(), Loaded)
    worker._timeout_s = 0.5  # loading may take longer than a test wants to wait for a hang
    began = time.monotonic()
    failure = failure_of(lambda: worker.ask(Evaluate(100), Evaluated))
    assert failure.kind == "hung"
    assert time.monotonic() - began < 5
    assert not worker._process.is_alive()


@pytest.mark.parametrize(("name", "loading"), [("raising", False), ("unloadable", True)])
def test_an_error_is_told_with_its_traceback(name: str, loading: bool, start: Start) -> None:
    worker = start(name)
    if not loading:
        assert isinstance(worker.receive(), Loaded)
        worker.send(Evaluate(100))
    failure = failure_of(worker.receive)
    assert failure.kind == "raised"
    assert failure.loading is loading
    assert str(failure).startswith("RuntimeError: ")
    assert "Traceback" in failure.trace


def test_an_altered_file_is_a_bad_bundle(start: Start, tampered: Callable[..., Path]) -> None:
    bundle = tampered()
    path = bundle / "model.onnx"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    reply = start("onnx-cpu", bundle=bundle).receive()
    assert isinstance(reply, BadBundle)
    assert "model.onnx was altered" in reply.message


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_every_thread_is_pinned() -> None:
    """In a process of its own, with a thread that was there before."""
    code = (
        "import os, threading; from bench.worker.serve import pin\n"
        "done = threading.Event(); thread = threading.Thread(target=done.wait); thread.start()\n"
        "cpu = min(os.sched_getaffinity(0)); pin((cpu,))\n"
        "on = [os.sched_getaffinity(int(t)) for t in os.listdir('/proc/self/task')]\n"
        "print(all(cpus == {cpu} for cpus in on), len(on) > 1); done.set()"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "True True"

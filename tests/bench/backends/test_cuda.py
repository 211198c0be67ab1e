"""What only a GPU can show: arithmetic, bindings, captured graphs, clocks, placement, backends that share one GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from plans import small_plan
from verdicts import judge

from bench.backends.contract import Options, Profile
from bench.backends.registry import BACKENDS, find_backend
from bench.errors import EXIT_UNAVAILABLE, BenchError
from bench.results.schema import Result
from bench.run.plan import Plan
from bench.run.rounds import run
from bench.worker.clock import timed_block
from export.bundle import Bundle

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = [name for name in BACKENDS if name.endswith("-cuda") and name != "aoti-cuda"]  # which needs a file of its own
TF32 = [name for name in ON_GPU if name != "compile-cuda"]  # whose kernels the compiler chooses


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return Bundle.open(small_bundle)


def load(name: str, bundle: Bundle, **options: Any) -> Any:
    backend = find_backend(name)
    assert (reason := backend.unavailable_reason()) is None, reason
    folded = not backend.reference
    return backend.load(bundle, Options(threads=1, **({"folded": folded} | options)))


def logits_of(session: Any, bundle: Bundle, batch_size: int = 100) -> np.ndarray:
    raw = bundle.oracle().raw
    parts = [raw[start : start + batch_size].copy() for start in range(0, len(raw), batch_size)]
    return np.concatenate([session.fetch(session.run(session.prepare(part)))[0] for part in parts])


@pytest.mark.parametrize("name", ON_GPU)
def test_strict_is_float32_and_fast_stays_within_its_band(name: str, bundle: Bundle) -> None:
    errors = {}
    for profile in Profile:
        session = load(name, bundle, profile=profile)
        verdict = judge(logits_of(session, bundle, 192), bundle.oracle(), bundle.manifest.tolerances, profile)
        assert verdict.passed, verdict.failures
        errors[profile] = verdict.rms_error_in_float32_errors
        session.close()
    assert errors[Profile.STRICT] is not None
    assert errors[Profile.FAST] is not None
    if name in TF32:  # else `fast` would have measured float32 and said TF32
        assert errors[Profile.FAST] > 10 * errors[Profile.STRICT]


@pytest.mark.parametrize("name", ON_GPU)
def test_a_second_batch_in_the_same_memory_is_computed_anew(name: str, bundle: Bundle) -> None:
    session, oracle = load(name, bundle), bundle.oracle()
    limit = 20 * bundle.manifest.tolerances.float32_rms_error
    for start in (0, 7, 100, 0):
        raw = oracle.raw[start : start + 7].copy()
        found = session.fetch(session.run(session.prepare(raw)))[0]
        assert np.abs(found - oracle.logits[start : start + 7]).max() < limit
    session.close()


def test_a_captured_graph_computes_what_the_eager_program_does(bundle: Bundle) -> None:
    for folded in (True, False):
        captured, eager = load("graph-cuda", bundle, folded=folded), load("torch-cuda", bundle, folded=folded)
        limit = 4 * bundle.manifest.tolerances.float32_rms_error
        for batch_size in (1, 33):
            difference = logits_of(captured, bundle, batch_size) - logits_of(eager, bundle, batch_size)
            assert np.sqrt(np.mean(difference**2)) < limit


@pytest.mark.parametrize("folded", [True, False])
def test_onnxruntime_reads_and_writes_memory_on_the_gpu(folded: bool, bundle: Bundle) -> None:
    session = load("onnx-cuda", bundle, folded=folded)
    prepared = session.prepare(bundle.oracle().raw[:64].copy())
    assert prepared.tensor.is_cuda
    assert prepared.logits.is_cuda
    for _ in range(3):  # the first calls allocate and capture, the last one replays
        prepared.logits.fill_(float("nan"))
        torch.cuda.synchronize()
        session.run(prepared)
        assert bool(prepared.logits.isfinite().all()), "the result is not where it was bound to"
    assert session.settings()["cuda_graph"] is True
    assert session.settings()["CUDAExecutionProvider.enable_cuda_graph"] == "1"
    session.close()


def test_the_host_clock_sees_what_the_gpu_clock_sees(bundle: Bundle) -> None:
    """A kernel that only waits: how long is known from the GPU's own clock, and must be what a timed block says."""
    session = load("graph-cuda", bundle)
    memory = session._memory
    cycles = 20_000_000  # some ten milliseconds

    def wait() -> None:
        memory.complete(lambda: torch.cuda._sleep(cycles))

    block = timed_block(wait, "device_resident", 0.3, gpu_ns=memory.gpu_ns)
    host, gpu = statistics.median(block.durations_ns), statistics.median(block.gpu_durations_ns)
    assert gpu > 1e6
    assert host == pytest.approx(gpu, rel=0.03)


def test_a_call_that_does_not_wait_would_show(bundle: Bundle) -> None:
    """The control of the test above: the same kernel, only queued, takes the host next to nothing."""
    memory = load("graph-cuda", bundle)._memory

    def queue() -> None:
        with torch.cuda.stream(memory.stream):
            torch.cuda._sleep(2_000_000)

    block = timed_block(queue, "device_resident", 0.001)
    torch.cuda.synchronize()
    assert statistics.median(block.durations_ns) < 0.5e6


def test_a_node_that_cuda_does_not_have_is_no_row(tampered: Callable[..., Path], plan: Callable[..., Plan]) -> None:
    def lengthen(path: Path) -> None:
        model = onnx.load(str(path))
        (last,) = [node for node in model.graph.node if "logits" in node.output]
        last.output[list(last.output).index("logits")] = "before"
        model.graph.node.append(helper.make_node("Asinh", ["before"], ["logits"], name="on_the_cpu"))
        onnx.save(model, str(path))

    altered = tampered("model.onnx", lengthen)
    with pytest.raises(BenchError, match="on_the_cpu") as caught:
        run(plan(bundles=(altered,), backends=("onnx-cuda",)), lambda what, done: None)
    assert caught.value.exit_code == EXIT_UNAVAILABLE


@pytest.fixture(scope="module")
def together(small_bundle: Path) -> Iterator[Result]:
    """Three backends on one GPU, of which one asks for more memory than there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        patch.setitem(BACKENDS, "hungry", "faulty_backends:HUNGRY")
        yield measured(small_bundle, "hungry", "graph-cuda", "onnx-cuda")


def measured(bundle: Path, *backends: str) -> Result:
    survey = len(backends) > 1
    plan = small_plan(bundle, backends=backends, batch_sizes=(256,), rounds=5, block_s=0.05, survey=survey)
    return run(plan, lambda what, done: None)


def test_a_backend_that_runs_out_of_memory_leaves_the_others(together: Result) -> None:
    hungry, *others = together.subjects
    assert hungry.failure is not None
    assert hungry.failure.kind == "raised"
    assert "out of memory" in hungry.failure.message
    assert all(subject.failure is None for subject in others)
    assert {row.subject for row in together.rows} == {"graph-cuda", "onnx-cuda"}


def test_what_a_run_on_the_gpu_records(together: Result) -> None:
    for row in together.rows:
        assert row.gpu_latency_p50_ms is not None
        assert row.device_resident_latency_ms.p50 is not None
        assert 0 < row.gpu_latency_p50_ms < 1.5 * row.device_resident_latency_ms.p50
    _, graph, onnxruntime = together.subjects
    assert graph.placement is not None
    assert onnxruntime.placement is not None
    assert set(graph.placement.nodes) == {"cuda"}
    assert set(onnxruntime.placement.nodes) == {"CUDAExecutionProvider"}
    assert all(reading.gpus for reading in together.readings)
    assert together.survey is not None
    (peak,) = (peak for peak in together.survey.peaks if peak.device == "cuda")
    assert peak.host_to_device_bytes_per_s is not None
    assert peak.host_to_device_bytes_per_s > 1e9
    assert len(together.roofline) == len(together.rows)


def test_two_backends_on_one_gpu_do_not_disturb_each_other(together: Result, small_bundle: Path) -> None:
    """Alone, and in turns with another that holds the same GPU: what a call takes stays."""
    (alone,) = measured(small_bundle, "graph-cuda").rows
    (shared,) = (row for row in together.rows if row.subject == "graph-cuda")
    assert shared.device_resident_latency_ms.p50 == pytest.approx(alone.device_resident_latency_ms.p50, rel=0.1)

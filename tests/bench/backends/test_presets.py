"""onnxruntime's presets: each sets what it says, read back from its session, and pieces are put together right."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bench.backends import onnx as runtime
from bench.backends.contract import Options
from bench.backends.onnx import DEFAULT, Onnx, ParallelSession, Preset, open_session
from bench.backends.pieces import LARGEST, pieces
from bench.backends.registry import BACKENDS, find_backend
from export.bundle import Bundle

PRESETS = [name for name in BACKENDS if name.startswith("onnx-") and name.count("-") == 2]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return Bundle.open(small_bundle)


@pytest.mark.parametrize("images", [1, 2, 3, 16, 17, 31, 32, 33, 64, 255, 256])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pieces_cover_the_batch_once_and_occupy_every_thread(images: int, threads: int) -> None:
    found = pieces(images, threads)
    assert [place for piece in found for place in range(images)[piece]] == list(range(images))
    sizes = [piece.stop - piece.start for piece in found]
    assert max(sizes) <= LARGEST
    assert len(found) >= min(images, threads) or max(sizes) == -(-images // threads)


def test_presets_run_on_request_only() -> None:
    assert len(PRESETS) == 5
    assert all(find_backend(name).on_request for name in PRESETS)
    assert not find_backend("onnx-cpu").on_request


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("onnx-cpu", {"graph_optimization_level": "ORT_ENABLE_ALL", "spinning": True, "intra_op_threads": 2}),
        ("onnx-cpu-basic", {"graph_optimization_level": "ORT_ENABLE_BASIC", "spinning": True, "intra_op_threads": 2}),
        ("onnx-cpu-spinless", {"graph_optimization_level": "ORT_ENABLE_ALL", "spinning": False}),
        ("onnx-cpu-parallel", {"session_threads": 1, "intra_op_threads": 2}),
    ],
)
def test_a_preset_is_what_its_session_says(name: str, want: dict[str, Any], bundle: Bundle) -> None:
    session = find_backend(name).load(bundle, Options(threads=2))
    assert want.items() <= session.settings().items()
    session.close()


@pytest.mark.parametrize("images", [1, 2, 5, 37])
def test_the_pieces_of_a_batch_come_back_in_order(images: int, bundle: Bundle) -> None:
    oracle = bundle.oracle()
    session = find_backend("onnx-cpu-parallel").load(bundle, Options(threads=2))
    logits = session.fetch(session.run(session.prepare(oracle.raw[:images].copy())))[0]
    limit = 10 * bundle.manifest.tolerances.float32_rms_error
    assert np.abs(logits - oracle.logits[:images]).max() < limit
    session.close()


@dataclass
class Meeting:
    """A session in whose `run` two threads must meet, or it raises."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=10))

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.barrier.wait()
        (batch,) = feeds.values()
        return [batch.reshape(len(batch), -1)[:, :1]]


def test_two_threads_compute_at_the_same_time(bundle: Bundle) -> None:
    options = Options(threads=2)
    session = ParallelSession(Meeting(), bundle, options, find_backend("null").load(bundle, options).placement(), {})
    batch = np.arange(10 * 784, dtype=np.float32).reshape(10, 1, 28, 28)
    (found,) = session.run({bundle.manifest.input.name: batch})
    np.testing.assert_array_equal(found[:, 0], batch[:, 0, 0, 0])
    session.close()


def test_nhwc_is_asked_of_the_cuda_provider_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, providers, **kwargs: asked.append(providers))
    for preset in (Preset(nhwc=True), DEFAULT):
        open_session(b"", "cuda", Options(threads=1), preset)
    with_layout, without = ((providers[0][1], providers[1]) for providers in asked)
    assert with_layout == (without[0] | {"prefer_nhwc": "1"}, "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("preset", "attempts"), [(DEFAULT, [True, False]), (Preset(cuda_graph=False), [False])], ids=["default", "eager"]
)
def test_a_graph_is_captured_unless_the_preset_says_otherwise(
    preset: Preset, attempts: list[bool], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def refuse(path: str, device: str, options: Options, preset: Preset, provider_options: dict[str, str]) -> None:
        asked.append("enable_cuda_graph" in provider_options)
        raise RuntimeError("this model has control flow")

    memory = SimpleNamespace(stream=SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(runtime, "GpuMemory", lambda bundle, options: memory)
    monkeypatch.setattr(runtime, "open_session", refuse)
    with pytest.raises(RuntimeError, match="control flow"):
        Onnx("cuda", preset).load(bundle, Options(threads=1))
    assert asked == attempts

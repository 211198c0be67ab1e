"""Throughput of every available backend, end to end, for pytest-benchmark to store and compare.

`pytest --benchmark-only` runs these; a plain `pytest` skips them. The bundle is the one that `--bundle` names, else the
one in `artifacts/`, if it was exported, else the shortly trained one of the tests: time doesn't depend on the weights.

What is timed ends with the logits in host memory, so that on CUDA too the clock stops when the result is there: `run`
returns when it exists on the device (see `bench.backends.contract.Session`), and `fetch` copies it.

All in one process and without interleaving: right for one backend before and after a change. To compare backends with
each other there is `bench run`; for a small difference between two bundles, `bench ab`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.backends.contract import Options
from bench.backends.registry import BACKENDS, find_backend
from bench.machine.environment import usable_cpus
from export.bundle import Bundle

DEFAULT_BUNDLE = Path(__file__).parents[2] / "artifacts" / "bundles" / "article"


@pytest.fixture(scope="module")
def bundle(request: pytest.FixtureRequest) -> Bundle:
    exported = (DEFAULT_BUNDLE / "bundle.json").exists() and request.config.getoption("--bundle") is None
    return Bundle.open(DEFAULT_BUNDLE if exported else request.getfixturevalue("bundle_dir"))


@pytest.mark.parametrize("batch_size", [1, 256])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "null"])
def test_throughput(name: str, batch_size: int, bundle: Bundle, benchmark: BenchmarkFixture) -> None:
    backend = find_backend(name)
    reason = backend.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    kinds = {file.folded for file in bundle.manifest.files if file.format in backend.formats}
    if not kinds:
        pytest.skip(f"the bundle has no {backend.name} file")
    folded = True in kinds and not backend.reference
    session = backend.load(bundle, Options(threads=usable_cpus(), folded=folded))
    assert not session.placement().stray
    images = bundle.oracle().raw
    raw = images[np.arange(batch_size) % len(images)]

    def end_to_end() -> np.ndarray:
        return session.fetch(session.run(session.prepare(raw)))[0]

    for _ in range(10):  # every shape is searched for and compiled before the clock starts
        end_to_end()
    logits = benchmark(end_to_end)
    assert len(logits) == batch_size
    benchmark.extra_info["throughput_images_per_s"] = batch_size / benchmark.stats.stats.median
    session.close()

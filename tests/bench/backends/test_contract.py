"""The contract, over every registered backend: a new one is tested by its line in the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.backends.contract import Backend, Options, Profile
from bench.backends.registry import BACKENDS, brought, find_backend, registered
from bench.backends.torch_runtime import CpuMemory
from bench.errors import EXIT_USAGE, BenchError
from bench.run.plan import Plan
from bench.run.rounds import run
from export.bundle import Bundle, Preprocessing, TensorSpec

SLOW = {"compile-cpu"}  # a minute of compiling
KINDS = [
    pytest.param(name, folded, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in BACKENDS
    for folded in (True, False)
]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return Bundle.open(small_bundle)


def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def has_file(bundle: Bundle, backend: Backend, folded: bool) -> bool:
    return not backend.formats or any(
        file.format in backend.formats and file.folded == folded for file in bundle.manifest.files
    )


@pytest.mark.parametrize(("name", "folded"), KINDS)
def test_every_backend_keeps_the_contract(name: str, folded: bool, bundle: Bundle) -> None:
    backend = find_backend(name)
    reason = backend.unavailable_reason()
    if not has_file(bundle, backend, folded):
        if name.startswith("aoti"):
            pytest.skip("nothing is compiled ahead of time for the tests' bundle")
        pytest.fail(f"the bundle has no {'folded' if folded else 'unfolded'} {backend.name} file")
    if reason is not None:
        assert "ninefold[" in reason or (backend.device == "cuda" and not cuda_is_there())
        assert len(reason) > 40, "a reason and a remedy take more words than that"
        pytest.skip(reason)

    keeps_the_contract(backend, folded, bundle)


def keeps_the_contract(backend: Backend, folded: bool, bundle: Bundle) -> None:
    oracle = bundle.oracle()
    session = backend.load(bundle, Options(threads=1, folded=folded))
    sizes = (5, 2)
    first, second = (oracle.raw[:size].copy() for size in sizes)
    prepared = session.prepare(first)
    session.prepare(second)
    logits = session.fetch(session.run(prepared))[0]
    other = session.fetch(session.run(session.prepare(second)))[0]
    for found, size in zip((logits, other), sizes, strict=True):
        assert found.shape == oracle.logits[:size].shape
        assert found.dtype == np.float32
    np.testing.assert_array_equal(first, oracle.raw[:5])  # the user's array is not written to
    placement = session.placement()
    assert not placement.stray
    assert placement.evidence
    json.dumps(session.settings())
    if backend.formats:
        # Twenty times what float32 itself is off on average: any image is within, and no wrong computation is.
        limit = 20 * bundle.manifest.tolerances.float32_rms_error
        assert np.abs(logits - oracle.logits[:5]).max() < limit
        assert np.abs(other - oracle.logits[:2]).max() < limit
        assert sum(placement.nodes.values()) > 5
        assert session.settings()["intra_op_threads"] == 1
    session.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_what_the_table_says(name: str) -> None:
    backend = find_backend(name)
    assert backend.name == name
    _runtime, device, *preset = name.split("-") if name != "null" else ("null", "none")
    assert device == backend.device
    assert not preset or backend.on_request


@pytest.mark.parametrize("name", ["torch-cpu", "torchscript-cpu", "onnx-cpu"])
def test_preparation_is_bit_identical_to_the_bundles_own(name: str, bundle: Bundle) -> None:
    raw = bundle.oracle().raw[:7].copy()
    session = find_backend(name).load(bundle, Options(threads=1, folded=name != "torch-cpu"))
    want = bundle.manifest.preprocessing.apply(raw, bundle.manifest.input.shape)
    prepared = session.prepare(raw)
    (found,) = prepared.values() if isinstance(prepared, dict) else prepared
    np.testing.assert_array_equal(np.asarray(found), want)


@pytest.mark.parametrize(
    ("dtype", "raw_shape", "input_shape", "mean", "std"),
    [
        ("uint8", (28, 28), ("batch", 1, 28, 28), (0.1307,), (0.3081,)),
        ("uint8", (3, 8, 8), ("batch", 3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("uint8", (3, 8, 8), ("batch", 3, "height", "width"), (0.5,), (0.25,)),
        ("float32", (3, 6, 6), ("batch", 3, 6, 6), (0.0,), (1.0,)),
        ("float32", (17,), ("batch", 17), (0.0,), (1.0,)),
        ("float32", (4, 5), ("batch", 4, 5), (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0)),
    ],
)
def test_torch_prepares_any_input_as_numpy_does(
    dtype: str,
    raw_shape: tuple[int, ...],
    input_shape: tuple[int | str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    bundle: Bundle,
) -> None:
    preprocessing = Preprocessing(
        raw=TensorSpec(name="raw", dtype=dtype, shape=("batch", *raw_shape)), scale=1 / 255, mean=mean, std=std
    )
    spec = TensorSpec(name="x", dtype="float32", shape=input_shape)
    manifest = bundle.manifest.model_copy(update={"preprocessing": preprocessing, "input": spec})
    other = Bundle(bundle.path, manifest, bundle.digest)
    raw = np.random.default_rng(0).integers(0, 256, (6, *raw_shape)).astype(dtype)
    (found,) = CpuMemory(other, Options(threads=1)).prepare(raw)
    want = preprocessing.apply(raw, input_shape)
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), want)


def test_profiles_switch_tf32_in_every_place_of_torch(bundle: Bundle) -> None:
    import torch

    for profile, want in ((Profile.FAST, True), (Profile.STRICT, False)):
        find_backend("torch-cpu").load(bundle, Options(threads=1, profile=profile, folded=False)).close()
        assert torch.backends.cuda.matmul.allow_tf32 is want
        assert torch.backends.cudnn.allow_tf32 is want
        torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))  # reads both switches, and raised on a mixture


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BenchError, match=r"unknown backend 'tensorflow'.*torch-cpu.*onnx-cuda.*null") as caught:
        find_backend("tensorflow")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package that brings a backend, and one that would take the place of one of ours."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "support" / "elsewhere"))
    brought.cache_clear()
    yield
    brought.cache_clear()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("folded", [True, False])
def test_another_packages_backend_keeps_the_contract(folded: bool, bundle: Bundle) -> None:
    backend = find_backend("numpy-cpu")
    assert list(registered()) == [*BACKENDS, "numpy-cpu"]
    assert find_backend("onnx-cpu").name == "onnx-cpu", "no package takes a name of ours"
    assert backend.unavailable_reason() is None
    keeps_the_contract(backend, folded, bundle)


@pytest.mark.usefixtures("elsewhere")
def test_another_packages_backend_runs_in_a_worker(plan: Callable[..., Plan]) -> None:
    found = run(plan(backends=("numpy-cpu",), batch_sizes=(), rounds=0), lambda what, done: None)
    (subject,) = found.subjects
    assert subject.parity is not None
    assert subject.parity.passed


def test_no_other_package_brings_any() -> None:
    assert list(registered()) == list(BACKENDS)

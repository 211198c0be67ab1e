"""torch's program compiled: a compilation for each shape, and packages that were compiled for another machine."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.backends.contract import Options
from bench.backends.registry import find_backend
from bench.backends.torch_aot import (
    BuiltForAnotherMachine,
    mismatches,
    read_placement,
    thread_mismatch,
    version_mismatch,
)
from bench.backends.torch_compiled import CompiledForEachShape, compiler_missing
from export.bundle import Bundle

TamperedBundle = Callable[..., Path]
HERE = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_DEVICE_KEY": "cpu"}

# As AOTInductor writes it, shortened.
SOURCES = """
extern "C"  void  cpp_fused_relu_1(const float* in_ptr0);
    cpp_fused_relu_1((const float*)(buf1.data_ptr()));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(arg14_1, features_0_weight, &temporary_reference(buf0)));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf13, classifier_0_bias));
"""


def test_more_shapes_than_torch_keeps_of_one_code_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[Any] = []

    def record(module: Any, **options: Any) -> Any:
        codes.append(type(module).forward.__code__)
        return module

    monkeypatch.setattr(torch, "compile", record)
    module = torch.fx.symbolic_trace(torch.nn.ReLU())
    compiled = CompiledForEachShape(module)
    for images in (*range(1, 11), 3, 7):
        batch = torch.randn(images, 4)
        torch.testing.assert_close(compiled(batch), batch.relu())
    assert len(codes) == 10
    assert len({id(code) for code in codes}) == 10


def test_without_a_compiler_the_reason_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    reason = find_backend("compile-cpu").unavailable_reason()
    assert reason is not None
    assert "needs a C++ compiler" in reason
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler_missing() is None


def test_a_package_of_this_machine_is_taken() -> None:
    assert list(mismatches(HERE, "cpu")) == []
    assert list(mismatches({}, "cpu")) == []  # says nothing of itself


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AOTI_PLATFORM": "beos"}, "platform beos, this is"),
        ({"AOTI_MACHINE": "riscv64"}, "machine riscv64, this is"),
        ({"AOTI_DEVICE_KEY": "cuda"}, "device key cuda, this is cpu"),
    ],
)
def test_a_package_of_another_machine_is_refused(change: dict[str, str], says: str) -> None:
    (problem,) = mismatches(HERE | change, "cpu")
    assert says in problem


def test_a_package_for_instructions_that_are_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False}, raising=False)
    assert list(mismatches(HERE | {"AOTI_CPU_ISA": "AVX2"}, "cpu")) == []
    (problem,) = mismatches(HERE | {"AOTI_CPU_ISA": "AVX512"}, "cpu")
    assert "a processor with avx512, which this one lacks" in problem


def test_another_torch_and_fixed_threads_are_refused() -> None:
    assert list(version_mismatch("2.14.0+cpu", "2.14.1")) == []
    assert len(list(version_mismatch("2.11.0", "2.14.1"))) == 1
    dynamic = "#pragma omp parallel num_threads(max_threads)"
    assert list(thread_mismatch(dynamic, 1)) == list(thread_mismatch("num_threads(2)", 2)) == []
    (problem,) = thread_mismatch("num_threads(2)", 1)
    assert "use 2 threads whatever is asked for, and 1 are asked for" in problem


def test_calls_of_the_sources_name_their_device() -> None:
    placement = read_placement(SOURCES, HERE, "cpu")
    assert placement.nodes == {"cpu": 3}
    assert placement.stray == ()
    stray = read_placement(SOURCES, HERE | {"AOTI_DEVICE_KEY": "cuda"}, "cuda").stray
    assert stray == ("3 calls of the package are made on cpu",)


@pytest.fixture(scope="module")
def package(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folded program compiled ahead of time, for any number of threads."""
    if (reason := compiler_missing()) is not None:
        pytest.skip(reason)
    bundle = Bundle.open(small_bundle)
    program = torch.export.load(str(bundle.locate(bundle.entry("pt2"))))
    made = tmp_path_factory.mktemp("aoti") / "model.aoti.pt2"
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(made), inductor_configs={"cpp.dynamic_threads": True}
    )
    return made


@pytest.fixture
def with_package(package: Path, tampered: TamperedBundle) -> Callable[..., Bundle]:
    def make(torch_version: str = torch.__version__) -> Bundle:
        content = package.read_bytes()
        entry = {
            "path": package.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "format": "aoti-cpu",
            "precision": "float32",
            "folded": True,
        }

        def add(fields: dict[str, Any]) -> None:
            fields["files"].append(entry)
            fields["environment"]["versions"]["torch"] = torch_version

        folder = tampered(manifest=add)
        (folder / package.name).write_bytes(content)
        return Bundle.open(folder)

    return make


@pytest.mark.slow
def test_a_real_package_computes_the_oracles_logits(with_package: Callable[..., Bundle]) -> None:
    bundle = with_package()
    oracle = bundle.oracle()
    session = find_backend("aoti-cpu").load(bundle, Options(threads=1))
    placement = session.placement()
    assert placement.nodes["cpu"] > 5
    assert not placement.stray
    assert session.settings()["intra_op_threads"] == 1
    for images in (1, 5):
        logits = session.fetch(session.run(session.prepare(oracle.raw[:images].copy())))[0]
        assert np.abs(logits - oracle.logits[:images]).max() < 10 * bundle.manifest.tolerances.float32_rms_error
    session.close()


@pytest.mark.slow
def test_a_real_package_of_another_torch_is_refused(with_package: Callable[..., Bundle]) -> None:
    with pytest.raises(BuiltForAnotherMachine, match=r"compiled by torch 1\.0\.0.*Export the bundle again"):
        find_backend("aoti-cpu").load(with_package("1.0.0"), Options(threads=1))

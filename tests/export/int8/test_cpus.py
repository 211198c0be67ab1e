"""What is said of an int8 file on kinds of CPU that this machine is not, and by which proof."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from int8_files import quantised_layer
from onnx import helper

from export.bundle import Oracle, Tolerances
from export.formats import openvino_file
from export.formats.onnx_file import runner
from export.int8 import cpus

RNG = np.random.default_rng(0)
TAKEN = RNG.random((30, 4, 5, 5), dtype=np.float32)


def file(path: Path, largest: int) -> Path:
    weights = RNG.choice([-largest, largest], (8, 4, 3, 3))
    return quantised_layer(path, helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv"), weights, ["n", 4, 5, 5])


def proofs(path: Path, here: str | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(cpus, "kind_here", lambda: here)
    (outputs,) = runner(path, optimised=True)(TAKEN)
    of = cpus.of_onnx if path.suffix == ".onnx" else cpus.of_openvino
    return {kind: found.proof for kind, found in of(path, TAKEN, outputs)}


@pytest.mark.parametrize(
    ("here", "safe", "unsafe"),
    [
        ("vnni", ["same integers", "run", "same integers", "same integers"], "emulated"),
        ("avx2", ["run", "same integers", "same integers", "same integers"], "unsaturated run"),
        ("arm-dot", ["same integers", "same integers", "run", "same integers"], "emulated"),
        (None, ["same integers"] * 4, "not proved"),
    ],
)
def test_by_which_proof(
    here: str | None, safe: list[str], unsafe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(proofs(file(tmp_path / "safe.onnx", 64), here, monkeypatch).values()) == safe
    found = proofs(file(tmp_path / "unsafe.onnx", 127), here, monkeypatch)
    assert found["vnni" if here == "avx2" else "avx2"] == unsafe
    if here == "avx2":
        assert found == {"avx2": "run", "vnni": unsafe, "arm-dot": unsafe, "wasm": unsafe}
    elif here is not None:
        assert {proof for kind, proof in found.items() if kind not in ("avx2", here)} == {"same integers"}


def test_a_file_that_saturates_is_wrong_there_and_right_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "kind_here", lambda: "vnni")
    path = file(tmp_path / "m.onnx", 127)
    # What integers that don't overflow come to, whatever this machine's do.
    (outputs,) = cpus.unsaturated(path)(TAKEN)
    oracle = Oracle(TAKEN, None, outputs.astype(np.float64))
    found = dict(cpus.of_onnx(path, TAKEN, outputs))
    tolerances = Tolerances(float32_rms_error=1e-6)
    there = cpus.verdict("avx2", found["avx2"], oracle, tolerances)
    assert (there.passed, there.proof, there.layers) == (False, "emulated", ("conv",))
    assert there.failures
    assert cpus.verdict("vnni", found["vnni"], oracle, tolerances).passed
    unknown = cpus.verdict("wasm", cpus.Elsewhere("not proved", None), oracle, tolerances)
    assert unknown.passed is None


def test_the_kind_of_this_machine() -> None:
    """By the kernel's own list of what the CPU can."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" not in flags:
        pytest.skip("no x86 with AVX2")
    assert cpus.kind_here() == ("vnni" if {"avx512_vnni", "avx_vnni"} & set(flags) else "avx2")


# OpenVINO's kernels for AVX2 run on newer CPUs too, if oneDNN is told before it is loaded.
RUN = """
import sys, numpy, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
kinds = {str(op.get_rt_info()["primitiveType"].astype(str)) for op in model.get_runtime_model().get_ordered_ops()}
assert any("avx2" in kind for kind in kinds), kinds
numpy.save(sys.argv[3], model(numpy.load(sys.argv[2]))[0])
"""


@pytest.mark.skipif(openvino_file.missing() is not None, reason=str(openvino_file.missing()))
def test_openvino_with_avx2_alone(tmp_path: Path) -> None:
    """Its kernels for AVX2 come to what integers without overflow do where no weights can saturate, and only there."""
    for largest in (64, 127):
        path = tmp_path / f"{largest}.xml"
        openvino_file.write(file(tmp_path / "m.onnx", largest), path)
        assert bool(openvino_file.saturating(path)) == (largest == 127)
        bright = np.maximum(TAKEN, np.float32(0.9))
        np.save(tmp_path / "x.npy", bright)
        limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
        command = [sys.executable, "-c", RUN, str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
        subprocess.run(command, env=limited, check=True)
        apart = np.abs(np.load(tmp_path / "y.npy") - cpus.unsaturated(tmp_path / "m.onnx")(bright)).max()
        assert (apart > 0.5) == (largest == 127)  # the outputs' step is 0.5

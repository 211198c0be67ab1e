"""Whether an int8 file is right on the kinds of CPU that this machine is not, and how that is known.

Owns the reasoning from what ran here to what runs elsewhere. x86 without VNNI adds up two products in 16 bits, with
saturation; the other kinds add up in 32 bits, in which nothing overflows, so that they come to the same integers.
What is no integer is rounded a little differently everywhere; the limits are made for that.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle import Oracle, Tolerances
from export.bundle.int8 import CPU_KINDS, CpuKind, CpuVerdict, Proof
from export.bundle.rows import Rows
from export.bundle.verdict import judge
from export.formats import onnx_file, openvino_file
from export.formats.running import Run, run_in_batches
from export.int8.layers import integer_layers, optimised
from export.int8.saturating import NotEmulated, SaturatingFile

SATURATES: CpuKind = "avx2"
EMULATED_INPUTS = 1_000
BATCH = 100


@functools.cache  # it asks the system for a second
def kind_here() -> CpuKind | None:
    """Which kind this machine's CPU is; None where it is none of them."""
    import cpuinfo

    flags = set(cpuinfo.get_cpu_info().get("flags", ()))
    if platform.machine().lower() in ("x86_64", "amd64"):
        return "vnni" if flags & {"avx512_vnni", "avx512vnni", "avx_vnni"} else "avx2" if "avx2" in flags else None
    return "arm-dot" if "asimddp" in flags or platform.machine() == "arm64" else None


@dataclass(frozen=True)
class Elsewhere:
    """A file's outputs, float64 [n, …] for the oracle's first inputs, as another kind of CPU computes them."""

    proof: Proof
    outputs: np.ndarray | None
    layers: tuple[str, ...] = ()


def of_onnx(path: Path, taken: Rows, outputs: np.ndarray) -> Iterator[tuple[CpuKind, Elsewhere]]:
    """What an ONNX file comes to on each kind of CPU; `outputs` are this machine's for the inputs `taken`."""
    here = kind_here()
    names = tuple(layer.name for layer in integer_layers(optimised(path)) if layer.saturating.any())
    exact = run_in_batches(unsaturated(path), (taken,), BATCH)[0] if names and here == SATURATES else None
    for kind in CPU_KINDS:
        if kind == here:
            yield kind, Elsewhere("run", outputs)
        elif not names or (here is not None and SATURATES not in (here, kind)):
            yield kind, Elsewhere("same integers", outputs)
        elif here == SATURATES:
            yield kind, Elsewhere("unsaturated run", exact)
        else:
            yield kind, _emulated(path, taken, names) if here is not None else Elsewhere("not proved", None, names)


def of_openvino(path: Path, taken: Rows, outputs: np.ndarray) -> Iterator[tuple[CpuKind, Elsewhere]]:
    """The same for OpenVINO's, which knows no mode that never saturates. In a browser there is none, and which of its
    kernels run on ARM was not looked at.
    """
    here = kind_here()
    names = openvino_file.saturating(path)
    x86: tuple[CpuKind, ...] = ("avx2", "vnni")
    for kind in x86:
        if kind == here:
            yield kind, Elsewhere("run", outputs)
        elif not names and here in x86:
            yield kind, Elsewhere("same integers", outputs)
        else:
            yield kind, Elsewhere("not proved", None, names)
    yield "arm-dot", Elsewhere("run", outputs) if here == "arm-dot" else Elsewhere("not proved", None)


def _emulated(path: Path, taken: Rows, names: tuple[str, ...]) -> Elsewhere:
    try:
        return Elsewhere("emulated", run_in_batches(SaturatingFile(path), (taken[:EMULATED_INPUTS],), BATCH)[0], names)
    except NotEmulated:
        return Elsewhere("not proved", None, names)


def verdict(kind: CpuKind, found: Elsewhere, oracle: Oracle, tolerances: Tolerances) -> CpuVerdict:
    """Whether those outputs are right."""
    if found.outputs is None:
        return CpuVerdict(cpu=kind, proof=found.proof, layers=found.layers)
    judged = judge(found.outputs, oracle.first(len(found.outputs)), tolerances, "int8")
    return CpuVerdict(
        cpu=kind,
        proof=found.proof,
        passed=judged.passed,
        failures=judged.failures,
        rms_error_percent=judged.rms_error_percent,
        flips=None if judged.flips is None else len(judged.flips),
        images=judged.images,
        layers=found.layers,
    )


def unsaturated(path: Path) -> Run:
    """An ONNX file on x86, with products added up in 32 bits; on a CPU with VNNI that is how it runs anyway."""
    return onnx_file.runner(path, optimised=True, entries={"session.x64quantprecision": "1"})

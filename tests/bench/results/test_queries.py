"""Which parts of a result count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.cli.exit_codes import cpus_exit_code
from bench.cli.measure import CpuChoice
from bench.results.queries import on_cpus
from bench.results.schema import Result
from export.bundle import Bundle, CpuVerdict
from export.bundle.int8 import CPU_KINDS

RIGHT = CpuVerdict(cpu="avx2", proof="same integers", passed=True)
WRONG = CpuVerdict(cpu="vnni", proof="emulated", passed=False, failures=("its error is large",))
UNKNOWN = CpuVerdict(cpu="arm-dot", proof="not proved")
ALL: Any = ("avx2", "vnni", "arm-dot", "wasm")


def test_the_option_knows_every_kind_of_cpu() -> None:
    """It spells them out, since --help doesn't wait for what knows them."""
    assert tuple(choice for choice in CpuChoice if choice is not CpuChoice.ALL) == CPU_KINDS


@pytest.mark.parametrize(
    ("stated", "asked", "found", "code"),
    [
        ((RIGHT,), ("avx2",), [RIGHT], 0),
        ((RIGHT, WRONG), ("avx2",), [RIGHT], 0),
        ((RIGHT, WRONG), ALL, [RIGHT, WRONG], 1),
        ((RIGHT, UNKNOWN), ALL, [RIGHT, UNKNOWN], 5),
        ((WRONG, UNKNOWN), ALL, [WRONG, UNKNOWN], 1),
        ((RIGHT,), ("wasm",), [], 0),  # the file's runtime is not for it
        ((), ("avx2", "wasm"), [CpuVerdict(cpu=cpu, proof="not proved") for cpu in ("avx2", "wasm")], 5),
        ((RIGHT, WRONG), (), [], 0),
    ],
)
def test_what_a_bundle_says_of_other_kinds_of_cpu(
    stated: tuple[CpuVerdict, ...],
    asked: Any,
    found: list[CpuVerdict],
    code: int,
    result: Result,
    small_bundle: Path,
) -> None:
    """Of the int8 files that ran, here one; the others are float32 or did not run."""
    bundle = Bundle.open(small_bundle)
    real = bundle.entry("onnx")
    int8 = real.model_copy(update={"precision": "int8", "cpus": stated})
    absent = int8.model_copy(update={"path": "model.int8-raw.onnx", "takes": "raw", "cpus": (WRONG,)})
    files = (*(file for file in bundle.manifest.files if file.path != real.path), int8, absent)
    altered = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
    assert [verdict for _, verdict in on_cpus(result, altered, asked)] == found
    assert {path for path, _ in on_cpus(result, altered, asked)} <= {real.path}
    assert cpus_exit_code(found) == code

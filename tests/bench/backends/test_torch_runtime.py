"""Which precisions torch only emulates, by the instructions of processors that this machine is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from bench.backends.contract import Options, Placement
from bench.backends.torch_runtime import TorchSession, emulation
from export.bundle import Bundle

X86 = ("avx512_f", "avx_ne_convert", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "avx10_2")
ARM = ("neon", "fp16_arith", "bf16")
LACKING, NATIVE = "no instructions", None


def cpu(every: tuple[str, ...], *has: str) -> Mapping[str, object]:
    """What torch says of a processor that has those of every instruction set of its kind."""
    return MappingProxyType({name: name in has for name in every} | {"architecture": "a kind"})


@pytest.mark.parametrize(
    ("capabilities", "bfloat16", "float16"),
    [
        (cpu(X86), LACKING, LACKING),
        (cpu(X86, "avx512_f"), LACKING, LACKING),  # oneDNN takes bfloat16 there, and computes in float32
        (cpu(X86, "avx_ne_convert"), LACKING, LACKING),  # which converts, and does no more
        (cpu(X86, "avx512_f", "avx512_bf16"), NATIVE, LACKING),
        (cpu(X86, "avx512_f", "avx512_bf16", "avx512_fp16"), NATIVE, LACKING),  # of these oneDNN uses the conversions
        (cpu(X86, "avx512_f", "amx_bf16"), NATIVE, LACKING),
        (cpu(X86, "avx512_f", "avx512_bf16", "amx_bf16", "amx_fp16"), NATIVE, NATIVE),
        (cpu(X86, "avx10_2"), NATIVE, NATIVE),
        (cpu(ARM, "neon"), LACKING, LACKING),
        (cpu(ARM, "neon", "fp16_arith"), LACKING, NATIVE),
        (cpu(ARM, *ARM), NATIVE, NATIVE),
        (cpu(()), NATIVE, NATIVE),  # torch knows nothing of it
    ],
)
def test_what_a_processor_lacks_is_emulated(
    capabilities: Mapping[str, object],
    bfloat16: str | None,
    float16: str | None,
    small_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU nothing is, and of float32 and int8 nothing is asked. A session says so of its file."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    bundle, placement = Bundle.open(small_bundle), Placement(nodes={"cpu": 1}, evidence="none")
    for variant, why in {"bfloat16": bfloat16, "float16-raw": float16, "float32": None, "int8": None}.items():
        assert emulation("cpu", variant) == why, variant
        assert emulation("cuda", variant) is None
        session = TorchSession(torch.nn.Identity(), bundle, "cpu", Options(1, variant=variant), placement, {})
        assert session.placement() == Placement(nodes={"cpu": 1}, evidence="none", emulated=why)

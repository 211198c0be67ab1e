"""What a bundle says of its int8 files: where their error comes from, and on which kinds of CPU they are proved right.

Owns these records and the kinds of CPU. Imports no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

from export.bundle.frozen import Frozen, NotNegative

CpuKind = Literal["avx2", "vnni", "arm-dot", "wasm"]
"""By how products of 8 bits are added up: `avx2` is x86 without VNNI, AVX-512 included, and adds up two in 16 bits with
saturation; `vnni` is x86 with it, AMX included; `arm-dot` are ARM's dot products and `wasm` WebAssembly's. These three
add up in 32 bits."""
Proof = Literal["run", "same integers", "emulated", "unsaturated run", "not proved"]
"""`run`: the file ran on such a CPU. `same integers`: it ran on another kind which comes to the same sums: neither
saturates, or none of the file's sums can. `emulated`: the sums of two products were computed in 16 bits. `unsaturated
run`: it ran on another kind in a mode that adds up in more than 16 bits."""


CPU_KINDS: tuple[CpuKind, ...] = get_args(CpuKind)
CPU_WORDS: dict[CpuKind, str] = {
    "avx2": "x86 without VNNI",
    "vnni": "x86 with VNNI",
    "arm-dot": "ARM, dot products",
    "wasm": "WebAssembly",
}


class Int8Layer(Frozen):
    """A layer that may be int8. `name` is its node's in the file, `weights` that of its weights in the model.

    `error_percent` is the file's error with this layer in float and all others int8; `multiply_adds_percent` is its
    share of the network's products. `in_float` says that the file has it in float.
    """

    name: str
    weights: str
    error_percent: NotNegative
    multiply_adds_percent: NotNegative
    in_float: bool


class Int8Layers(Frozen):
    """Where an int8 file's error comes from; first the layers that win most in float.

    Errors are RMS, in percent of the spread of the float32 file's outputs, on `inputs` calibration inputs that no range
    was taken from where there were enough: `error_percent` of the file, `all_int8_error_percent` with no layer in
    float. `top1_drop_points` is by how many points of 100 its top-1 is lower, where labels are known.
    """

    error_percent: NotNegative
    all_int8_error_percent: NotNegative
    top1_drop_points: float | None = None
    inputs: int
    layers: tuple[Int8Layer, ...]


class CpuVerdict(Frozen):
    """Whether an int8 file is right on a kind of CPU, and how that is known.

    `passed` is None where it is not known; `failures` are the limits that are broken, in words, `rms_error_percent` is
    in percent of the spread of the oracle's outputs, `images` how many were compared, `layers` those whose sums can
    saturate there.
    """

    cpu: CpuKind
    proof: Proof
    passed: bool | None = None
    failures: tuple[str, ...] = ()
    rms_error_percent: float | None = None
    flips: int | None = None
    images: int = 0
    layers: tuple[str, ...] = ()

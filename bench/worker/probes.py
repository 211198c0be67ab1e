"""What is tried to see the best of a device: products, convolutions and copies, by each runtime that is there.

Owns their sizes and how they are timed. No single one is a peak: on an AMD processor rows of onnxruntime reached 147 %
of what one float32 product of torch does, while on the processor below torch's is the best. Whatever a runtime can't do
is passed over.

Measured on two cores of an Intel Xeon (AVX-512 with VNNI and FP16), in GFLOP/s, int8 in Gop/s: torch's float32 products
of the three sizes 421, 371 and 349, its convolution 419 with the channels last and 342 without; onnxruntime's product
338 and convolution 326, OpenVINO's 333 and 295; int8 1,198 and 994, 1,400 and 961; torch's product in float16 391, in
bfloat16 183. Copies of 256 KiB, 1, 4, 16 and 64 MiB: 113, 156, 63, 63 and 57 GB/s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from bench.backends.contract import Options, Profile
from bench.results.roofline import RooflineDevice

# Rows, inner size, columns.
PRODUCTS = {
    "cpu": ((512, 512, 512), (1024, 1024, 1024), (4096, 256, 256)),
    "cuda": ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (65536, 1024, 1024)),
}
# Images, channels in and out, height and width: the 3 × 3 of a ResNet.
CONVOLUTIONS = {"cpu": (32, 64, 28), "cuda": (256, 64, 56)}
# From what stays in a core's cache to what comes from main memory.
COPY_BYTES = {
    "cpu": (2**18, 2**20, 2**22, 2**24, 2**26),
    "cuda": (2**22, 2**24, 2**26, 2**28, 2**30),
}
IN_CACHE_BYTES = (2**16, 2**18)
HOST_COPY_BYTES = 2**28
# How long a probe is repeated, and how long one timing of it lasts at least: the clock and a GPU's launch are felt
# below.
PROBE_S, TIMING_S = 0.06, 0.001
# A precision in which the first product is slower than this share of float32's is emulated: it is tried no further.
NATIVE_FROM = 0.25
# The narrower arithmetic that files of a precision may be computed in, beside float32.
NARROWER = {"float32": [], "float16": ["float16"], "bfloat16": ["bfloat16"], "int8": ["int8"]}


@dataclass(frozen=True)
class Best:
    """What a probe reached, in FLOP/s or bytes/s, and what it was."""

    per_s: float
    words: str


def arithmetic(device: RooflineDevice, precision: str, options: Options) -> Iterator[Best]:
    """What each product and each convolution in that arithmetic reaches, in FLOP/s; operations/s where it is int8."""
    if precision != "int8":
        yield from _by_torch(device, precision)
    elif device == "cuda":
        yield from _integers_on_gpu()
    if device == "cpu" and precision in ("float32", "int8"):
        for runtime, opened in (("onnxruntime", _in_onnxruntime), ("openvino", _in_openvino)):
            if find_spec(runtime) is not None and find_spec("onnx") is not None:
                yield from _by_runtime(runtime, opened, precision, options)


def narrower(device: RooflineDevice, precision: str, profile: Profile) -> tuple[str, ...]:
    """The arithmetics beside float32 that may run files of that precision. In profile fast OpenVINO takes bfloat16;
    what GPUs take is TF32, which torch's float32 probes take too.
    """
    fast = ["bfloat16"] if profile is Profile.FAST and device == "cpu" else []
    return tuple(dict.fromkeys(NARROWER[precision] + fast))


def copies(device: RooflineDevice) -> Iterator[Best]:
    """What copies reach, in bytes/s, reading and writing counted: torch's, and on the CPU NumPy's of what a core's
    cache holds. Those need one thread: while other programs kept the CPUs busy, torch's threads waited for each other.
    """
    import numpy as np
    import torch

    for size in IN_CACHE_BYTES if device == "cpu" else ():
        words = f"NumPy, a copy of {size / 2**20:g} MiB"
        read, written = (np.ones(size // 4, np.float32) for _ in range(2))
        yield from _tried(words, 2 * size, partial(np.copyto, written, read), device)
    for size in COPY_BYTES[device]:
        source, target = (torch.ones(size // 4, device=device) for _ in range(2))
        words = f"torch, a copy of {size / 2**20:g} MiB"
        yield from _tried(words, 2 * size, partial(target.copy_, source), device)


def host_to_device_bytes_per_s() -> float:
    """What a copy from pinned memory to the GPU reaches."""
    import torch

    pinned = torch.zeros(HOST_COPY_BYTES // 4, pin_memory=True)
    near = torch.zeros(HOST_COPY_BYTES // 4, device="cuda")
    return HOST_COPY_BYTES / _fastest(lambda: near.copy_(pinned, non_blocking=True), "cuda")


def _by_torch(device: RooflineDevice, precision: str) -> Iterator[Best]:
    import torch

    kind = getattr(torch, precision)

    def made(*shape: int) -> Any:
        return torch.randn(*shape, device=device).to(kind)

    for rows, inner, columns in PRODUCTS[device]:
        a, b, product = made(rows, inner), made(inner, columns), made(rows, columns)
        words = f"torch, a product of {rows} × {inner} × {columns} in {precision}"
        yield from _tried(words, 2 * rows * inner * columns, partial(torch.mm, a, b, out=product), device)
    images, channels, side = CONVOLUTIONS[device]
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight = (
            made(count, channels, size, size).to(memory_format=layout)
            for count, size in ((images, side), (channels, 3))
        )
        last = ", channels last" if layout is torch.channels_last else ""
        words = f"torch, {_convolution_words(device)} in {precision}{last}"
        yield from _tried(words, _convolution_flops(device), partial(torch.conv2d, x, weight, padding=1), device)


def _integers_on_gpu() -> Iterator[Best]:
    import torch

    for rows, inner, columns in PRODUCTS["cuda"]:
        a, b = (
            torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
            for shape in ((rows, inner), (inner, columns))
        )
        words = f"torch, a product of {rows} × {inner} × {columns} in int8"
        yield from _tried(words, 2 * rows * inner * columns, partial(torch._int_mm, a, b), "cuda")


Opened = Callable[[bytes, Any, Options], Callable[[], object]]
"""A model of ONNX, its input and the threads → a call that computes it."""


def _by_runtime(runtime: str, opened: Opened, precision: str, options: Options) -> Iterator[Best]:
    import numpy as np

    draw = np.random.default_rng(0)
    rows, inner, columns = PRODUCTS["cpu"][1]
    images, channels, side = CONVOLUTIONS["cpu"]
    picture, filters = (images, channels, side, side), (channels, channels, 3, 3)
    for operator, shapes, work, words in (
        (
            "MatMul",
            ((rows, inner), (inner, columns), (rows, columns)),
            2 * rows * inner * columns,
            f"a product of {rows} × {inner} × {columns}",
        ),
        ("Conv", (picture, filters, picture), _convolution_flops("cpu"), _convolution_words("cpu")),
    ):
        model = _one_operator(operator, shapes, precision)
        taken = draw.integers(0, 256, shapes[0])
        given = taken.astype(np.uint8 if precision == "int8" else np.float32)
        yield from _tried(
            f"{runtime}, {words} in {precision}", work, partial(opened, model, given, options), "cpu", opens=True
        )


def _one_operator(operator: str, shapes: tuple[tuple[int, ...], ...], precision: str) -> bytes:
    """An ONNX file of one operator with a constant weight; for int8 between quantised tensors, as quantisers write it,
    from which runtimes make their integer kernels.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    integers = precision == "int8"
    taken, weights, made = shapes
    draw = np.random.default_rng(0)
    weight = draw.integers(-127, 128, weights)
    attributes: dict[str, Any] = {"pads": [1, 1, 1, 1]} if operator == "Conv" else {}
    kind = TensorProto.UINT8 if integers else TensorProto.FLOAT
    if integers:
        constants = {
            "w": weight.astype(np.int8),
            "step": np.float32(0.02),
            "wide": np.float32(4.0),
            "middle": np.uint8(128),
            "zero": np.int8(0),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "step", "middle"], ["x_"]),
            helper.make_node("DequantizeLinear", ["w", "step", "zero"], ["w_"]),
            helper.make_node(operator, ["x_", "w_"], ["y_"], **attributes),
            helper.make_node("QuantizeLinear", ["y_", "wide", "middle"], ["y"]),
        ]
    else:
        constants = {"w": weight.astype(np.float32)}
        nodes = [helper.make_node(operator, ["x", "w"], ["y"], **attributes)]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", taken), ("y", made))]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _in_onnxruntime(model: bytes, given: Any, options: Options) -> Callable[[], object]:
    from bench.backends.onnx import open_session

    session = open_session(model, "cpu", options)
    return lambda: session.run(None, {"x": given})


def _in_openvino(model: bytes, given: Any, options: Options) -> Callable[[], object]:
    import openvino

    from bench.backends.openvino import DEVICE, configuration

    core: Any = openvino.Core()
    config = configuration(options, throughput=False)
    request = core.compile_model(core.read_model(model), DEVICE, config).create_infer_request()
    request.set_input_tensor(0, openvino.Tensor(given, shared_memory=True))
    return lambda: request.infer()


def _convolution_flops(device: RooflineDevice) -> int:
    images, channels, side = CONVOLUTIONS[device]
    return 2 * images * channels * channels * 9 * side * side


def _convolution_words(device: RooflineDevice) -> str:
    images, channels, side = CONVOLUTIONS[device]
    return f"a 3 × 3 convolution of {images} × {channels} × {side} × {side} to {channels} channels"


def _tried(
    words: str, work: int, call: Callable[[], Any], device: RooflineDevice, *, opens: bool = False
) -> Iterator[Best]:
    """What a probe reaches; nothing where the runtime can't do it. `opens`: `call` returns what is timed."""
    try:
        yield Best(work / _fastest(call() if opens else call, device), words)
    except Exception:  # of no common kind: no kernel, no memory, a file that this version can't read
        return


def _fastest(call: Callable[[], object], device: RooflineDevice) -> float:
    """The seconds of a call in the fastest of several timings, each complete on the device, after one that is not
    counted.
    """
    import torch

    def timing_s(calls: int) -> float:
        before = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - before) / calls

    timing_s(1)
    end = time.perf_counter() + PROBE_S
    fastest = timing_s(1)
    while time.perf_counter() < end:
        fastest = min(fastest, timing_s(max(1, round(TIMING_S / fastest))))
    return fastest

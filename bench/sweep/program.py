"""A few lines of Python that run one file of a bundle: what a user copies into a program of his own.

Owns that text, for each runtime. It needs the runtime and NumPy, and nothing of ninefold: no import, no bundle. Threads
and arithmetic are those of the measured session in profile strict. A CUDA graph, which `bench` captures where it can,
is left to the user: it ties a program to fixed batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.backends.contract import Device
from bench.backends.onnx import CONVOLUTION_SEARCH, SPINNING
from bench.backends.pieces import LARGEST
from export.bundle import Preprocessing, TensorSpec

Lines = tuple[list[str], list[str]]
"""What loads the file, and what runs it on `x`, a NumPy array."""


@dataclass(frozen=True)
class Runnable:
    """A file and how it is run. `input` is what it takes: the raw input itself where that is `preprocessing.raw`."""

    backend: str
    device: Device
    path: str
    threads: int
    input: TensorSpec
    output: TensorSpec
    preprocessing: Preprocessing


def snippet(what: Runnable) -> str:
    """A program that defines `logits`: raw input, as the bundle describes it, to float32 logits, in NumPy arrays."""
    load, run = RUNTIMES[runtime_of(what.backend, what.device)](what)
    raw = what.preprocessing.raw
    return "\n".join(
        [
            "import numpy as np",
            *load,
            "",
            "",
            f"def logits(raw):  # {raw.dtype} {_shape(raw)} -> float32 {_shape(what.output)}",
            *(f"    {line}" for line in (*_prepared(what), *run)),
            "",
        ]
    )


def runtime_of(backend: str, device: Device) -> str:
    """Which runtime a backend is of: its name without the device, ``onnx`` for ``onnx-cpu``."""
    return backend.replace(f"-{device}", "", 1)


def _prepared(what: Runnable) -> list[str]:
    """From the raw input to `x`."""
    preprocessing = what.preprocessing
    if what.input == preprocessing.raw:
        return ["x = np.ascontiguousarray(raw)"]
    taken, given = what.input.shape, preprocessing.raw.shape
    if all(isinstance(size, int) for size in taken[1:]):
        shaped = f"raw.reshape({', '.join(map(str, (-1, *taken[1:])))})"
    else:
        ones = "1, " * (len(taken) - len(given))
        shaped = f"raw.reshape(len(raw), {ones}*raw.shape[1:])"
    mean, std = (_constant(values, len(taken)) for values in (preprocessing.mean, preprocessing.std))
    return [
        f"x = {shaped}.astype(np.float32)",
        f"x = (x * np.float32({preprocessing.scale!r}) - {mean}) / {std}",
    ]


def _constant(values: tuple[float, ...], rank: int) -> str:
    """One value for all, or one for each channel, which is axis 1."""
    if len(values) == 1:
        return f"np.float32({values[0]!r})"
    return f"np.float32({list(values)!r}).reshape({', '.join(['1', '-1', *['1'] * (rank - 2)])})"


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _onnx(what: Runnable) -> Lines:
    return _onnx_session(what), [f"return {_onnx_call(what)}.astype(np.float32)"]


def _onnx_basic(what: Runnable) -> Lines:
    level = "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC"
    return _onnx_session(what, level), _onnx(what)[1]


def _onnx_spinless(what: Runnable) -> Lines:
    spinless = f'options.add_session_config_entry("{SPINNING}", "0")'
    return _onnx_session(what, spinless), _onnx(what)[1]


def _onnx_nhwc(what: Runnable) -> Lines:
    return _onnx_session(what, on_gpu={"prefer_nhwc": "1"}), _onnx(what)[1]


def _onnx_parallel(what: Runnable) -> Lines:
    """In pieces, as `bench.backends.pieces` cuts them, which as many threads of Python's share."""
    load = [
        "from concurrent.futures import ThreadPoolExecutor",
        "",
        *_onnx_session(replace(what, threads=1)),
        f"pool = ThreadPoolExecutor({what.threads})",
    ]
    run = [
        *_pieces(what),
        f"found = pool.map(lambda x: {_onnx_call(what)}, pieces)",
        "return np.concatenate(list(found)).astype(np.float32)",
    ]
    return load, run


def _onnx_session(what: Runnable, setting: str | None = None, on_gpu: dict[str, str] | None = None) -> list[str]:
    """Loads an ONNX file, with one more setting or options of the provider on a GPU."""
    provider = '"CPUExecutionProvider"'
    if what.device == "cuda":
        provider = f'("CUDAExecutionProvider", {json.dumps({"use_tf32": "0"} | CONVOLUTION_SEARCH | (on_gpu or {}))})'
    return [
        "import onnxruntime",
        "",
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads = {what.threads}",
        *([] if setting is None else [setting]),
        f"session = onnxruntime.InferenceSession({_text(what.path)}, options, providers=[{provider}])",
    ]


def _onnx_call(what: Runnable) -> str:
    return f"session.run([{_text(what.output.name)}], {{{_text(what.input.name)}: x}})[0]"


def _pieces(what: Runnable) -> list[str]:
    return [
        f"size = min({LARGEST}, -(-len(x) // {what.threads}))",
        "pieces = [x[start : start + size] for start in range(0, len(x), size)]",
    ]


def _openvino(what: Runnable) -> Lines:
    return _compiled(what, hint="LATENCY", streams=1), ["return model(x)[0].astype(np.float32)"]


def _openvino_throughput(what: Runnable) -> Lines:
    """In pieces, as `bench.backends.pieces` cuts them, of which the streams take one after the other."""
    run = [
        *_pieces(what),
        "found = [np.empty(0)] * len(pieces)",
        "queue.set_callback(lambda request, n: found.__setitem__(n, request.get_output_tensor().data.copy()))",
        "for n, piece in enumerate(pieces):",
        "    queue.start_async(piece, n)",
        "queue.wait_all()",
        "return np.concatenate(found).astype(np.float32)",
    ]
    return [*_compiled(what, hint="THROUGHPUT", streams=what.threads), "queue = openvino.AsyncInferQueue(model)"], run


def _compiled(what: Runnable, hint: str, streams: int) -> list[str]:
    """Loads an OpenVINO model for any batch size, where `bench` compiles it for each."""
    settings = {
        "PERFORMANCE_HINT": hint,
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": what.threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return [
        "import openvino",
        "",
        f"settings = {json.dumps(settings)}",
        f'model = openvino.compile_model({_text(what.path)}, "CPU", settings)',
    ]


def _program(what: Runnable) -> Lines:
    return _torch(what, [*_exported(what), "module = program.module()"])


def _compile(what: Runnable) -> Lines:
    how = "" if what.device == "cuda" else ", dynamic=False"  # as measured: on the CPU for each batch size
    return _torch(what, [*_exported(what), f"module = torch.compile(program.module(){how})"])


def _exported(what: Runnable) -> list[str]:
    """Loads a `torch.export` program. `.to` would move its weights only, not the constants of its graph."""
    load = [f"program = torch.export.load({_text(what.path)})"]
    if what.device == "cuda":
        load.append('program = torch.export.passes.move_to_device_pass(program, "cuda")')
    return load


def _torchscript(what: Runnable) -> Lines:
    return _torch(what, [f"module = torch.jit.load({_text(what.path)}, map_location={_text(what.device)})"])


def _aoti(what: Runnable) -> Lines:
    return _torch(what, [f"module = torch._inductor.aoti_load_package({_text(what.path)})"])


def _torch(what: Runnable, load: list[str]) -> Lines:
    """Of whatever `load` loads as `module`, and torch runs."""
    gpu = what.device == "cuda"
    place = '.to("cuda")' if gpu else ""
    settings = [f"torch.set_num_threads({what.threads})", *(["torch.backends.cudnn.allow_tf32 = False"] if gpu else [])]
    imports = ["import torch", *(["import torch.export.passes"] if any("passes" in line for line in load) else [])]
    run = [
        "with torch.inference_mode():",
        f"    logits = module(torch.from_numpy(x){place})",
        "return logits.float().cpu().numpy()",
    ]
    return [*imports, "", *settings, *load], run


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


RUNTIMES: dict[str, Callable[[Runnable], Lines]] = {
    "onnx": _onnx,
    "onnx-parallel": _onnx_parallel,
    "onnx-basic": _onnx_basic,
    "onnx-spinless": _onnx_spinless,
    "onnx-nhwc": _onnx_nhwc,
    "onnx-eager": _onnx,
    "openvino": _openvino,
    "openvino-throughput": _openvino_throughput,
    "torch": _program,
    "graph": _program,
    "compile": _compile,
    "aoti": _aoti,
    "torchscript": _torchscript,
}
"""By the name of a backend without its device."""

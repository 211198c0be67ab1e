"""Which backends there are: those of this package, and those that other packages bring.

A backend's file is imported when somebody asks for it, and its runtime when somebody uses it. Another package adds a
backend by an entry point of the group `ninefold.backends`, whose name is the backend's:

    [project.entry-points."ninefold.backends"]
    tvm-cpu = "ninefold_tvm:CPU"
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import cast

from bench.backends.contract import Backend
from bench.errors import EXIT_USAGE, BenchError

GROUP = "ninefold.backends"

# One line for each backend: its name, and where the object is.
BACKENDS: dict[str, str] = {
    "torch-cpu": "bench.backends.torch_program:CPU",
    "torch-cuda": "bench.backends.torch_program:CUDA",
    "graph-cuda": "bench.backends.torch_captured:GRAPH",
    "compile-cpu": "bench.backends.torch_compiled:CPU",
    "compile-cuda": "bench.backends.torch_captured:COMPILED",
    "aoti-cpu": "bench.backends.torch_aot:CPU",
    "aoti-cuda": "bench.backends.torch_aot:CUDA",
    "torchscript-cpu": "bench.backends.torch_script:CPU",
    "torchscript-cuda": "bench.backends.torch_script:CUDA",
    "onnx-cpu": "bench.backends.onnx:CPU",
    "onnx-cpu-parallel": "bench.backends.onnx:PARALLEL",
    "onnx-cpu-basic": "bench.backends.onnx:BASIC",
    "onnx-cpu-spinless": "bench.backends.onnx:SPINLESS",
    "onnx-cuda": "bench.backends.onnx:CUDA",
    "onnx-cuda-nhwc": "bench.backends.onnx:NHWC",
    "onnx-cuda-eager": "bench.backends.onnx:EAGER",
    "openvino-cpu": "bench.backends.openvino:LATENCY",
    "openvino-cpu-throughput": "bench.backends.openvino:THROUGHPUT",
    "null": "bench.backends.null:NULL",
}


def registered() -> dict[str, str]:
    """Every backend's name, and where the object is. This package's own come first, and no other takes their names."""
    return BACKENDS | {name: where for name, where in brought().items() if name not in BACKENDS}


@cache
def brought() -> dict[str, str]:
    """The backends of other packages that are installed."""
    from importlib.metadata import entry_points  # here: it takes longer than the rest of a `--help`

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def find_backend(name: str) -> Backend:
    """The backend of that name. Raises BenchError (usage) for a name that nobody registered, listing them."""
    where = BACKENDS.get(name) or registered().get(name)
    if where is None:
        raise BenchError(f"unknown backend {name!r}; there are: {', '.join(registered())}.", EXIT_USAGE)
    return resolve(where)


def resolve(reference: str) -> Backend:
    """The backend at ``module:attribute``. A worker process is handed this reference, not the object."""
    module, _, attribute = reference.partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute))

"""The bundle's `torch.export` program compiled by TorchInductor on the CPU, when a batch size is first seen.

Owns the compilations, one for each input shape. Measured with the article's network on two cores (torch 2.14, AVX-512),
folded, one image / batch 64 / batch 256, in ms, each in a process of its own on a machine that was not quiet:

    eager                                      1.04    13.2    63.0
    compiled for each shape                    0.88     8.0    27.1
    compiled once for any batch size           0.82     9.0    32.0
    for each shape, weights frozen             0.99     7.8    26.2

Freezing gains nothing here, and with channels_last besides the second shape's logits were off by 800: neither is used.
A compilation took 5 to 10 s, and 0.4 to 4 s where TorchInductor's cache had it.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import Backend, Device, Options, Program, Runnable, Server, file_path
from bench.backends.torch_lines import export_lines, torch_program
from bench.backends.torch_program import load_program
from bench.backends.torch_runtime import (
    TorchSession,
    configure_torch,
    torch_unavailable_reason,
)

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle, Format

# What TorchInductor calls where the environment names nothing else.
COMPILERS = {"darwin": "clang++", "win32": "cl"}


@dataclass(frozen=True)
class CompiledProgram:
    """The exported program, compiled for the CPU that it runs on."""

    name: ClassVar[str] = "compile-cpu"
    device: ClassVar[Device] = "cpu"
    formats: ClassVar[tuple[Format, ...]] = ("pt2",)
    reference: ClassVar[bool] = False
    on_request: ClassVar[bool] = True  # who didn't ask for it would not want to wait for it
    shows_fold: ClassVar[bool] = False
    server: ClassVar[Server | None] = None

    def unavailable_reason(self) -> str | None:
        return torch_unavailable_reason("cpu") or compiler_missing()

    def program(self, file: Runnable) -> Program:
        load = [
            *export_lines(file, "whole"),
            "compiled = {}",
            "",
            "",
            "def module(x):  # code of its own for each shape: of one, torch.compile keeps eight",
            "    if x.shape not in compiled:",
            "        own = torch.fx.GraphModule(whole, whole.graph)",
            "        compiled[x.shape] = torch.compile(own, dynamic=False, fullgraph=True)",
            "    return compiled[x.shape](x)",
        ]
        return torch_program(file, load)

    def load(self, bundle: Bundle, options: Options) -> TorchSession:
        configure_torch(options)
        module, placement = load_program(file_path(self, bundle, options), "cpu")
        return TorchSession(CompiledForEachShape(module), bundle, "cpu", options, placement, {"compiled": True})


class CompiledForEachShape:
    """A module that is compiled for each shape of its inputs when that first comes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, *inputs: torch.Tensor) -> Any:
        shapes = tuple(tensor.shape for tensor in inputs)
        compiled = self._compiled.get(shapes)
        if compiled is None:
            compiled = self._compiled[shapes] = self._compile()
        return compiled(*inputs)

    def _compile(self) -> Any:
        """The module in a form that is compiled at its first call.

        Each has code of its own: torch.compile keeps eight compilations of one code, and from then on runs it
        uncompiled without an error.
        """
        import torch

        return torch.compile(torch.fx.GraphModule(self._module, self._module.graph), dynamic=False, fullgraph=True)


def compiler_missing() -> str | None:
    """None where TorchInductor finds a C++ compiler, else what it lacks."""
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        return (
            f"torch.compile needs a C++ compiler, and {compiler!r} is not on PATH. Install it (on Debian: apt install "
            "g++), or name another in the environment variable CXX."
        )
    return None


CPU: Backend = CompiledProgram()

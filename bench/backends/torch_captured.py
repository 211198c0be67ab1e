"""torch at its best on a GPU: the bundle's `torch.export` program captured as a CUDA graph.

Owns how the program is prepared before it is captured: with torch's own kernels, the fastest that cuDNN finds for each
shape (`graph-cuda`), or compiled by TorchInductor (`compile-cuda`). Every batch size is captured once, at its first
run; after that a call is one launch.

What was tried on an H100 with the article's network, folded (torch 2.11, batch 1 / 256 / 16,384, TF32): captured 59 /
187 / 8,020 µs; in channels_last 85 / 224 / 9,180 µs, its convolutions having too few channels for it; compiled 68 / 189
/ 7,740 µs; by the compiler's autotuning no faster, and 45 s of it for each shape. The compiler is left to find out that
the batch varies: one compilation for each of seven batch sizes would take a minute.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import Backend, Device, Options, Placement, Program, Runnable, Server, Setting, file_path
from bench.backends.torch_lines import CAPTURED, export_lines, torch_program
from bench.backends.torch_program import load_program
from bench.backends.torch_runtime import (
    GpuMemory,
    Tensors,
    TorchSession,
    configure_torch,
    torch_unavailable_reason,
)

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle, Format

COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class CapturedProgram:
    """The exported program as a CUDA graph for each batch size."""

    compiled: bool
    device: ClassVar[Device] = "cuda"
    formats: ClassVar[tuple[Format, ...]] = ("pt2",)
    reference: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    server: ClassVar[Server | None] = None

    @property
    def name(self) -> str:
        return "compile-cuda" if self.compiled else "graph-cuda"

    def unavailable_reason(self) -> str | None:
        if (reason := torch_unavailable_reason("cuda")) is not None:
            return reason
        if not self.compiled:
            return None
        if find_spec("triton") is None:
            return "torch.compile needs triton on a GPU, which is not installed: python -m pip install triton"
        if not any(map(shutil.which, COMPILERS)):
            return (
                f"torch.compile needs a C compiler ({', '.join(COMPILERS)}), and none is on PATH. Install one, for "
                "example gcc."
            )
        return None

    @property
    def shows_fold(self) -> bool:
        return not self.compiled

    def program(self, file: Runnable) -> Program:
        compiled = ["module = torch.compile(module)"] if self.compiled else []
        return torch_program(file, [*export_lines(file), *compiled], CAPTURED, search=True)

    def load(self, bundle: Bundle, options: Options) -> CapturedSession:
        import torch

        configure_torch(options)
        torch.backends.cudnn.benchmark = True
        module, placement = load_program(file_path(self, bundle, options), "cuda")
        run: Any = torch.compile(module) if self.compiled else module
        return CapturedSession(run, bundle, options, placement, {"compiled": self.compiled})


class CapturedSession(TorchSession):
    """One CUDA graph for each batch size, all on the stream of the memory that they read and write."""

    _memory: GpuMemory

    def __init__(
        self, module: Any, bundle: Bundle, options: Options, placement: Placement, settings: dict[str, Setting]
    ) -> None:
        super().__init__(module, bundle, "cuda", options, placement, settings | {"cuda_graph": True})
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def run(self, prepared: Tensors) -> Any:
        key = prepared[0].data_ptr()
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._memory.captured(lambda: self._module(*prepared))
        graph, output = captured
        self._memory.complete(graph.replay)
        return output

    def close(self) -> None:
        self._captured.clear()
        super().close()


GRAPH: Backend = CapturedProgram(compiled=False)
COMPILED: Backend = CapturedProgram(compiled=True)

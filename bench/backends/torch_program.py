"""torch, eagerly: the unfolded `torch.export` program, which is what a user would otherwise run, and so the reference.

Owns loading a program on the CPU or a GPU. Knows nothing of other formats.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import Backend, Options, Placement, Program, Runnable, Server, file_path
from bench.backends.torch_lines import export_lines, torch_program
from bench.backends.torch_runtime import (
    TorchDevice,
    TorchSession,
    configure_torch,
    stray_tensors,
    torch_unavailable_reason,
)

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle, Format


@dataclass(frozen=True)
class TorchProgram:
    """The exported program, run node by node by torch."""

    device: TorchDevice
    formats: ClassVar[tuple[Format, ...]] = ("pt2",)
    reference: ClassVar[bool] = True
    on_request: ClassVar[bool] = False
    shows_fold: ClassVar[bool] = False
    server: ClassVar[Server | None] = None

    @property
    def name(self) -> str:
        return f"torch-{self.device}"

    def unavailable_reason(self) -> str | None:
        return torch_unavailable_reason(self.device)

    def program(self, file: Runnable) -> Program:
        return torch_program(file, export_lines(file))

    def load(self, bundle: Bundle, options: Options) -> TorchSession:
        configure_torch(options)
        module, placement = load_program(file_path(self, bundle, options), self.device)
        return TorchSession(module, bundle, self.device, options, placement, {})


def load_program(path: Path, device: TorchDevice) -> tuple[torch.fx.GraphModule, Placement]:
    """The program in a file as a module on `device`, and where its nodes and tensors are."""
    import torch
    from torch.export.passes import move_to_device_pass

    program = read_program(path)
    # `.to(device)` would move the weights only; this moves the constants and device arguments of the graph as well.
    exported = move_to_device_pass(program, device).module(check_guards=False)
    # The exported module checks its input at every call, which the user's own eager module would not do, and its
    # `.eval()` raises; the same graph in a plain GraphModule does neither. Eval behaviour is fixed in the graph itself.
    module = torch.fx.GraphModule(exported, exported.graph).eval()
    return module, _placement(module, device)


def read_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a file, on the CPU."""
    import torch

    with warnings.catch_warnings():
        # torch 2.11 says so of its own reading of the archive.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(str(path))


def _placement(module: Any, device: TorchDevice) -> Placement:
    """torch runs an operator where its tensors are, so tensors and device arguments tell the place of every node."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    arguments = [(node.name, node.kwargs["device"]) for node in calls if node.kwargs.get("device") is not None]
    stray = stray_tensors(device, [*module.named_parameters(), *module.named_buffers()])
    # A device or its name: programs that were moved have the latter.
    stray += tuple(f"{name} makes a tensor on {place}" for name, place in arguments if _type(place) != device)
    return Placement(
        nodes={device: len(calls)},
        stray=stray,
        evidence="device of every parameter, buffer and device argument of the graph",
    )


def _type(place: torch.device | str) -> str:
    import torch

    return torch.device(place).type


CPU: Backend = TorchProgram("cpu")
CUDA: Backend = TorchProgram("cuda")

"""TorchScript: the bundle's traced file, run by torch's own interpreter.

Owns loading that file on the CPU or a GPU. TorchScript is deprecated upstream (torch 2.x warns at every load), but
files of it are in use, and the C++ runtime needs no Python.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import Backend, Options, Placement, Program, Runnable, Server, Setting, file_path, text
from bench.backends.torch_lines import torch_program
from bench.backends.torch_runtime import (
    TorchDevice,
    TorchSession,
    configure_torch,
    stray_tensors,
    torch_unavailable_reason,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from export.bundle import Bundle, Format


# The place of `allow_tf32` among the inputs of aten::_convolution (ATen/native/native_functions.yaml).
ALLOW_TF32 = 12


@dataclass(frozen=True)
class TorchScript:
    """A scripted module as `torch.jit.load` gives it, without further optimisation."""

    device: TorchDevice
    formats: ClassVar[tuple[Format, ...]] = ("torchscript",)
    reference: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    server: ClassVar[Server | None] = Server("pytorch", {".ts": "model.pt"}, "INTRA_OP_THREAD_COUNT", indexed=True)

    @property
    def name(self) -> str:
        return f"torchscript-{self.device}"

    def unavailable_reason(self) -> str | None:
        reason = torch_unavailable_reason(self.device)
        if reason is not None:
            return reason
        import torch

        if not hasattr(torch.jit, "load"):
            return f"torch {torch.__version__} no longer has TorchScript. Install an older torch to run such files."
        return None

    @property
    def shows_fold(self) -> bool:
        return self.device == "cpu"

    def program(self, file: Runnable) -> Program:
        load = f"module = torch.jit.load({text(file.path)}, map_location={text(file.device)}).eval()"
        return torch_program(file, [load])

    def load(self, bundle: Bundle, options: Options) -> TorchSession:
        import torch

        configure_torch(options)
        path = file_path(self, bundle, options)
        load: Any = torch.jit.load
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):  # what the module docstring says; which kind depends
                warnings.simplefilter("ignore", kind)
            try:
                module = load(str(path), map_location=self.device).eval()
            except RuntimeError as error:  # a detector's file calls operators that torchvision registers
                if "torchvision::" not in str(error):
                    raise
                importlib.import_module("torchvision")
                module = load(str(path), map_location=self.device).eval()
        settings: dict[str, Setting] = {"optimised_for_inference": False}
        if (tf32 := convolutions_allow_tf32(module)) is not None:
            settings["file_allows_tf32_in_convolutions"] = tf32
        return TorchSession(module, bundle, self.device, options, _placement(module, self.device), settings)


def convolutions_allow_tf32(module: Any) -> bool | None:
    """Whether any convolution of the file may use TF32 on a GPU: fixed when it was traced, whatever the profile says.

    None where no convolution says, as in a scripted module: there torch's own switch decides.
    """
    graph = module.inlined_graph  # its nodes live as long as it does
    convolutions = [node for node in _nodes(graph) if node.kind() == "aten::_convolution"]
    inputs = [list(node.inputs()) for node in convolutions]
    said = [values[ALLOW_TF32].toIValue() for values in inputs if len(values) > ALLOW_TF32]
    return any(said) if said else None


def _placement(module: Any, device: TorchDevice) -> Placement:
    """Weights, constants and baked devices of the graph: torch runs an operator where its tensors are."""
    nodes = list(_nodes(module.inlined_graph))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    tensors += [
        (f"constant {node.output().debugName()}", value) for node in nodes if (value := _constant(node)) is not None
    ]
    stray = stray_tensors(device, tensors)
    for node in nodes:
        if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
            place = str(node.output().toIValue())
            if place.partition(":")[0] != device:
                stray += (f"constant {node.output().debugName()} names the device {place}",)
    return Placement(
        nodes={device: sum(node.kind().startswith("aten::") for node in nodes)},
        stray=stray,
        evidence="device of every parameter, buffer, tensor constant and device constant of the graph",
    )


def _nodes(block: Any) -> Iterator[Any]:
    """Every node of a graph, those inside branches and loops too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _constant(node: Any) -> torch.Tensor | None:
    """The tensor of a constant node, None for any other node."""
    if node.kind() != "prim::Constant" or node.output().type().kind() != "TensorType":
        return None
    tensor: torch.Tensor | None = node.output().toIValue()
    return tensor


CPU: Backend = TorchScript("cpu")
CUDA: Backend = TorchScript("cuda")

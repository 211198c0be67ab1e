"""The float32 files of a bundle: which there are, and how each is written.

Owns what a lean bundle leaves out. Knows neither the rules of folding nor the details of a format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from export.bundle import DataFile, FileEntry, Format, LeftOut
from export.effort import Files
from export.formats import onnx_file, pt2, torchscript
from export.progress import Progress

if TYPE_CHECKING:
    from export.sources.material import Material

CHECKPOINT = "checkpoint.safetensors"
ONLY_FULL = ("model.unfolded.onnx", "model.pt2", "model.unfolded.ts", CHECKPOINT)
"""What a lean bundle has not: the two controls, the folded program, and the weights as model.unfolded.pt2 has them."""


@dataclass(frozen=True)
class Programs:
    """The float32 network: `unfolded` as torch.export sees it, and folded for either runtime; `module` is torch's.

    `control` is not folded either, and in all else as the folded ones are.
    """

    unfolded: torch.export.ExportedProgram
    control: torch.export.ExportedProgram
    onnx: torch.export.ExportedProgram
    torch: torch.export.ExportedProgram
    module: fx.GraphModule


def write(folder: Path, material: Material, programs: Programs, files: Files, progress: Progress) -> list[FileEntry]:
    """Write the files of a bundle that is lean or full, without the checkpoint."""
    examples = tuple(map(torch.from_numpy, material.examples))
    names = material.names("preprocessed")

    def onnx(program: torch.export.ExportedProgram, optimize: bool) -> Callable[[Path], int]:
        return lambda path: onnx_file.write(program, path, *names, optimize=optimize)

    # Of the unfolded one, torch's own optimiser would fold what it can, and the control would be none.
    writers: list[tuple[str, Format, bool, Callable[[Path], int | None]]] = [
        ("model.onnx", "onnx", True, onnx(programs.onnx, True)),
        ("model.unfolded.onnx", "onnx", False, onnx(programs.control, False)),
        ("model.pt2", "pt2", True, lambda path: pt2.write(programs.torch, path)),
        ("model.unfolded.pt2", "pt2", False, lambda path: pt2.write(programs.unfolded, path)),
        ("model.ts", "torchscript", True, lambda path: torchscript.write(programs.module, examples, path)),
        ("model.unfolded.ts", "torchscript", False, lambda path: torchscript.write(material.module, examples, path)),
    ]
    if not torchscript.available():
        progress.say(f"torch {torch.__version__} has no TorchScript any more, so none is written")
        writers = [writer for writer in writers if writer[1] != "torchscript"]
    entries = []
    for name, format, folded, write_one in writers:
        if files == "lean" and name in ONLY_FULL:
            continue
        with progress.step(f"writing {name}"):
            opset = write_one(folder / name)
            entries.append(
                FileEntry(
                    **DataFile.of(folder / name).model_dump(),
                    format=format,
                    precision="float32",
                    folded=folded,
                    opset=opset,
                )
            )
    return entries


def left_out(files: Files, weight_bytes: int) -> tuple[LeftOut, ...]:
    """What a bundle of that kind has not, and why."""
    if files == "full":
        return ()
    reason = f"each holds the {weight_bytes / 1e6:.0f} MB of weights once more; --files full makes them"
    return (LeftOut(what=", ".join(ONLY_FULL), reason=reason, asked_for=False),)

"""Programs that torch compiled ahead of time (AOTInductor), for the kind of machine that compiled them.

Owns compiling, and running what was compiled. Knows nothing of folding. What comes out is machine code: there is no
graph left in which BatchNorms could be counted, and no optimisation that could be turned off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from export.formats.running import Run, as_function
from trainer.errors import EXIT_UNAVAILABLE, UserError

Device = Literal["cpu", "cuda"]


def devices() -> tuple[Device, ...]:
    """What can be compiled for here. Raises UserError (unavailable) without a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise UserError(
            "--aoti compiles C++, and torch finds no compiler here. Install one (Debian, Ubuntu: apt install g++; "
            "macOS: xcode-select --install), or name it in the environment variable CXX.",
            EXIT_UNAVAILABLE,
        ) from error
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def write(program: torch.export.ExportedProgram, path: Path, device: Device) -> None:
    """Compile the program for `device` and save it with all that it needs.

    It runs with as many threads as torch has where it runs; by default, with those of the process that compiled it.
    """
    from torch._inductor import aoti_compile_and_package
    from torch.export.passes import move_to_device_pass

    if device == "cuda":
        program = move_to_device_pass(program, device)
    with torch.no_grad():
        aoti_compile_and_package(program, package_path=str(path), inductor_configs={"cpp.dynamic_threads": True})


def runner(path: Path) -> Run:
    """The file as a function, inputs → outputs, on the device that it was compiled for."""
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(path))
    return as_function(model, model.loader.get_metadata().get("AOTI_DEVICE_KEY", "cpu"))

"""Programs that run a file by torch, as text: with the steps, memory and settings of `torch_runtime`'s sessions.

Owns the lines that all torch's backends share, and onnxruntime on CUDA with them: preprocessing in torch; on a GPU one
stream, pinned memory, and for each shape of the input memory and captured graphs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.backends.contract import Program, Runnable, shaped, text
from bench.backends.torch_runtime import CALLS_BEFORE_CAPTURE

ON_GPU = '"cuda"'
# What a session does beside that, for who times the model alone.
ONE_MORE_WAIT = "The measured session waits for the GPU once more, between the model and the copy of its logits."
# One process of torch's took 0.6 to 1.2 of another's images/s (docs/measuring.md, on page faults).
MAPPED = (
    "glibc's malloc may map a batch's memory anew at every call, in one process and not in the next: "
    "MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 in the environment keep it."
)
EAGER = ["run = lambda: module(x)", "made = run()"]
"""How the module is called in `gpu_program`: node by node."""
CAPTURED = ["replay, made = captured(lambda: module(x))", "run = lambda: (replay(), made)[1]"]
"""How it is called there: as one CUDA graph."""


def export_lines(file: Runnable, name: str = "module") -> list[str]:
    """Loads a `torch.export` program as a module of that name. `.to` would move its weights only, not the constants of
    its graph; and the exported module checks its input at every call, which a plain GraphModule doesn't.
    """
    moved = [f"program = move_to_device_pass(program, {ON_GPU})"] if file.device == "cuda" else []
    return [
        f"program = torch.export.load({text(file.path)})",
        *moved,
        "exported = program.module(check_guards=False)",
        f"{name} = torch.fx.GraphModule(exported, exported.graph).eval()",
    ]


def torch_program(file: Runnable, load: Sequence[str], call: Sequence[str] = EAGER, *, search: bool = False) -> Program:
    """The program of whatever `load` loads as `module`. On a GPU it is called as `call` says; `search`: cuDNN looks for
    the fastest convolution.
    """
    settings = [f"torch.set_num_threads({file.threads})"]
    if file.device == "cuda":
        settings += [f"torch.backends.{library}.allow_tf32 = False" for library in ("cuda.matmul", "cudnn")]
        settings += ["torch.backends.cudnn.benchmark = True"] if search else []
        moves = any("move_to_device_pass" in line for line in load)
        imports = ["import torch", *(["from torch.export.passes import move_to_device_pass"] if moves else [])]
        return gpu_program(file, imports, [*settings, *load], call)
    run = [
        "with torch.inference_mode():",
        f"    x = {_preprocessed(file, 'torch.from_numpy(raw)')}",
        "    return module(x).to(torch.float32).numpy()",
    ]
    return Program(["import torch", "", *settings, *load, *_constants(file)], run, prepare=[], differs=MAPPED)


def gpu_program(file: Runnable, imports: Sequence[str], load: Sequence[str], call: Sequence[str]) -> Program:
    """The way of an image to the GPU and of its logits back, as `torch_runtime.GpuMemory` goes it.

    Args:
        load: lines behind those that make `stream` and before the first input.
        call: lines that make, of the input `x` on the GPU, `run`, which returns the logits there, and `made`, a tensor
            of their shape. `captured` makes a graph of a function: what replays it, and what it writes to.
    """
    constants = _constants(file)
    prepare = (
        [f"prepare, x = captured(lambda: {_preprocessed(file, 'taken')})"]
        if constants
        else ["prepare, x = (lambda: None), taken"]
    )
    slot = [
        "staging = torch.empty_like(torch.from_numpy(raw), pin_memory=True)",
        f"taken = torch.zeros_like(staging, device={ON_GPU})",
        *prepare,
        *call,
        "answer = torch.empty(made.shape, dtype=torch.float32, pin_memory=True)",
        "return staging, taken, prepare, run, answer",
    ]
    lines = [
        *imports,
        "",
        *constants,
        "torch.cuda.synchronize()",
        "stream = torch.cuda.Stream()",
        *load,
        "slots = {}",
        "",
        "",
        "def captured(call):",
        f"    for _ in range({CALLS_BEFORE_CAPTURE}):",
        "        call()",
        "    stream.synchronize()",
        "    graph = torch.cuda.CUDAGraph()",
        "    with torch.cuda.graph(graph, stream=stream):",
        "        made = call()",
        "    return graph.replay, made",
        "",
        "",
        "def slot(raw):  # memory and graphs for one shape: a graph reads and writes the same addresses always",
        *(f"    {line}" for line in slot),
    ]
    run = [
        "with torch.inference_mode(), torch.cuda.stream(stream):",
        "    if raw.shape not in slots:",
        "        slots[raw.shape] = slot(raw)",
        "    staging, taken, prepare, run, answer = slots[raw.shape]",
        "    np.copyto(staging.numpy(), raw)",
        "    taken.copy_(staging, non_blocking=True)",
        "    prepare()",
        "    answer.copy_(run(), non_blocking=True)",
        "    stream.synchronize()",
        "    return answer.numpy().copy()",
    ]
    return Program(lines, run, prepare=[], differs=ONE_MORE_WAIT)


def _preprocessed(file: Runnable, given: str) -> str:
    """What makes the file's input of the tensor `given`: `torch_runtime.TorchInput`, as an expression."""
    if file.input == file.preprocessing.raw:
        return given
    return f"({shaped(file, given)}.to(torch.float32) * scale - mean) / std"


def _constants(file: Runnable) -> list[str]:
    """Tensors, not numbers: for those, torch on CUDA multiplies by the reciprocal instead of dividing."""
    if file.input == file.preprocessing.raw:
        return []
    device = f", device={ON_GPU}" if file.device == "cuda" else ""
    rank = len(file.input.shape)
    channels = ", ".join(["1", "-1", *["1"] * (rank - 2)] if rank > 1 else ["-1"])
    return [
        f"scale = torch.tensor({file.preprocessing.scale!r}{device})",
        *(
            f"{name} = torch.tensor({list(values)!r}{device}).reshape({channels})"
            for name, values in (("mean", file.preprocessing.mean), ("std", file.preprocessing.std))
        ),
    ]

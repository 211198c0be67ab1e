"""The model's work and the machine's two peaks, for the roofline.

Owns counting the work of a program, and measuring one matrix product and one copy. Both happen in a process of their
own, like everything that imports a runtime."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backends.contract import Profile
from bench.worker.interrupts import interrupts_held_back, take_no_interrupts

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle
from bench.results.roofline import Peak, RooflineDevice, Survey, Work

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
HOST_COPY_BYTES = 2**28
PEAK_CALLS, WARM_UP_CALLS = 7, 2
COUNTED = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose", "linear", "addmm", "mm", "matmul", "pool")


def survey(
    bundle: Path, devices: tuple[RooflineDevice, ...], threads: int, profile: Profile, timeout_s: float
) -> Survey | None:
    """Count the bundle's work and measure the devices' peaks; None for a bundle without a torch.export program, and
    where that failed: a roofline is a comment on a run, not a reason to end it.
    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=take_no_interrupts)
    try:
        with interrupts_held_back():
            future = pool.submit(_survey, bundle, devices, threads, profile)
        return future.result(timeout_s)
    except (TimeoutError, BrokenProcessPool, RuntimeError, OSError):
        return None
    finally:  # at once: whoever interrupts a run does not wait for its roofline
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown()


def _survey(place: Path, devices: tuple[RooflineDevice, ...], threads: int, profile: Profile) -> Survey | None:
    from bench.backends.contract import Options
    from bench.backends.torch_program import read_program
    from bench.backends.torch_runtime import configure_torch
    from export.bundle import Bundle, BundleError

    configure_torch(Options(threads, profile))
    bundle = Bundle.open(place)
    try:
        program = read_program(bundle.locate(bundle.entry("pt2", folded=False)))
    except BundleError:
        return None
    return Survey(count(bundle, program), tuple(_peak(device) for device in devices))


def count(bundle: Bundle, program: torch.export.ExportedProgram) -> Work:
    """The work of a torch.export program, on two inputs of the bundle's shape."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    exported = program.module(check_guards=False)
    weights = {tensor.data_ptr(): tensor for tensor in (*exported.parameters(), *exported.buffers())}
    moved: dict[str, float] = {"activations": 0.0}
    used: dict[int, float] = {}

    class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if any(name in function._schema.name.rpartition("::")[2] for name in COUNTED):
                outputs = result if isinstance(result, tuple) else (result,)
                # Of a pool's outputs the places of its maxima, integers, are not counted: nobody reads them.
                for tensor in (t for t in (*args, *outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()):
                    bytes_ = float(tensor.numel() * tensor.element_size())
                    if tensor.data_ptr() in weights:
                        used[tensor.data_ptr()] = bytes_
                    else:
                        moved["activations"] += bytes_
            return result

    images = 2
    batch = bundle.manifest.preprocessing.apply(bundle.oracle().raw[:images], bundle.manifest.input.shape)
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), flops, Bytes():  # type: ignore[no-untyped-call]
        exported(torch.from_numpy(batch))
    return Work(
        flops_per_image=flops.get_total_flops() / images,
        activation_bytes_per_image=moved["activations"] / images,
        weight_bytes=sum(used.values()),
    )


def _peak(device: RooflineDevice) -> Peak:
    import torch

    size, bytes_ = PRODUCT_SIZE[device], COPY_BYTES[device]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.zeros(bytes_ // 4, device=device) for _ in range(2))
    flops_per_s = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=product), device)
    copy_bytes_per_s = 2 * bytes_ / _seconds(lambda: target.copy_(source), device)
    if device == "cpu":
        return Peak(device, flops_per_s, copy_bytes_per_s)
    pinned = torch.zeros(HOST_COPY_BYTES // 4, pin_memory=True)
    near = target[: len(pinned)]
    to_device = HOST_COPY_BYTES / _seconds(lambda: near.copy_(pinned, non_blocking=True), device)
    return Peak(device, flops_per_s, copy_bytes_per_s, to_device)


def _seconds(call: Callable[[], object], device: RooflineDevice) -> float:
    """The median of a few calls, each complete on the device."""
    import torch

    durations = []
    for _ in range(WARM_UP_CALLS + PEAK_CALLS):
        before = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - before)
    return statistics.median(durations[WARM_UP_CALLS:])

"""How near a row comes to what the machine could do at best.

Owns counting the model's work, measuring the machine's two peaks (one matrix product, one copy), and the share of them
that a row reaches: the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009). Counting and measuring happen
in a process of their own, like everything that imports a runtime. Knows no backend.

The work is that of the unfolded torch.export program. FLOPs are torch's own count, of convolutions and matrix products,
a multiplication and an addition being two. Bytes are what these layers and the pools read and write once, in float32,
weights once per call: what is elementwise is taken as fused away, so that a runtime that fuses less moves more.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.backends.contract import Profile
from bench.worker.process import interrupts_held_back, take_no_interrupts

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle

RooflineDevice = Literal["cpu", "cuda"]
Binding = Literal["arithmetic", "memory", "copies", "launches"]

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
HOST_COPY_BYTES = 2**28
PEAK_CALLS, WARM_UP_CALLS = 7, 2
COUNTED = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose", "linear", "addmm", "mm", "matmul", "pool")


@dataclass(frozen=True)
class Work:
    """What one call of the model has to do. `weight_bytes` are read once per call, whatever the batch."""

    flops_per_image: float
    activation_bytes_per_image: float
    weight_bytes: float


@dataclass(frozen=True)
class Peak:
    """The best that a device was seen to do: `flops_per_s` of one float32 matrix product (TF32 where the profile allows
    it), `copy_bytes_per_s` of one copy, reading and writing counted, `host_to_device_bytes_per_s` of one copy from
    pinned memory to the device; None where the device is the host.
    """

    device: RooflineDevice
    flops_per_s: float
    copy_bytes_per_s: float
    host_to_device_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Survey:
    """The model's work, and the peaks of the devices that were in use."""

    work: Work
    peaks: tuple[Peak, ...]


@dataclass(frozen=True)
class Point:
    """Where a row lies under the roofline.

    `arithmetic_percent` and `memory_percent` are the shares of the two peaks that the device-resident time reaches.
    `binds` is what takes the time: the copies, where moving the data to and from the device is most of the end-to-end
    time; the launches of operators, where what a call takes at the smallest batch, beyond the ideal, is most of it;
    else the peak that is reached further.
    """

    subject: str
    batch_size: int
    arithmetic_percent: float
    memory_percent: float
    binds: Binding


def locate(
    subject: str,
    batch_size: int,
    device_images_per_s: float,
    whole_images_per_s: float,
    launch_seconds: float,
    work: Work,
    peak: Peak,
) -> Point:
    """The place of one row, from its throughputs device-resident and end to end, and its backend's launches."""
    seconds = batch_size / device_images_per_s
    arithmetic, memory = (100 * ideal / seconds for ideal in ideal_seconds(batch_size, work, peak))
    binds: Binding = "arithmetic" if arithmetic >= memory else "memory"
    if launch_seconds > 0.5 * seconds:
        binds = "launches"
    if whole_images_per_s < 0.5 * device_images_per_s:
        binds = "copies"
    return Point(subject, batch_size, arithmetic, memory, binds)


def ideal_seconds(batch_size: int, work: Work, peak: Peak) -> tuple[float, float]:
    """What a call would take if arithmetic alone, and if memory alone, limited it."""
    moved = batch_size * work.activation_bytes_per_image + work.weight_bytes
    return batch_size * work.flops_per_image / peak.flops_per_s, moved / peak.copy_bytes_per_s


def launch_seconds(smallest_batch: int, device_images_per_s: float, work: Work, peak: Peak) -> float:
    """What a call at the smallest batch takes beyond the ideal: what every call takes, whatever the batch."""
    return max(0.0, smallest_batch / device_images_per_s - max(ideal_seconds(smallest_batch, work, peak)))


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

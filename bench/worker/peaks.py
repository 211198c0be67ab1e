"""The model's work and the machine's peaks, for the roofline.

Owns counting the work of a program, and which probes (`bench.worker.probes`) make up the peak of a device for files of
a precision. Both happen in a process of their own, like everything that imports a runtime."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backends.contract import Options, Profile
from bench.results.roofline import Peak, RooflineDevice, Survey, Work
from bench.worker import probes
from bench.worker.interrupts import interrupts_held_back, take_no_interrupts
from bench.worker.probes import Best
from export.bundle import FLOAT32

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle

COUNTED = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose", "linear", "addmm", "mm", "matmul", "pool")


def survey(
    bundle: Path, devices: tuple[RooflineDevice, ...], threads: int, profile: Profile, timeout_s: float
) -> Survey | None:
    """Count the bundle's work and measure the devices' peaks for every precision of its files: some seconds. None for
    a bundle without a torch.export program, and where that failed: a roofline is a comment on a run, not a reason to
    end it.
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
    import torch

    from bench.backends.torch_program import read_program
    from bench.backends.torch_runtime import configure_torch
    from export.bundle import Bundle, BundleError

    options = Options(threads, profile)
    configure_torch(options)
    torch.backends.cudnn.benchmark = True  # the fastest convolution that there is
    bundle = Bundle.open(place)
    try:
        program = read_program(bundle.locate(bundle.entry("pt2", folded=False)))
    except BundleError:
        return None
    precisions = sorted({FLOAT32, *(entry.precision for entry in bundle.manifest.files)})
    peaks = tuple(peak for device in devices for peak in _peaks(device, precisions, options))
    return Survey(count(bundle, program), peaks)


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

    images = bundle.manifest.fixed_batch or 2
    raw, *more = (array[:images] for array in bundle.oracle().inputs)
    batch = bundle.manifest.preprocessing.apply(raw, bundle.manifest.input.shape)
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), flops, Bytes():  # type: ignore[no-untyped-call]
        exported(torch.from_numpy(batch), *map(torch.from_numpy, more))
    return Work(
        flops_per_image=flops.get_total_flops() / images,
        activation_bytes_per_image=moved["activations"] / images,
        weight_bytes=sum(used.values()),
        raw_bytes_per_image=sum(array.nbytes for array in (raw, *more)) / images,
    )


def _peaks(device: RooflineDevice, precisions: Sequence[str], options: Options) -> Iterator[Peak]:
    """The peak of the device for files of each of the precisions."""
    copy = max(probes.copies(device), key=_per_s)
    link = probes.host_to_device_bytes_per_s() if device == "cuda" else None
    wide = max(probes.arithmetic(device, FLOAT32, options), key=_per_s)

    @cache
    def best(precision: str) -> Best:
        reached = wide
        for place, probe in enumerate(probes.arithmetic(device, precision, options)):
            if place == 0 and probe.per_s < probes.NATIVE_FROM * wide.per_s:
                break
            reached = max(reached, probe, key=_per_s)
        return reached

    for precision in precisions:
        most = max([wide, *map(best, probes.narrower(device, precision, options.profile))], key=_per_s)
        yield Peak(device, most.per_s, copy.per_s, link, precision, most.words, copy.words)


def _per_s(best: Best) -> float:
    return best.per_s

"""What the runtimes that stand on torch share: threads, arithmetic, the device, and preprocessing on it.

Owns how a raw array becomes the model's input on a device, for the torch backends and for onnxruntime on CUDA alike, so
that they are timed with the same steps. Knows no file format.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from bench.backends.contract import HALVES, Emulation, Options, Placement, Profile, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from export.bundle import Arrays, Bundle

TorchDevice = Literal["cpu", "cuda"]

QUEUED_CALLS = 10
CALLS_BEFORE_CAPTURE = 3
T = TypeVar("T")
Tensors = tuple["torch.Tensor", ...]
"""One for each input of the model, or each output."""
# What multiplies in a precision, in the words of `torch.cpu.get_capabilities`: x86's first, ARM's last.
INSTRUCTIONS = {
    "float16": ("amx_fp16", "avx10_2", "fp16_arith"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"),
}


def torch_unavailable_reason(device: TorchDevice) -> str | None:
    """None where torch can compute on `device`, else why not and what would fix it.

    The driver is asked first: it answers in a millisecond, and without it torch need not be imported to know.
    """
    if device == "cuda" and (reason := _driver_reason()) is not None:
        return reason
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        return f"torch can't be imported ({error}). Install it again: python -m pip install --force-reinstall torch"
    if device == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA. Install a CUDA build of torch (see pytorch.org)."
        return (
            f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no usable GPU although the driver "
            "has one. Usually the driver is older than this CUDA: update it, or install a torch for an older CUDA."
        )
    return None


def _driver_reason() -> str | None:
    """None where the NVIDIA driver has at least one device for this process, else why not.

    CUDA driver API, section "Device Management": cuInit and cuDeviceGetCount return 0 on success.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return (
            f"there is no NVIDIA driver here ({library} can't be loaded). Use a machine with an NVIDIA GPU and its "
            "driver; in a container, let it see the GPU (docker run --gpus all)."
        )
    code = int(driver.cuInit(0))
    count = ctypes.c_int(0)
    if code == 0:
        code = int(driver.cuDeviceGetCount(ctypes.byref(count)))
    if code != 0 or count.value == 0:
        return (
            f"the NVIDIA driver offers no device (CUDA error {code}, {count.value} devices). Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, and that driver and kernel module are of one version."
        )
    return None


def configure_torch(options: Options) -> None:
    """Set this process's torch to the threads and the arithmetic of `options`.

    Both switches are set, because their defaults differ: convolutions use TF32, matrix products do not. Of torch's two
    ways to say it this is the older, here and everywhere: after the newer (`fp32_precision`) torch's own reads of the
    older raise, in torch.export for one (torch 2.14).
    """
    import torch

    torch.set_num_threads(options.threads)
    tf32 = options.profile is Profile.FAST
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def torch_settings(device: TorchDevice) -> dict[str, Setting]:
    """The settings in effect, read back from torch."""
    import torch

    settings: dict[str, Setting] = {"torch": torch.__version__, "intra_op_threads": torch.get_num_threads()}
    if device == "cpu":
        settings["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    else:
        cudnn: Any = torch.backends.cudnn
        settings["device"] = torch.cuda.get_device_name()
        settings["cuda"] = str(torch.version.cuda)
        settings["cudnn"] = str(cudnn.version())
        settings["cudnn_benchmark"] = bool(cudnn.benchmark)
        settings["cudnn_allow_tf32"] = bool(cudnn.allow_tf32)
        settings["cuda_matmul_allow_tf32"] = bool(torch.backends.cuda.matmul.allow_tf32)
    return settings


def cpu_capabilities() -> Mapping[str, Any]:
    """Which instructions this CPU has, in torch's words; empty where torch doesn't say."""
    import torch

    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def emulation(device: TorchDevice, variant: str) -> Emulation | None:
    """Why torch computes the layers of that variant in float32 on this CPU; None where it doesn't, where it isn't known
    to, and on a GPU.

    torch gives such layers to oneDNN where that takes them, else to loops of its own. That it takes a type
    (`torch.ops.mkldnn._is_mkldnn_bf16_supported`) says nothing: oneDNN takes bfloat16 on every CPU with AVX-512, and
    float16 on one with AVX512_FP16, by converting both to float32 (its guide, "Data Types", Hardware Limitations). In
    the machine code that it made for the article's network (torch 2.14, oneDNN 3.12), bfloat16 is multiplied by
    VDPBF16PS with AVX512_BF16 and by VFMADD231PS without; float16 with AVX512_FP16 is converted by VCVTPH2PSX, then
    multiplied by VFMADD231PS. AMX and AVX10.2 are as that guide says, and were not tried. Neither was ARM, where what
    torch does with the instructions is not known, but without them it can't do otherwise.

    On one core of an Intel Xeon with AVX512_BF16 and AVX512_FP16, held to less by ONEDNN_MAX_CPU_ISA, 64 images, in
    ms, on a machine that was not quiet:

                         float32   bfloat16   float16
        AVX2                14.5        114       141
        AVX512_CORE         14.1       28.3       145
        AVX512_CORE_BF16    12.1       16.3       142
        AVX512_CORE_FP16    14.3       15.9      16.4
    """
    from export.bundle import precision_of

    precision = precision_of(variant)
    if device != "cpu" or precision not in HALVES:
        return None
    capabilities = cpu_capabilities()
    known = [capabilities[name] for name in INSTRUCTIONS[precision] if name in capabilities]
    return "no instructions" if known and not any(known) else None


class TorchInput:
    """From raw input to what the file takes, on a device: the bundle's expression, step by step, in torch; nothing of
    it for a file that takes the raw input.
    """

    def __init__(self, bundle: Bundle, device: TorchDevice, options: Options) -> None:
        import torch

        from export.bundle import takes_raw

        self.takes_raw = takes_raw(options.variant)

        self._torch = torch
        self._preprocessing = bundle.manifest.preprocessing
        self._input_shape = bundle.manifest.input.shape
        self._device = torch.device(device)
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        # Tensors, not Python numbers: for those, torch on CUDA multiplies by the reciprocal instead of dividing.
        channels = (1, -1, *([1] * (len(self._input_shape) - 2))) if len(self._input_shape) > 1 else (-1,)
        mean = np.asarray(self._preprocessing.mean, np.float32).reshape(channels)
        std = np.asarray(self._preprocessing.std, np.float32).reshape(channels)
        self._scale = torch.tensor(self._preprocessing.scale, dtype=torch.float32, device=self._device)
        self._mean = torch.from_numpy(mean).to(self._device)
        self._std = torch.from_numpy(std).to(self._device)

    def sizes(self, raw: np.ndarray) -> tuple[int, ...]:
        """The model's input shape without the batch, as the bundle's own NumPy reference resolves it for such a raw
        array.
        """
        key = raw.shape[1:]
        if key not in self._shapes:
            self._shapes[key] = self._preprocessing.apply(raw[:1], self._input_shape).shape[1:]
        return self._shapes[key]

    def preprocess(self, raw: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        """Raw [N, …] on the device → float32 [N, *sizes], contiguous; or the raw array itself."""
        if self.takes_raw:
            return raw
        shaped = raw.reshape(len(raw), *sizes).to(self._torch.float32)
        return (shaped * self._scale - self._mean) / self._std


class CpuMemory:
    """The way of an image to a model on the CPU, and of its logits back: host memory all along."""

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._input = TorchInput(bundle, "cpu", options)

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Tensors:
        """Raw [N, …] → what the file takes: float32 [N, *input.shape[1:]], or `raw` itself; the others as they are."""
        torch = self._input._torch
        with torch.inference_mode():
            first = self._input.preprocess(torch.from_numpy(raw), self._input.sizes(raw))
            return (first, *map(torch.from_numpy, more))

    def complete(self, call: Callable[[], T]) -> T:
        """What `call` returns: the CPU has done it by then."""
        return call()

    def fetch(self, output: Tensors) -> Arrays:
        """Outputs [N, …], floats as float32."""
        return tuple((tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in output)

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        """None: there is no clock but the host's."""
        return None


@dataclass(frozen=True)
class Slot:
    """The memory that an input of one shape passes through: `staging` is pinned, the others are on the GPU. `host` is
    `staging` as NumPy sees it.

    `preprocess` is the captured graph that makes `prepared` of `raw`; None where the file takes `raw` itself.
    """

    host: np.ndarray
    staging: torch.Tensor
    raw: torch.Tensor
    prepared: torch.Tensor
    preprocess: torch.cuda.CUDAGraph | None


class GpuMemory:
    """The way of an image to a model on the GPU, and of its logits back, on one stream.

    Every shape has memory of its own, allocated when it is first seen and used again ever after: what a server does,
    and what a captured graph needs, since it reads and writes the same addresses at every replay. Raw pixels cross to
    the GPU from pinned memory (a quarter of the bytes where they are uint8) and are preprocessed there by one replay.
    """

    def __init__(self, bundle: Bundle, options: Options) -> None:
        import torch

        self._torch = torch
        self._input = TorchInput(bundle, "cuda", options)
        self._slots: dict[tuple[tuple[tuple[int, ...], np.dtype[Any]], ...], tuple[Slot, ...]] = {}
        self._pinned: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        torch.cuda.synchronize()  # the constants above were made on another stream
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.queueing = False

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Tensors:
        """Raw [N, …] in host memory, and further inputs → what the file takes, on the GPU, queued on the stream.

        The same tensors for all inputs of these shapes, and for no others.
        """
        torch = self._torch
        arrays = raw, *more
        key = tuple((array.shape, array.dtype) for array in arrays)
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            slots = self._slots.get(key)
            if slots is None:
                slots = self._slots[key] = (self._slot(raw), *map(self._as_it_is, more))
            self.stream.synchronize()  # a copy from `staging` may still be under way
            for slot, array in zip(slots, arrays, strict=True):
                # On this thread alone: for more than 32,768 elements torch wakes its pool, which takes longer.
                np.copyto(slot.host, array)
                slot.raw.copy_(slot.staging, non_blocking=True)
                if slot.preprocess is not None:
                    slot.preprocess.replay()
        return tuple(slot.prepared for slot in slots)

    def complete(self, call: Callable[[], T]) -> T:
        """What `call` returns, when all that it asked of the GPU is done; while `queueing`, when it was asked."""
        with self._torch.cuda.stream(self.stream):
            output = call()
        if not self.queueing:
            self.stream.synchronize()
        return output

    def fetch(self, output: Tensors) -> Arrays:
        """Outputs on the GPU → [N, …] in host memory, floats as float32."""
        torch = self._torch
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            all_pinned = [self._pinned_for(place, tensor) for place, tensor in enumerate(output)]
            for pinned, tensor in zip(all_pinned, output, strict=True):
                pinned.copy_(tensor, non_blocking=True)
            self.stream.synchronize()
        return tuple(pinned.numpy().copy() for pinned in all_pinned)  # the next call of this shape writes there

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        """What one of `QUEUED_CALLS` calls takes by the GPU's own clock, which are queued without waiting for any.

        Around a single call on an idle stream, the first event passes at once and the clock then waits for the host to
        launch: it would time the host. Here the GPU is busy with a call when the first event is queued. Where launching
        a call takes longer than computing it, the GPU waits all the same, and this is the time to launch.
        """
        event: Any = self._torch.cuda.Event
        before, after = event(enable_timing=True), event(enable_timing=True)
        self.queueing = True
        try:
            call()
            before.record(self.stream)
            for _ in range(QUEUED_CALLS):
                call()
            after.record(self.stream)
        finally:
            self.queueing = False
        after.synchronize()
        return int(before.elapsed_time(after) * 1e6 / QUEUED_CALLS)

    def captured(self, call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph that does what `call` does at every replay, and the tensors that its results are written to.

        Before it is captured it runs a few times: libraries allocate, search for algorithms and compile at first.
        PyTorch documentation, "CUDA Graphs".
        """
        torch = self._torch
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for _ in range(CALLS_BEFORE_CAPTURE):
                call()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                output = call()
        return graph, output

    def _pinned_for(self, place: int, output: torch.Tensor) -> torch.Tensor:
        """Memory of its own for each output of a shape."""
        torch = self._torch
        dtype = torch.float32 if output.is_floating_point() else output.dtype
        key = place, tuple(output.shape), dtype
        if key not in self._pinned:
            self._pinned[key] = torch.empty(key[1], dtype=dtype, pin_memory=True)
        return self._pinned[key]

    def _slot(self, raw: np.ndarray) -> Slot:
        slot = self._as_it_is(raw)
        if self._input.takes_raw:
            return slot
        sizes = self._input.sizes(raw)
        graph, prepared = self.captured(lambda: self._input.preprocess(slot.raw, sizes))
        return replace(slot, prepared=prepared, preprocess=graph)

    def _as_it_is(self, array: np.ndarray) -> Slot:
        torch = self._torch
        staging = torch.empty_like(torch.from_numpy(array), pin_memory=True)
        on_gpu = torch.zeros_like(staging, device="cuda")
        return Slot(staging.numpy(), staging, on_gpu, on_gpu, None)


class TorchSession:
    """A callable torch module on a device. What is particular to a file format is who made the module, and its
    placement.
    """

    def __init__(
        self,
        module: Any,
        bundle: Bundle,
        device: TorchDevice,
        options: Options,
        placement: Placement,
        settings: dict[str, Setting],
    ) -> None:
        import torch

        self._inference_mode = torch.inference_mode
        self._module = module
        self._memory = GpuMemory(bundle, options) if device == "cuda" else CpuMemory(bundle, options)
        self._placement = replace(placement, emulated=emulation(device, options.variant))
        self._settings = torch_settings(device) | settings

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Tensors:
        return self._memory.prepare(raw, *more)

    def run(self, prepared: Tensors) -> Any:
        with self._inference_mode():
            return self._memory.complete(lambda: self._module(*prepared))

    def fetch(self, output: Any) -> Arrays:
        return self._memory.fetch(tensors_of(output))

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return self._memory.gpu_ns(call)

    def placement(self) -> Placement:
        return self._placement

    def settings(self) -> dict[str, Setting]:
        return self._settings

    def close(self) -> None:
        self._module = None


def tensors_of(output: Any) -> Tensors:
    """All tensors of what a module returned, in the order of its structure."""
    import torch

    if isinstance(output, torch.Tensor):
        return (output,)
    from torch.utils import _pytree as pytree

    return tuple(pytree.tree_leaves(output))


def stray_tensors(device: TorchDevice, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    """Name and place of every tensor that is not on `device`."""
    return tuple(f"{name} is on {tensor.device}" for name, tensor in tensors if tensor.device.type != device)

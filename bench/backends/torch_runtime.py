"""What the runtimes that stand on torch share: threads, arithmetic, the device, and preprocessing on it.

Owns how a raw array becomes the model's input on a device, for the torch backends and for onnxruntime on CUDA alike, so
that they are timed with the same steps. Knows no file format.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.backend import Options, Placement, Profile, Setting

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from export.bundle import Bundle

TorchDevice = Literal["cpu", "cuda"]


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


class TorchInput:
    """From raw host memory to the model's input on a device: the bundle's expression, step by step, in torch."""

    def __init__(self, bundle: Bundle, device: TorchDevice) -> None:
        import torch

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

    def prepare(self, raw: np.ndarray) -> torch.Tensor:
        """Raw [N, …] in host memory → float32 [N, *input.shape[1:]], contiguous and complete on the device.

        The raw array is what crosses to the device (a quarter of the bytes where it is uint8).
        """
        moved = self._torch.from_numpy(raw).to(self._device)
        shaped = moved.reshape(len(raw), *self._sizes(raw)).to(self._torch.float32)
        ready = (shaped * self._scale - self._mean) / self._std
        self.synchronise()
        return ready

    def synchronise(self) -> None:
        """Wait until the device has done all that was asked of it; on the CPU torch has already waited."""
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def _sizes(self, raw: np.ndarray) -> tuple[int, ...]:
        """The model's input shape without the batch, as the bundle's own NumPy reference resolves it for such a raw
        array.
        """
        key = raw.shape[1:]
        if key not in self._shapes:
            self._shapes[key] = self._preprocessing.apply(raw[:1], self._input_shape).shape[1:]
        return self._shapes[key]


class TorchSession:
    """A callable torch module on a device. What is particular to a file format is who made the module, and its
    placement.
    """

    def __init__(
        self,
        module: Any,
        bundle: Bundle,
        device: TorchDevice,
        placement: Placement,
        settings: dict[str, Setting],
    ) -> None:
        import torch

        self._inference_mode = torch.inference_mode
        self._module = module
        self._input = TorchInput(bundle, device)
        self._placement = placement
        self._settings = torch_settings(device) | settings

    def prepare(self, raw: np.ndarray) -> torch.Tensor:
        with self._inference_mode():
            return self._input.prepare(raw)

    def run(self, prepared: torch.Tensor) -> torch.Tensor:
        with self._inference_mode():
            output: torch.Tensor = self._module(prepared)
        self._input.synchronise()
        return output

    def fetch(self, output: torch.Tensor) -> np.ndarray:
        logits: np.ndarray = output.to("cpu", dtype=self._input._torch.float32).numpy()
        return logits

    def placement(self) -> Placement:
        return self._placement

    def settings(self) -> dict[str, Setting]:
        return self._settings

    def close(self) -> None:
        self._module = None


def stray_tensors(device: TorchDevice, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    """Name and place of every tensor that is not on `device`."""
    return tuple(f"{name} is on {tensor.device}" for name, tensor in tensors if tensor.device.type != device)

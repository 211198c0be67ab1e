"""What the machine's own sensors say: clocks, temperature, power, throttling, energy.

Owns reading them, on Linux and through NVML. What a machine doesn't have, or doesn't let this user read, is left out,
never guessed. Knows nothing of what is measured meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
THROTTLE_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "temperature",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware temperature",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}


@dataclass(frozen=True)
class GpuReading:
    """A GPU at one moment. None where it doesn't tell; `throttled_by` names every reason that slows it down."""

    name: str
    temperature_celsius: int | None
    power_watts: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    memory_used_bytes: int | None
    throttled_by: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """The machine at one moment. `cpu_frequency_mhz` is the mean over the CPUs; None where the system doesn't tell."""

    cpu_frequency_mhz: float | None
    gpus: tuple[GpuReading, ...]


def read() -> Reading:
    """Look now."""
    import psutil

    frequency = None
    with contextlib.suppress(OSError, NotImplementedError):
        clock = psutil.cpu_freq()
        frequency = float(clock.current) if clock and clock.current else None
    return Reading(frequency, tuple(_read_gpu(handle) for handle in gpus()))


def energy_j() -> dict[str, float]:
    """Joules counted so far: ``cpu`` (RAPL, all packages) and ``gpu`` (NVML, all GPUs), where the machine counts.

    Linux, Documentation/power/powercap; NVML, nvmlDeviceGetTotalEnergyConsumption. Only differences mean anything; the
    CPU's counter starts again when it is full, which takes hours.
    """
    counted: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):  # root alone may read it on many systems
        packages = [int((package / "energy_uj").read_text()) for package in _rapl_packages()]
        if packages:
            counted["cpu"] = sum(packages) * 1e-6
    joules = [told(_nvml().nvmlDeviceGetTotalEnergyConsumption, handle) for handle in gpus()]
    known = [value for value in joules if value is not None]
    if known:
        counted["gpu"] = sum(known) * 1e-3
    return counted


def gpu_memory_of_this_process_bytes() -> int | None:
    """What this process holds of all GPUs' memory; None without a GPU, or where the driver doesn't tell."""
    held = None
    for handle in gpus():
        for process in told(_nvml().nvmlDeviceGetComputeRunningProcesses, handle) or ():
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                held = (held or 0) + int(process.usedGpuMemory)
    return held


@cache
def _rapl_packages() -> tuple[Path, ...]:
    return tuple(path for path in sorted(POWERCAP.glob("intel-rapl:*")) if path.name.count(":") == 1)


@cache
def gpus() -> tuple[Any, ...]:
    """A handle for every GPU. NVML stays open for the life of the process: opening it takes longer than asking it."""
    nvml = _nvml()
    try:
        nvml.nvmlInit()
        return tuple(nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError:  # no driver: no NVIDIA GPU that anything could run on
        return ()


def _nvml() -> Any:
    import pynvml

    return pynvml


def told(question: Callable[..., Any], *arguments: Any) -> Any:
    """NVML's answer, None where the GPU has none."""
    try:
        return question(*arguments)
    except _nvml().NVMLError:
        return None


def watts(question: Callable[..., Any], handle: Any) -> float | None:
    """NVML's answer to a question of power, which it gives in milliwatts; None where the GPU has none."""
    milliwatts = told(question, handle)
    return None if milliwatts is None else milliwatts / 1000


def _read_gpu(handle: Any) -> GpuReading:
    nvml = _nvml()
    memory = told(nvml.nvmlDeviceGetMemoryInfo, handle)
    return GpuReading(
        name=str(nvml.nvmlDeviceGetName(handle)),
        temperature_celsius=told(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        power_watts=watts(nvml.nvmlDeviceGetPowerUsage, handle),
        sm_clock_mhz=told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        memory_used_bytes=None if memory is None else int(memory.used),
        throttled_by=tuple(_throttle_reasons(handle)),
    )


def _throttle_reasons(handle: Any) -> Iterator[str]:
    nvml = _nvml()
    current = told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    for constant, reason in THROTTLE_REASONS.items():
        if current & getattr(nvml, constant, 0):
            yield reason

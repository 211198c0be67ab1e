"""What on this machine would spoil a measurement, or keep a backend from running, and what fixes it.

Owns the checks, and looking for the facts that they judge. The two are apart: a check is a pure function from facts to
a finding, and says so where all is well too. Which runtimes are installed is `bench.machine.installed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import sensors
from bench.machine.environment import BUSY_PERCENT, allowed_cpus, cpu_busy_percent, cpu_quota, load_1min
from bench.machine.findings import Finding, Severity
from bench.machine.installed import Broken, OnnxRuntime, Torch, installed_onnxruntime, installed_torch

GOVERNORS = Path("/sys/devices/system/cpu")
DRIVER_LIBRARY = "libcuda.so.1"
# NVML gives limits in milliwatts; a limit that is the default but for rounding is no cap.
CAPPED_BELOW = 0.99
REINSTALL = "python -m pip install --force-reinstall onnxruntime-gpu"


@dataclass(frozen=True)
class GpuPower:
    """The power limit of a GPU and what it leaves the factory with, in watts; None where it doesn't tell."""

    name: str
    limit_w: float | None
    default_limit_w: float | None


def examine(threads: int) -> list[Finding]:
    """Look at this machine and judge it, for runs with that many threads. Takes the seconds that importing takes."""
    busy = cpu_busy_percent()  # before this process itself uses the CPUs
    gpus = _gpus()
    torch = installed_torch()
    onnxruntime = installed_onnxruntime()
    return [
        check_torch(torch, bool(gpus)),
        *check_onnxruntime(onnxruntime, bool(gpus)),
        *check_versions(torch, onnxruntime, bool(gpus)),
        *check_libraries(onnxruntime, bool(gpus)),
        check_cpus(allowed_cpus(), cpu_quota(), threads),
        *check_governors(_governors()),
        *check_power(gpus),
        check_load(busy, load_1min()),
    ]


def check_torch(torch: Torch | Broken, gpu: bool) -> Finding:
    """Whether torch can be imported, and knows CUDA where there is a GPU."""
    if isinstance(torch, Broken):
        return Finding(
            Severity.ERROR,
            "torch",
            f"it can't be imported: {torch.reason}",
            "python -m pip install --force-reinstall torch",
        )
    if gpu and torch.cuda is None:
        return Finding(
            Severity.WARNING,
            "torch",
            f"torch {torch.version} is built without CUDA, and this machine has an NVIDIA GPU",
            "install a build with CUDA (https://pytorch.org/get-started/locally), or go without the CUDA backends",
        )
    return Finding(Severity.OK, "torch", f"torch {torch.version}, CUDA {torch.cuda or 'not built in'}")


def check_onnxruntime(onnxruntime: OnnxRuntime | Broken, gpu: bool) -> Iterator[Finding]:
    """Whether one package, and the right one, owns the onnxruntime that is imported.

    onnxruntime and onnxruntime-gpu install into one folder. Installed together, whichever came last has overwritten
    the other's files, and uninstalling either leaves a folder with holes.
    """
    name = "onnxruntime"
    if isinstance(onnxruntime, Broken):
        yield Finding(Severity.ERROR, name, f"it can't be imported: {onnxruntime.reason}", REINSTALL)
        return
    owners = ", ".join(f"{owner.name} {owner.version}" for owner in onnxruntime.owners)
    if onnxruntime.version is None:
        yield Finding(
            Severity.ERROR,
            name,
            f"{onnxruntime.folder} holds only leftovers of it, as after one of two packages in one folder was "
            "uninstalled",
            f"delete {onnxruntime.folder}, then {REINSTALL}",
        )
        return
    itself = (
        f"{onnxruntime.package or 'a build without a name'} {onnxruntime.version}, imported from {onnxruntime.folder}"
    )
    if len(onnxruntime.owners) > 1:
        names = " ".join(owner.name for owner in onnxruntime.owners)
        yield Finding(
            Severity.ERROR,
            name,
            f"{owners} are installed into one folder, each over the other's files; what runs is {itself}",
            f"python -m pip uninstall {names}, then install one of them (onnxruntime-gpu has the CPU provider too)",
        )
        return
    for owner in onnxruntime.owners:
        if owner.version != onnxruntime.version or onnxruntime.package not in (None, owner.name):
            yield Finding(
                Severity.WARNING,
                name,
                f"the installer's record says {owners}, but what runs is {itself}: the record is stale",
                REINSTALL,
            )
            return
    for other in onnxruntime.others:
        yield Finding(
            Severity.WARNING,
            name,
            f"{other.name} {other.version} is recorded as installed too, and is not what runs: that is {itself}",
            f"python -m pip uninstall {other.name}; where pip can't, delete its .dist-info folder",
        )
    if gpu and onnxruntime.cuda is None:
        yield Finding(
            Severity.WARNING,
            name,
            f"{itself}, is built without CUDA, and this machine has an NVIDIA GPU",
            f"python -m pip uninstall {owners.split(' ')[0] or name}, then python -m pip install onnxruntime-gpu",
        )
    elif not onnxruntime.others:
        yield Finding(Severity.OK, name, f"{itself}, CUDA {onnxruntime.cuda or 'not built in'}")


def check_versions(torch: Torch | Broken, onnxruntime: OnnxRuntime | Broken, gpu: bool) -> Iterator[Finding]:
    """Whether torch and onnxruntime can share CUDA and cuDNN in one process. Without a GPU it does no harm yet."""
    if isinstance(torch, Broken) or isinstance(onnxruntime, Broken) or torch.cuda is None or onnxruntime.cuda is None:
        return
    pairs = (
        ("CUDA", _major(torch.cuda), _major(onnxruntime.cuda)),
        ("cuDNN", torch.cudnn_major, onnxruntime.cudnn_major),
    )
    for name, of_torch, of_onnxruntime in pairs:
        if of_torch is None or of_onnxruntime is None:
            continue
        if of_torch == of_onnxruntime:
            yield Finding(Severity.OK, name, f"torch and onnxruntime are both built for {name} {of_torch}")
        else:
            yield Finding(
                Severity.ERROR if gpu else Severity.WARNING,
                name,
                f"torch is built for {name} {of_torch}, onnxruntime for {name} {of_onnxruntime}: onnx-cuda can't start",
                f"install an onnxruntime-gpu for {name} {of_torch}, or a torch for {name} {of_onnxruntime}",
            )


def check_libraries(onnxruntime: OnnxRuntime | Broken, gpu: bool) -> Iterator[Finding]:
    """Whether everything is there that onnxruntime's CUDA provider loads; without it onnxruntime runs on the CPU."""
    if isinstance(onnxruntime, Broken) or onnxruntime.missing is None:
        return
    name = "CUDA libraries"
    missing = [library for library in onnxruntime.missing if library != DRIVER_LIBRARY]
    if missing:
        yield Finding(
            Severity.ERROR if gpu else Severity.WARNING,
            name,
            f"onnxruntime's CUDA provider needs {', '.join(missing)}, which can't be loaded",
            f"install a torch built for CUDA {onnxruntime.cuda}: it brings them, and is imported before onnxruntime",
        )
    else:
        yield Finding(Severity.OK, name, "all that onnxruntime's CUDA provider needs can be loaded")
    if DRIVER_LIBRARY not in onnxruntime.missing:
        yield Finding(Severity.OK, "NVIDIA driver", f"{DRIVER_LIBRARY} can be loaded")
    elif gpu:
        yield Finding(
            Severity.ERROR,
            "NVIDIA driver",
            f"there is a GPU, but {DRIVER_LIBRARY} can't be loaded: programs can look at the GPU, not compute on it",
            "in a container: set NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the driver again",
        )
    else:
        yield Finding(Severity.OK, "NVIDIA driver", "none, and no NVIDIA GPU: the CUDA backends can't run here")


def check_cpus(allowed: int, quota: float | None, threads: int) -> Finding:
    """Whether as many threads can run as are meant to. `quota` is in CPUs; None for no limit."""
    name = "CPUs"
    if quota is not None and threads > quota:
        return Finding(
            Severity.ERROR,
            name,
            f"{threads} threads on a quota of {quota:g} CPUs: the system stops them in the middle of calls",
            f"raise the quota (docker run --cpus {threads}), or measure with --threads {max(1, int(quota))}",
        )
    if threads > allowed:
        return Finding(
            Severity.ERROR,
            name,
            f"{threads} threads on {allowed} CPUs: they wait for each other in every call",
            f"measure with --threads {allowed}, or allow this process more CPUs (taskset, docker run --cpuset-cpus)",
        )
    if quota is not None and quota < allowed:
        return Finding(
            Severity.WARNING,
            name,
            f"a quota of {quota:g} CPUs, spread over {allowed}: {threads} threads fit, but a runtime that counts CPUs "
            f"by itself starts {allowed}",
            f"pin the process to as many CPUs as it may use (taskset -c 0-{max(1, int(quota)) - 1})",
        )
    return Finding(Severity.OK, name, f"{threads} threads on {allowed} CPUs, without a quota below that")


def check_governors(governors: Sequence[str]) -> Iterator[Finding]:
    """Whether the CPUs keep their clock up. Virtual machines have no governor: nothing is said then."""
    slow = sorted(set(governors) - {"performance"})
    if slow:
        yield Finding(
            Severity.WARNING,
            "CPU governor",
            f"{', '.join(slow)}: the clock follows the load, so that short runs are timed while it rises",
            "sudo cpupower frequency-set --governor performance",
        )
    elif governors:
        yield Finding(Severity.OK, "CPU governor", "performance")


def check_power(gpus: Sequence[GpuPower]) -> Iterator[Finding]:
    """Whether a GPU may draw less power than it is made for."""
    for index, gpu in enumerate(gpus):
        if gpu.limit_w is None or gpu.default_limit_w is None:
            yield Finding(Severity.OK, "GPU power", f"{gpu.name} doesn't tell its power limit")
        elif gpu.limit_w < CAPPED_BELOW * gpu.default_limit_w:
            yield Finding(
                Severity.WARNING,
                "GPU power",
                f"{gpu.name} is capped at {gpu.limit_w:.0f} W; its default is {gpu.default_limit_w:.0f} W",
                f"sudo nvidia-smi --id={index} --power-limit={gpu.default_limit_w:.0f}",
            )
        else:
            yield Finding(Severity.OK, "GPU power", f"{gpu.name} may draw {gpu.limit_w:.0f} W")


def check_load(busy_percent: float, load: float | None) -> Finding:
    """Whether the machine does something else. `load` is the average over the last minute; None on Windows."""
    seen = f"other processes use {busy_percent:.0f} % of the CPUs"
    if load is not None:
        seen += f"; load average {load:.1f}"
    if busy_percent > BUSY_PERCENT:
        return Finding(
            Severity.WARNING,
            "load",
            f"{seen}: figures will be low and scatter",
            "wait for them or end them, then measure; bench ab, whose rounds are paired, suffers least",
        )
    return Finding(Severity.OK, "load", seen)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _governors() -> list[str]:
    """The frequency governor of every CPU that has one."""
    return [path.read_text().strip() for path in GOVERNORS.glob("cpu[0-9]*/cpufreq/scaling_governor")]


def _gpus() -> list[GpuPower]:
    """The NVIDIA GPUs of this machine; none without a driver."""
    import pynvml

    return [
        GpuPower(
            name=str(pynvml.nvmlDeviceGetName(handle)),
            limit_w=sensors.watts(pynvml.nvmlDeviceGetPowerManagementLimit, handle),
            default_limit_w=sensors.watts(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle),
        )
        for handle in sensors.gpus()
    ]

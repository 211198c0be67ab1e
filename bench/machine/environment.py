"""The machine and the software that a measurement was made with.

Owns finding out how many CPUs this process may use, describing CPU, GPUs, memory, load, versions and commit, and what
makes two measurements those of one machine. Imports no runtime: what a worker's runtime says of itself comes from the
worker.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import sensors
from export.bundle.foundations import git_commit, installed

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
BUSY_WINDOW_S = 0.3
# What a machine that does nothing else uses for itself stays well below.
BUSY_PERCENT = 10


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML names it."""

    name: str
    driver: str
    memory_bytes: int
    power_limit_w: float | None


@dataclass(frozen=True)
class Environment:
    """A machine at one moment. `usable_cpus` respects affinity and cgroup quota; `load_1min` is None on Windows.

    `cpu_busy_percent` is how much of all CPUs the machine used while this process did nothing.
    """

    platform: str
    python: str
    versions: dict[str, str]
    cpu: str
    logical_cpus: int
    physical_cpus: int | None
    usable_cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    load_1min: float | None
    cpu_busy_percent: float
    git_commit: str | None


def fingerprint(machine: Environment, threads: int, profile: str) -> dict[str, str]:
    """What two measurements must have in common to be compared, for people to read: the machine, and the settings that
    change what it does.

    Memory counts by class, to the nearest half power of two of GiB: the firmware's share of it differs from boot to
    boot. Versions of runtimes are left out: comparing them is what a comparison is for.
    """
    memory_gib = 2 ** (round(2 * math.log2(machine.memory_bytes / 2**30)) / 2)
    gpus = ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in machine.gpus)
    return {
        "CPU": machine.cpu,
        "usable CPUs": str(machine.usable_cpus),
        "memory": f"about {memory_gib:.0f} GiB",
        "GPUs": gpus or "none",
        "threads": str(threads),
        "profile": profile,
    }


def usable_cpus(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> int:
    """How many CPUs this process may use, at least 1: its affinity, cut to the cgroup's CPU quota where it has one."""
    quota = cpu_quota(cgroup_root, own_cgroup)
    # Half a CPU of quota still runs one thread; 2.5 run two without being stopped in the middle of a call.
    return max(1, allowed_cpus() if quota is None else min(allowed_cpus(), math.floor(quota)))


def allowed_cpus() -> int:
    """How many CPUs this process may be scheduled on, whatever its quota of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> float | None:
    """The CPU time that this process's cgroups grant it, in CPUs (2.5 is two and a half); None for no limit."""
    return min(_cgroup_quotas(cgroup_root, own_cgroup), default=None)


def _cgroup_quotas(root: Path, membership: Path) -> list[float]:
    """The CPU quotas, in CPUs, of the process's cgroup and of all above it, in version 2 and version 1 of cgroups."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return []
    quotas: list[float] = []
    files: tuple[str, ...]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, files = root / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(base) and (quota := _quota(folder, files)) is not None:
                quotas.append(quota)
    return quotas


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    """Quota over period of one cgroup; None where it has no limit."""
    try:
        words = " ".join((folder / name).read_text() for name in files).split()
    except OSError:
        return None
    quota, period = words[:2]
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def describe() -> Environment:
    """Look at the machine. Takes about half a second, and no CPU afterwards."""
    import cpuinfo
    import psutil

    return Environment(
        platform=platform.platform(),
        python=platform.python_version(),
        versions=installed("ninefold", "numpy", "scipy"),
        cpu=cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        logical_cpus=os.cpu_count() or 1,
        physical_cpus=psutil.cpu_count(logical=False),
        usable_cpus=usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpus(),
        load_1min=load_1min(),
        cpu_busy_percent=cpu_busy_percent(),
        git_commit=git_commit(Path(__file__), dirty=True),
    )


def load_1min() -> float | None:
    """The machine's load average over the last minute; None on Windows, which has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_busy_percent() -> float:
    """Share of all CPUs in use, in percent, watched for a moment in which this process sleeps."""
    import psutil

    return float(psutil.cpu_percent(interval=BUSY_WINDOW_S))


def mostly_busy(percents: Sequence[float]) -> bool:
    """Whether others used more than `BUSY_PERCENT` of the CPUs most of the times that this was looked at."""
    return statistics.median(percents) > BUSY_PERCENT


def _gpus() -> tuple[Gpu, ...]:
    import pynvml

    return tuple(
        Gpu(
            name=str(pynvml.nvmlDeviceGetName(handle)),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            power_limit_w=sensors.watts(pynvml.nvmlDeviceGetPowerManagementLimit, handle),
        )
        for handle in sensors.gpus()
    )

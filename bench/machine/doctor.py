"""What on this machine would spoil a measurement, or keep a backend from running, and what fixes it.

Owns the checks, and looking for the facts that they judge. The two are apart: a check is a pure function from facts to
a finding, and says so where all is well too. Knows nothing of bundles and measures nothing.

Runtimes are asked themselves, by importing them: what the installer's records say can be stale.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.machine import sensors
from bench.machine.environment import BUSY_PERCENT, allowed_cpus, cpu_busy_percent, cpu_quota, load_1min

GOVERNORS = Path("/sys/devices/system/cpu")
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
DRIVER_LIBRARY = "libcuda.so.1"
CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"
# NVML gives limits in milliwatts; a limit that is the default but for rounding is no cap.
CAPPED_BELOW = 0.99
REINSTALL = "python -m pip install --force-reinstall onnxruntime-gpu"


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Measuring is possible; figures may be low, may scatter, or are not what a reader expects."""
    ERROR = "error"
    """A backend can't run, runs something else than it says, or is stopped in the middle of calls."""


@dataclass(frozen=True)
class Finding:
    """What a check saw. `fix` is what to do about it; None where all is well."""

    severity: Severity
    check: str
    seen: str
    fix: str | None = None


@dataclass(frozen=True)
class Distribution:
    """An installed package as its installer recorded it."""

    name: str
    version: str


@dataclass(frozen=True)
class Broken:
    """A runtime that could not be imported, and why."""

    reason: str


@dataclass(frozen=True)
class Torch:
    """What the imported torch says of itself. `cuda` is None for a build without CUDA."""

    version: str
    cuda: str | None
    cudnn_major: int | None


@dataclass(frozen=True)
class OnnxRuntime:
    """What the imported onnxruntime says of itself, and whose its files are.

    Attributes:
        package: the distribution that this build was made for, such as ``onnxruntime-gpu``; None where it doesn't say.
        version: None for a folder of leftovers, which imports as an empty module.
        cuda: the version of CUDA that it was built for; None for a build without.
        cudnn_major: the cuDNN that its owner's metadata asks for; None where it asks for none.
        owners: the distributions whose records list the file that was imported.
        others: further distributions that should be onnxruntime and don't own it.
        missing: shared libraries that its CUDA provider needs and that can't be loaded after torch was imported; None
            where this can't be found out (no CUDA provider, or not Linux).
    """

    folder: str
    package: str | None
    version: str | None
    cuda: str | None
    cudnn_major: int | None
    owners: tuple[Distribution, ...]
    others: tuple[Distribution, ...]
    missing: tuple[str, ...] | None


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
    torch = _torch()
    onnxruntime = _onnxruntime()
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


def check_onnxruntime(found: OnnxRuntime | Broken, gpu: bool) -> Iterator[Finding]:
    """Whether one package, and the right one, owns the onnxruntime that is imported.

    onnxruntime and onnxruntime-gpu install into one folder. Installed together, whichever came last has overwritten
    the other's files, and uninstalling either leaves a folder with holes.
    """
    name = "onnxruntime"
    if isinstance(found, Broken):
        yield Finding(Severity.ERROR, name, f"it can't be imported: {found.reason}", REINSTALL)
        return
    owners = ", ".join(f"{owner.name} {owner.version}" for owner in found.owners)
    if found.version is None:
        yield Finding(
            Severity.ERROR,
            name,
            f"{found.folder} holds only leftovers of it, as after one of two packages in one folder was uninstalled",
            f"delete {found.folder}, then {REINSTALL}",
        )
        return
    itself = f"{found.package or 'a build without a name'} {found.version}, imported from {found.folder}"
    if len(found.owners) > 1:
        names = " ".join(owner.name for owner in found.owners)
        yield Finding(
            Severity.ERROR,
            name,
            f"{owners} are installed into one folder, each over the other's files; what runs is {itself}",
            f"python -m pip uninstall {names}, then install one of them (onnxruntime-gpu has the CPU provider too)",
        )
        return
    for owner in found.owners:
        if owner.version != found.version or found.package not in (None, owner.name):
            yield Finding(
                Severity.WARNING,
                name,
                f"the installer's record says {owners}, but what runs is {itself}: the record is stale",
                REINSTALL,
            )
            return
    for other in found.others:
        yield Finding(
            Severity.WARNING,
            name,
            f"{other.name} {other.version} is recorded as installed too, and is not what runs: that is {itself}",
            f"python -m pip uninstall {other.name}; where pip can't, delete its .dist-info folder",
        )
    if gpu and found.cuda is None:
        yield Finding(
            Severity.WARNING,
            name,
            f"{itself}, is built without CUDA, and this machine has an NVIDIA GPU",
            f"python -m pip uninstall {owners.split(' ')[0] or name}, then python -m pip install onnxruntime-gpu",
        )
    elif not found.others:
        yield Finding(Severity.OK, name, f"{itself}, CUDA {found.cuda or 'not built in'}")


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


def _torch() -> Torch | Broken:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return Broken(str(error))
    cudnn: Any = torch.backends.cudnn
    number = cudnn.version() if torch.version.cuda else None
    # 8902 is 8.9.2, and since version 9 there are two digits more: 92400 is 9.24.0.
    major = None if number is None else number // (1_000 if number < 10_000 else 10_000)
    return Torch(torch.__version__, torch.version.cuda, major)


def _onnxruntime() -> OnnxRuntime | Broken:
    """To be called after `_torch`: bench's CUDA backends import torch first, so that both share its libraries."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        return Broken(str(error))
    version = getattr(onnxruntime, "__version__", None)
    folder = Path(next(iter(onnxruntime.__path__)))
    owners, others = whose(folder / "__init__.py", metadata.distributions())
    cudnn_major = next((major for owner in owners if (major := _cudnn_major(owner.requires or ())) is not None), None)
    return OnnxRuntime(
        folder=str(folder),
        package=getattr(onnxruntime, "package_name", None),
        version=version,
        cuda=getattr(onnxruntime, "cuda_version", None) or None,
        cudnn_major=cudnn_major,
        owners=_named(owners),
        others=_named(others),
        missing=_missing(folder / "capi" / CUDA_PROVIDER, cudnn_major),
    )


def whose(file: Path, installed: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """The installed distributions whose records list the file of onnxruntime's package, and those that list it at
    another place, or are named after it and have no record at all.
    """
    owners: list[Any] = []
    others: list[Any] = []
    for distribution in installed:
        # Packages such as onnxruntime-extensions have a folder of their own and do no harm.
        listed = [entry for entry in distribution.files or () if str(entry) == f"onnxruntime/{file.name}"]
        if any(Path(str(distribution.locate_file(entry))).resolve() == file.resolve() for entry in listed):
            owners.append(distribution)
        elif listed or (distribution.files is None and _normal(distribution.name) in PACKAGES):
            others.append(distribution)
    return owners, others


def _named(distributions: Sequence[Any]) -> tuple[Distribution, ...]:
    """Each once: a folder that is on the path twice lists its distributions twice."""
    return tuple(dict.fromkeys(Distribution(_normal(found.name), found.version) for found in distributions))


def _normal(name: str) -> str:
    """A distribution's name as the index spells it: ``onnxruntime_gpu`` is ``onnxruntime-gpu``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _cudnn_major(requirements: Sequence[str]) -> int | None:
    """The cuDNN that a distribution's extras ask for, as in ``nvidia-cudnn-cu13~=9.0; extra == "cudnn"``."""
    found = (re.match(r"nvidia-cudnn-cu\d+\s*[~=>]=\s*(\d+)", requirement) for requirement in requirements)
    return next((int(match[1]) for match in found if match), None)


def _missing(provider: Path, cudnn_major: int | None) -> tuple[str, ...] | None:
    """The shared libraries that a provider needs and that can't be loaded; None where there is no way to know.

    cuDNN is not among those that the file names: onnxruntime opens it at the first use.
    """
    if sys.platform != "linux" or not provider.exists():
        return None
    names = [*needed_libraries(provider), *([] if cudnn_major is None else [f"libcudnn.so.{cudnn_major}"])]
    return tuple(name for name in names if not _loads(name))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def needed_libraries(file: Path) -> tuple[str, ...]:
    """The shared libraries that a 64-bit little-endian ELF file names as needed (System V ABI, ch. 5, `DT_NEEDED`)."""
    load, dynamic, strings, needed = 1, 2, 5, 1
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (table,) = struct.unpack_from("<Q", content, 32)
        size, count = struct.unpack_from("<HH", content, 54)
        # type, offset in the file, address in memory, size in the file
        segments = [struct.unpack_from("<I4xQQ8xQ", content, table + index * size) for index in range(count)]
        start, length = next((offset, size) for kind, offset, _, size in segments if kind == dynamic)
        entries = list(struct.iter_unpack("<QQ", content[start : start + length]))
        address = next(value for tag, value in entries if tag == strings)
        names = next(
            address - at + offset for kind, offset, at, size in segments if kind == load and at <= address < at + size
        )
        found = (content[names + value : content.find(b"\0", names + value)] for tag, value in entries if tag == needed)
        return tuple(name.decode() for name in found)


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

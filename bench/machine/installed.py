"""Which torch and which onnxruntime are installed, and whose files they are.

Runtimes are asked themselves, by importing them: what the installer's records say can be stale."""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"


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


def installed_torch() -> Torch | Broken:
    """What torch says of itself when it is imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return Broken(str(error))
    cudnn: Any = torch.backends.cudnn
    number = cudnn.version() if torch.version.cuda else None
    # 8902 is 8.9.2, and since version 9 there are two digits more: 92400 is 9.24.0.
    major = None if number is None else number // (1_000 if number < 10_000 else 10_000)
    return Torch(torch.__version__, torch.version.cuda, major)


def installed_onnxruntime() -> OnnxRuntime | Broken:
    """To be called after `installed_torch`: bench's CUDA backends import torch first, so that both share libraries."""
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
    return tuple(
        dict.fromkeys(Distribution(_normal(distribution.name), distribution.version) for distribution in distributions)
    )


def _normal(name: str) -> str:
    """A distribution's name as the index spells it: ``onnxruntime_gpu`` is ``onnxruntime-gpu``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _cudnn_major(requirements: Sequence[str]) -> int | None:
    """The cuDNN that a distribution's extras ask for, as in ``nvidia-cudnn-cu13~=9.0; extra == "cudnn"``."""
    matches = (re.match(r"nvidia-cudnn-cu\d+\s*[~=>]=\s*(\d+)", requirement) for requirement in requirements)
    return next((int(match[1]) for match in matches if match), None)


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
        names_of_needed = (
            content[names + value : content.find(b"\0", names + value)] for tag, value in entries if tag == needed
        )
        return tuple(name.decode() for name in names_of_needed)

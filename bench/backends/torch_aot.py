"""torch's program compiled ahead of time by AOTInductor: a package with a shared library in it, run without compiling.

Owns loading such a package, and asking first what it was compiled for: a library for another processor would end the
process, one for another torch may. What can be known is in the package (platform, processor's instruction sets, the
GPU's compute capability; the sources, which name every kernel and the threads of those on the CPU) and in the bundle's
manifest (torch's version).
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import Backend, Options, Placement, Program, Runnable, Server, Setting, file_path, text
from bench.backends.torch_lines import torch_program
from bench.backends.torch_runtime import (
    TorchDevice,
    TorchSession,
    configure_torch,
    cpu_capabilities,
    torch_unavailable_reason,
)

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle, Format

MODEL = "model"
# Calls in the generated sources: torch's operators name the device, and so do the compiler's own kernels.
OPERATOR = re.compile(r"\baoti_torch_(cpu|cuda)_\w+\(")
FUSED = re.compile(r"^\s+(?:call_)?(cpp|triton)_\w+\(\(?", re.MULTILINE)
DEVICE_OF = {"cpp": "cpu", "triton": "cuda"}
FIXED_THREADS = re.compile(r"\bnum_threads\((\d+)\)")


class BuiltForAnotherMachine(Exception):
    """The package can't run here; says what it was compiled for and what this is."""


@dataclass(frozen=True)
class AheadOfTime:
    """An AOTInductor package of the bundle, for one kind of device."""

    device: TorchDevice
    reference: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    shows_fold: ClassVar[bool] = False
    server: ClassVar[Server | None] = None

    @property
    def name(self) -> str:
        return f"aoti-{self.device}"

    @property
    def formats(self) -> tuple[Format, ...]:
        return ("aoti-cpu",) if self.device == "cpu" else ("aoti-cuda",)

    def unavailable_reason(self) -> str | None:
        if (reason := torch_unavailable_reason(self.device)) is not None:
            return reason
        import torch

        if not hasattr(torch._C, "_aoti"):
            return f"torch {torch.__version__} can't load AOTInductor packages. Install torch 2.11 or newer."
        return None

    def program(self, file: Runnable) -> Program:
        load = [
            "# torch._inductor.aoti_load_package is the public way; it flattens and unflattens at every call.",
            f"package = torch._C._aoti.AOTIModelPackageLoader({text(file.path)}, {text(MODEL)}, False, 1, -1)",
            "module = lambda x: package.run([x])[0]",
        ]
        return torch_program(file, load)

    def load(self, bundle: Bundle, options: Options) -> TorchSession:
        import torch

        configure_torch(options)
        path = file_path(self, bundle, options)
        loader_of: Any = torch._C._aoti.AOTIModelPackageLoader
        built_for: dict[str, str] = loader_of.load_metadata_from_package(str(path), MODEL)
        sources = "\n".join(_sources(path))
        problems = [
            *mismatches(built_for, self.device),
            *version_mismatch(bundle.manifest.environment.versions.get("torch"), torch.__version__),
            *(thread_mismatch(sources, options.threads) if self.device == "cpu" else ()),
        ]
        if problems:
            raise BuiltForAnotherMachine(
                f"{path.name} can't run here as asked: {'; '.join(problems)}. Export the bundle again on this machine."
            )
        loader = loader_of(str(path), MODEL, False, 1, -1)
        settings: dict[str, Setting] = {f"built_for.{name}": value for name, value in built_for.items() if value}
        placement = read_placement(sources, built_for, self.device)
        return TorchSession(_Package(loader), bundle, self.device, options, placement, settings)


class _Package:
    """The loaded package as a function of tensors."""

    def __init__(self, loader: Any) -> None:
        self._run = loader.run

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._run(list(inputs)))


def mismatches(built_for: dict[str, str], device: TorchDevice) -> Iterator[str]:
    """Where a package says that it was compiled for something else than what is here. What it doesn't say is passed
    over.
    """
    import platform
    import sys

    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_DEVICE_KEY": device}
    if device == "cuda":
        here["AOTI_COMPUTE_CAPABILITY"] = _compute_capability()
    for name, value in here.items():
        wanted = built_for.get(name) or value
        if wanted != value:
            what = name.removeprefix("AOTI_").lower().replace("_", " ")
            yield f"it was compiled for {what} {wanted}, this is {value}"
    if device == "cpu":
        missing = _missing_instructions(built_for.get("AOTI_CPU_ISA", ""))
        if missing:
            yield f"it was compiled for a processor with {', '.join(missing)}, which this one lacks"


def _missing_instructions(wanted: str) -> list[str]:
    """Those of the instruction sets, in torch's words (``AVX512 AVX512_VNNI``), that this processor lacks."""
    have = cpu_capabilities()
    names = {word: {"avx512": "avx512_f"}.get(word, word) for word in wanted.lower().split()}
    return [word for word, name in names.items() if have.get(name) is False]


def _compute_capability() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return str(10 * major + minor)


def version_mismatch(wanted: str | None, here: str) -> Iterator[str]:
    """torch promises nothing for a package of another minor version."""
    if wanted is not None and wanted.split(".")[:2] != here.split(".")[:2]:
        yield f"it was compiled by torch {wanted}, this is torch {here}"


def thread_mismatch(sources: str, threads: int) -> Iterator[str]:
    """Kernels can have their number of threads compiled in; then no setting changes it."""
    for fixed in {int(count) for count in FIXED_THREADS.findall(sources)} - {threads}:
        yield f"its kernels use {fixed} threads whatever is asked for, and {threads} are asked for"


def read_placement(sources: str, built_for: dict[str, str], device: TorchDevice) -> Placement:
    """Where the calls in the sources of a package go; and by what it says of itself, where it holds none."""
    nodes = Counter([*OPERATOR.findall(sources), *(DEVICE_OF[kind] for kind in FUSED.findall(sources))])
    stray = [f"{count} calls of the package are made on {place}" for place, count in nodes.items() if place != device]
    said = built_for.get("AOTI_DEVICE_KEY")
    if said != device:
        stray.append(f"the package says that it is for {said or 'no device'}")
    evidence = f"the package says {said}, and the device in the name of every call of its sources"
    return Placement(nodes=dict(nodes), stray=tuple(stray), evidence=evidence)


def _sources(package: Path) -> Iterator[str]:
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".cpp"):
                yield archive.read(name).decode(errors="replace")


CPU: Backend = AheadOfTime("cpu")
CUDA: Backend = AheadOfTime("cuda")

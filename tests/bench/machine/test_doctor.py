"""Each check against machines that have, and have not, what it looks for; and the doctor on this machine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from bench.machine import doctor, installed
from bench.machine.doctor import (
    DRIVER_LIBRARY,
    GpuPower,
    check_cpus,
    check_governors,
    check_libraries,
    check_load,
    check_onnxruntime,
    check_power,
    check_torch,
    check_versions,
)
from bench.machine.findings import Finding, Severity
from bench.machine.installed import Broken, Distribution, OnnxRuntime, Torch

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR
TORCH = Torch("2.14", "13.0", 9)
GPU_OWNER = Distribution("onnxruntime-gpu", "1.31.1")
ORT = OnnxRuntime("/site/onnxruntime", "onnxruntime-gpu", "1.31.1", "13.0", 9, (GPU_OWNER,), (), ())


def severities(findings: Iterable[Finding]) -> list[Severity]:
    """Of what was found; a fix stands with everything that isn't well, and with nothing that is."""
    found = list(findings)
    for finding in found:
        assert (finding.fix is None) == (finding.severity is OK), finding
        assert finding.seen
    return [finding.severity for finding in found]


def test_a_healthy_machine() -> None:
    found = [
        check_torch(TORCH, True),
        *check_onnxruntime(ORT, True),
        *check_versions(TORCH, ORT, True),
        *check_libraries(ORT, True),
        check_cpus(8, None, 8),
        *check_governors(["performance"] * 8),
        *check_power([GpuPower("H100", 700.0, 700.0)]),
        check_load(1.0, 0.2),
    ]
    assert severities(found) == [OK] * len(found)
    assert [finding.check for finding in found] == [
        "torch",
        "onnxruntime",
        "CUDA",
        "cuDNN",
        "CUDA libraries",
        "NVIDIA driver",
        "CPUs",
        "CPU governor",
        "GPU power",
        "load",
    ]


def test_torch() -> None:
    assert severities([check_torch(Broken("no libc10.so"), False)]) == [ERROR]
    assert severities([check_torch(Torch("2.14+cpu", None, None), True)]) == [WARNING]
    assert severities([check_torch(Torch("2.14+cpu", None, None), False)]) == [OK]


def test_two_packages_in_one_folder() -> None:
    both = replace(ORT, owners=(Distribution("onnxruntime", "1.22.0"), GPU_OWNER))
    (finding,) = check_onnxruntime(both, False)
    assert severities([finding]) == [ERROR]
    assert "onnxruntime 1.22.0, onnxruntime-gpu 1.31.1" in finding.seen
    assert finding.fix is not None
    assert "pip uninstall onnxruntime onnxruntime-gpu" in finding.fix


@pytest.mark.parametrize(
    ("found", "gpu", "want", "word"),
    [
        (Broken("libcudart.so.13"), False, ERROR, "libcudart.so.13"),
        (replace(ORT, version=None), False, ERROR, "leftovers"),
        (replace(ORT, owners=(Distribution("onnxruntime-gpu", "1.20.0"),)), False, WARNING, "stale"),
        (replace(ORT, owners=(Distribution("onnxruntime", "1.31.1"),)), False, WARNING, "stale"),
        (replace(ORT, others=(Distribution("onnxruntime", "1.22.0"),)), False, WARNING, "not what runs"),
        (replace(ORT, package="onnxruntime", owners=(), cuda=None), True, WARNING, "without CUDA"),
        (replace(ORT, package="onnxruntime", owners=(), cuda=None), False, OK, "not built in"),
        (replace(ORT, package=None), False, OK, "a build without a name"),
    ],
)
def test_the_imported_onnxruntime(found: OnnxRuntime | Broken, gpu: bool, want: Severity, word: str) -> None:
    (finding,) = check_onnxruntime(found, gpu)
    assert severities([finding]) == [want]
    assert word in finding.seen


def install(folder: Path, name: str, files: list[str] | None) -> None:
    """A distribution as pip leaves it: the record lists its files; None for one without a record."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if files is not None:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files or ():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()


def test_whose_file_it_is(tmp_path: Path) -> None:
    """Told by the records, the file's place and nothing else; its relatives with folders of their own don't count."""
    site, user = tmp_path / "site", tmp_path / "user"
    install(site, "onnxruntime", ["onnxruntime/__init__.py"])
    install(site, "onnxruntime-gpu", ["onnxruntime/__init__.py", "onnxruntime/capi.so"])
    install(site, "onnxruntime-extensions", ["onnxruntime_extensions/__init__.py"])
    install(site, "numpy", ["numpy/__init__.py"])
    install(user, "onnxruntime-openvino", ["onnxruntime/__init__.py"])
    (tmp_path / "link").symlink_to(site)
    found = metadata.distributions(path=[str(site), str(user)])
    owners, others = installed.whose(tmp_path / "link" / "onnxruntime" / "__init__.py", found)
    assert sorted(owner.name for owner in owners) == ["onnxruntime", "onnxruntime-gpu"]
    assert [other.name for other in others] == ["onnxruntime-openvino"]


def test_a_stale_record_is_seen(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", ["onnxruntime/__init__.py"])
    install(tmp_path, "onnxruntime", None)
    owners, others = installed.whose(
        tmp_path / "onnxruntime" / "__init__.py", metadata.distributions(path=[str(tmp_path)])
    )
    assert ([owner.name for owner in owners], [other.name for other in others]) == (
        ["onnxruntime-gpu"],
        ["onnxruntime"],
    )


def test_the_module_itself_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages in one folder that comes first on the path; the module says another version than either record."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, name, ["onnxruntime/__init__.py"])
    module = 'package_name = "onnxruntime-gpu"\n__version__ = "9.9"\ncuda_version = "12.8"\n'
    (tmp_path / "onnxruntime" / "__init__.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    found = installed.installed_onnxruntime()
    del sys.modules["onnxruntime"]  # the made-up one; the real one comes back by itself
    assert isinstance(found, OnnxRuntime)
    assert (found.package, found.version, found.cuda, found.missing) == ("onnxruntime-gpu", "9.9", "12.8", None)
    assert sorted(owner.name for owner in found.owners) == ["onnxruntime", "onnxruntime-gpu"]
    assert [finding.severity for finding in check_onnxruntime(found, False)] == [ERROR]


@pytest.mark.parametrize(
    ("torch", "onnxruntime", "want"),
    [
        (TORCH, replace(ORT, cuda="12.8"), [ERROR, OK]),
        (TORCH, replace(ORT, cuda="13.1"), [OK, OK]),
        (TORCH, replace(ORT, cudnn_major=8), [OK, ERROR]),
        (TORCH, replace(ORT, cudnn_major=None), [OK]),
        (replace(TORCH, cuda=None, cudnn_major=None), ORT, []),
        (TORCH, replace(ORT, cuda=None), []),
        (Broken("x"), ORT, []),
        (TORCH, Broken("x"), []),
    ],
)
def test_cuda_and_cudnn(torch: Torch | Broken, onnxruntime: OnnxRuntime | Broken, want: list[Severity]) -> None:
    assert severities(check_versions(torch, onnxruntime, True)) == want
    softer = [WARNING if severity is ERROR else severity for severity in want]
    assert severities(check_versions(torch, onnxruntime, False)) == softer, "it harms nobody without a GPU"


@pytest.mark.parametrize(
    ("missing", "gpu", "want"),
    [
        (("libcublas.so.13",), True, [ERROR, OK]),
        (("libcublas.so.13", DRIVER_LIBRARY), False, [WARNING, OK]),
        ((DRIVER_LIBRARY,), True, [OK, ERROR]),
        ((DRIVER_LIBRARY,), False, [OK, OK]),
        (None, True, []),
    ],
)
def test_libraries(missing: tuple[str, ...] | None, gpu: bool, want: list[Severity]) -> None:
    found = list(check_libraries(replace(ORT, missing=missing), gpu))
    assert severities(found) == want
    if missing and "libcublas.so.13" in missing:
        assert "needs libcublas.so.13, which" in found[0].seen


@pytest.mark.parametrize(
    ("allowed", "quota", "threads", "want"),
    [
        (8, None, 8, OK),
        (8, 8.0, 8, OK),
        (8, 16.0, 4, OK),
        (8, 2.5, 2, WARNING),
        (8, 2.5, 3, ERROR),
        (8, 0.5, 1, ERROR),
        (8, None, 9, ERROR),
    ],
)
def test_cpus(allowed: int, quota: float | None, threads: int, want: Severity) -> None:
    assert severities([check_cpus(allowed, quota, threads)]) == [want]


def test_governors() -> None:
    """Not a word where there is none, as in a virtual machine."""
    assert severities(check_governors([])) == []
    (finding,) = check_governors(["performance", "schedutil", "powersave"])
    assert severities([finding]) == [WARNING]
    assert finding.seen.startswith("powersave, schedutil")


def test_governors_are_read_of_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GOVERNORS", tmp_path)
    for name, governor in (("cpu0", "performance"), ("cpu11", "powersave")):
        (tmp_path / name / "cpufreq").mkdir(parents=True)
        (tmp_path / name / "cpufreq" / "scaling_governor").write_text(f"{governor}\n")
    (tmp_path / "cpufreq").mkdir()
    assert sorted(doctor._governors()) == ["performance", "powersave"]


def test_power() -> None:
    found = list(
        check_power(
            [GpuPower("H100", 700.0, 700.0), GpuPower("H100", 350.0, 700.0), GpuPower("T4", None, 70.0)],
        )
    )
    assert severities(found) == [OK, WARNING, OK]
    assert found[1].fix == "sudo nvidia-smi --id=1 --power-limit=700"


def test_load() -> None:
    assert severities([check_load(60.0, None)]) == [WARNING]
    assert severities([check_load(3.0, None)]) == [OK]


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
def test_needed_libraries_are_those_that_the_file_names() -> None:
    """The interpreter's own extension, and onnxruntime's provider where there is one."""
    import math

    assert math.__file__ is not None
    assert "libc.so.6" in installed.needed_libraries(Path(math.__file__))
    folder = Path(str(metadata.distribution("numpy").locate_file("onnxruntime"))) / "capi"
    if (folder / installed.CUDA_PROVIDER).exists():
        names = installed.needed_libraries(folder / installed.CUDA_PROVIDER)
        assert DRIVER_LIBRARY in names
        assert any(name.startswith("libcublas.so.") for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
def test_a_library_that_is_not_there_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "needed_libraries", lambda file: ("libc.so.6", "libnowhere.so.3"))
    provider = tmp_path / installed.CUDA_PROVIDER
    assert installed._missing(provider, 9) is None, "no provider, nothing to miss"
    provider.touch()
    ctypes.CDLL("libc.so.6")
    assert installed._missing(provider, 77) == ("libnowhere.so.3", "libcudnn.so.77")


def test_the_doctor_on_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "doctor", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    first = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["ok", "torch"] in first
    assert ["ok", "onnxruntime"] in first
    assert done.returncode == (1 if "error" in [line[0] for line in first if line] else 0)

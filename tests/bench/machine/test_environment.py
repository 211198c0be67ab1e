"""How many CPUs there really are, and what is recorded of a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.machine.environment import allowed_cpus, cpu_quota, describe, usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def cgroup(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return folder / "root", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "want"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 2),
        ("0::/pod/job\n", {"pod/cpu.max": "300000 100000\n", "pod/job/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/job\n", {"pod/cpu.max": "300000 100000\n", "pod/job/cpu.max": "600000 100000\n"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000\n"}, 1),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "400000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 4),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpuset:/\n", {}, 8),
        ("0::/gone\n", {}, 8),
    ],
)
def test_quotas_cut_the_affinity(own: str, files: dict[str, str], want: int, tmp_path: Path) -> None:
    assert usable_cpus(*cgroup(tmp_path, own, files)) == want


def test_without_cgroups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 2


def test_a_quota_is_told_in_cpus_as_it_stands(tmp_path: Path) -> None:
    assert cpu_quota(*cgroup(tmp_path, "0::/job\n", {"job/cpu.max": "250000 100000\n"})) == 2.5
    assert cpu_quota(*cgroup(tmp_path, "0::/gone\n", {})) is None
    assert allowed_cpus() == 8


def test_this_machine_is_described() -> None:
    found = describe()
    assert found.cpu
    assert found.logical_cpus >= 1
    assert 1 <= found.usable_cpus <= 8
    assert found.memory_bytes > 2**28
    assert 0 <= found.cpu_busy_percent <= 100
    assert found.versions["ninefold"]
    assert found.git_commit is None or len(found.git_commit.removesuffix("-dirty")) == 40

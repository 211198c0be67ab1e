"""Three rooms, one arrow: trainer ← export ← bench, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainer", "export", "bench")
HEAVY = ("torch", "torchvision", "onnxruntime", "onnx", "matplotlib", "scipy")


def imported(path: Path) -> set[str]:
    """Every module that the file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def rooms(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] in PACKAGES}


def test_trainer_imports_neither_of_the_others() -> None:
    for path in files("trainer"):
        assert all(name.startswith("trainer") for name in rooms(path)), path


def test_export_imports_trainer_only() -> None:
    for path in files("export"):
        assert all(name.split(".")[0] in ("export", "trainer") for name in rooms(path)), path


def test_bench_imports_the_bundle_only() -> None:
    for path in files("bench"):
        foreign = {name for name in rooms(path) if not name.startswith("bench")} - {"export"}
        assert all(name == "export.bundle" or name.startswith("export.bundle.") for name in foreign), (path, foreign)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-c", f"import {package}"] for package in PACKAGES),
        *(["-m", package, "--help"] for package in PACKAGES),
        *(
            ["-m", "bench", command, "--help"]
            for command in ("run", "report", "compare", "doctor", "parity", "backends")
        ),
        ["-c", "import export.bundle, export.fold"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_before_it_is_needed(arguments: list[str]) -> None:
    program = (
        "import sys, runpy\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    exec(sys.argv[1]) if sys.argv[0] == '-c' else "
        "(sys.argv.pop(0), runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True))\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-300:]

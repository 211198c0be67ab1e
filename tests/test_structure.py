"""One arrow: trainer ← export ← bench; the walls between the rooms of bench; nothing heavy before it is needed.

docs/architecture.md says why each wall stands where it does.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainer", "export", "bench")
# Which rooms of bench, or which module of a room, a room may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "machine": set(),
    "backends": {"errors"},
    "results": {"errors", "machine", "backends.contract"},
    "worker": {"machine", "backends", "results"},
    "report": {"errors", "machine", "results"},
    "run": {"errors", "machine", "backends.contract", "backends.registry", "results", "worker"},
    "sweep": {"errors", "machine", "backends", "results", "run"},
    "cli": {"errors", "machine", "backends", "results", "report", "run", "sweep"},
    "__main__": {"cli"},
}
LONGEST_CHAIN = 15
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


def modules(bench: Path) -> dict[str, Path]:
    """Every module of bench by its name below `bench`: ``results.schema``; a package by that of its folder."""
    found = {".".join(path.relative_to(bench).with_suffix("").parts): path for path in sorted(bench.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(bench: Path) -> dict[str, set[str]]:
    """By each module of bench those that it imports, wherever in the file."""
    known = modules(bench)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {target.removeprefix("bench.") for target in imported(path) if target.startswith("bench.")}
        # `imported` names what is imported from a module as if that were a module too.
        found[name] = {target for target in targets if target in known} - {name}
    return found


def crossings(bench: Path) -> list[str]:
    """The imports between two rooms that `ALLOWED` doesn't name."""
    found = []
    for name, targets in imports(bench).items():
        room = name.partition(".")[0]
        for target in sorted(targets):
            allowed = {room, *ALLOWED.get(room, ())}
            if not any(target == wall or target.startswith(f"{wall}.") for wall in allowed):
                found.append(f"{name} imports {target}")
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way down the imports. Raises AssertionError for a circle."""
    longest: dict[str, list[str]] = {}

    def below(name: str, above: tuple[str, ...]) -> list[str]:
        assert name not in above, f"a circle of imports: {' → '.join((*above, name))}"
        if name not in longest:
            ways = [below(target, (*above, name)) for target in sorted(graph[name])]
            longest[name] = [name, *max(ways, key=len, default=[])]
        return longest[name]

    return max((below(name, ()) for name in graph), key=len)


def test_no_import_crosses_a_wall_of_bench() -> None:
    assert crossings(ROOT / "bench") == []


def test_an_import_that_crosses_is_found(tmp_path: Path) -> None:
    for name, text in {
        "errors": "",
        "backends/contract": "from bench.errors import BenchError",
        "backends/onnx": "def load():\n    from bench import errors",
        "results/schema": "from bench.backends.contract import Device\nfrom bench.backends import onnx",
        "report/page": "if TYPE_CHECKING:\n    from bench.run.plan import Plan",
        "run/plan": "import bench.report.page",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert crossings(tmp_path) == [
        "report.page imports run.plan",
        "results.schema imports backends.onnx",
        "run.plan imports report.page",
    ]
    with pytest.raises(AssertionError, match=r"a circle of imports: report.page → run.plan → report.page"):
        longest_chain(imports(tmp_path))


def test_only_what_every_room_needs_lies_flat() -> None:
    flat = {path.stem for path in (ROOT / "bench").glob("*.py")}
    rooms = {path.name for path in (ROOT / "bench").iterdir() if (path / "__init__.py").exists()}
    assert flat == {"__init__", "__main__", "errors"}
    assert rooms == ALLOWED.keys() - flat


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in files(package)
        if path.stem == "__init__"
    }
    assert sorted(listed) == sorted(there)


def test_imports_are_no_tower() -> None:
    longest = longest_chain(imports(ROOT / "bench"))
    assert len(longest) <= LONGEST_CHAIN, longest


def test_tests_stand_in_the_rooms_that_they_test() -> None:
    rooms = {path.parent.name for path in (ROOT / "tests" / "bench").glob("*/test_*.py")}
    assert rooms == {name for name in ALLOWED if (ROOT / "bench" / name).is_dir()}
    assert not list((ROOT / "tests" / "bench").glob("test_*.py"))


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

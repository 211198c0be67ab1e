"""The gate of `nox -s benchmark`: against the last run kept, and against the best."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "kept.py"


def test_a_slow_drift_does_not_pass(tmp_path: Path) -> None:
    """Each run is 10 % slower than the one before, which may be; the third is 21 % slower than the first."""
    runs = []
    for number, milliseconds in enumerate((10.0, 11.0, 12.1, 9.0)):
        path = tmp_path / f"{number}.json"
        entries = [{"fullname": "a", "stats": {"median": milliseconds / 1e3}}]
        entries += [{"fullname": f"new in {number}", "stats": {"median": 1.0}}]
        path.write_text(json.dumps({"benchmarks": entries}))
        runs.append(path)

    def kept(new: int, *before: int) -> subprocess.CompletedProcess[str]:
        files = [str(runs[number]) for number in (new, *before)]
        return subprocess.run([sys.executable, str(SCRIPT), *files], capture_output=True, text=True, check=False)

    assert kept(0).returncode == kept(1, 0).returncode == kept(3, 0, 1).returncode == 0
    drifted = kept(2, 0, 1)
    assert drifted.returncode == 1
    assert drifted.stdout == "a: 12.1 ms, 1.21 × the best kept (10 ms)\n"


def test_both_gates_allow_the_same() -> None:
    spec = importlib.util.spec_from_file_location("kept", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    kept = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kept)
    assert f'SLOWER = "median:{kept.SLOWER_PERCENT}%"' in (SCRIPT.parents[2] / "noxfile.py").read_text()

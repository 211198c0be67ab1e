"""The commit that a file says it was made by."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.provenance import cpu_name, git_commit, seconds_since_process_start, versions


def test_the_commit_is_that_of_a_checkout_that_tracks_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy installed inside somebody else's checkout must not carry that one's commit."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    installed = tmp_path / "cli.py"
    installed.write_text("")
    assert git_commit(installed) is None, "no checkout"
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "theirs")
    assert git_commit(installed) is None, "a checkout that does not track it"
    git("add", "cli.py")
    git("commit", "--quiet", "--message", "ours")
    assert git_commit(installed) == git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(installed) is None, "no git"


def test_versions_of_what_is_installed() -> None:
    """A plain checkout of this project is no installed package."""
    found = versions("numpy", "no-such-package-anywhere")
    assert set(found) == {"python", "numpy"}
    assert found["python"].startswith("3.")


def test_the_processor_has_a_name() -> None:
    assert cpu_name().strip()


def test_the_time_since_the_start_of_a_process() -> None:
    program = (
        "import time; from trainer.provenance import seconds_since_process_start; time.sleep(0.5); "
        "print(seconds_since_process_start())"
    )
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - before
    assert 0.5 <= float(done.stdout) <= whole + 0.02  # the kernel counts in hundredths
    assert seconds_since_process_start() > whole

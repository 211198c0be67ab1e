"""The commit that a file says it was made by."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainer.provenance import git_commit


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

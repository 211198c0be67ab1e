"""Which code made a file.

Owns asking git for the commit that a module was run from. Knows nothing of what was made.
"""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit(tracked: Path) -> str | None:
    """The commit of the checkout that tracks the file; None where none does, or there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tracked.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", tracked.name)  # an installed copy may lie inside somebody else's checkout
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None

"""Which code, on which machine, made a file.

Owns asking git for the commit that a module was run from, the system for the machine, and the packages for their
versions. Knows nothing of what was made. Importing this imports no torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path


def git_commit(tracked: Path, *, dirty: bool = False) -> str | None:
    """The commit of the checkout that tracks the file; None where none does, or there is no git.

    `dirty`: with ``-dirty`` at its end where files of the checkout differ from it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tracked.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", tracked.name)  # an installed copy may lie inside somebody else's checkout
        if dirty:
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    return {"python": platform.python_version()} | installed(*packages)


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed: a plain checkout of this one isn't."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor, as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def seconds_since_process_start() -> float:
    """How long this process has been there, the interpreter's own start included."""
    if sys.platform == "linux":
        # psutil adds the time of the system's start, which the kernel tells in whole seconds: up to a second off.
        after_the_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(after_the_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    import psutil

    return time.time() - psutil.Process().create_time()

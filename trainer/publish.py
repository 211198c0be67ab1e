"""Publishing a folder or a file: whole or not at all.

Owns the atomic step by which a finished one takes the place of an older one. Knows nothing of what is inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError, no_interrupt_lost

# A folder is locked a moment after it was made.
ABANDONED_AFTER_S = 60


@contextlib.contextmanager
def building(target: Path, marker: str) -> Iterator[Path]:
    """A fresh folder beside `target`; leaving the block without an exception publishes it as `target`.

    Whatever happens inside the block, `target` stays what it was until one atomic step replaces the whole of it; an
    exception, an interrupt included, removes the half-built folder; that of a process which was killed is removed by
    the next that builds there. A non-empty `target` without a file called `marker`
    is somebody else's and is left alone. Raises UserError where the place can't be written or is somebody else's.
    """
    target = Path(os.path.abspath(target))
    staging: Path | None = None
    prefix = f".{target.name}.building-"
    try:
        refuse_foreign(target, marker)  # before the work, and once more after it
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, prefix)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        staging.chmod(0o755)
        with _locked(staging):
            with no_interrupt_lost():
                yield staging
            _sync(staging)
            _swap_in(staging, target, marker)
    except OSError as error:
        raise UserError(
            f"can't write {target} ({error.strerror or error}). What was there before is untouched. "
            "Free some space or name another folder with --out."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def replace_file(target: Path, content: bytes) -> None:
    """Write a file in one atomic step: whenever the process is killed, what is there is the old one or the new one.

    What a killed process leaves half-written has one name, which the next takes over. Raises OSError where the file
    can't be written; the old one stays then.
    """
    unfinished = target.with_name(f".{target.name}.part")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_entries(target.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the system takes back however this process ends. On Windows there is none."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove half-built folders whose process was killed: nobody holds their lock, and they are not just being made."""
    if sys.platform == "win32":
        return
    for folder in parent.glob(f"{glob.escape(prefix)}????????"):  # as tempfile names them
        with contextlib.suppress(OSError):  # somebody holds it (BlockingIOError), or has just removed it
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S:
                with _locked(folder):
                    shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk before anything points at them."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        if path.is_dir() and os.name == "nt":
            continue  # Windows has no handle for a folder
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_foreign(target: Path, marker: str) -> None:
    """Raises UserError where `target` is something that none of the project's commands made: a folder, not empty, that
    lacks the file `marker`, or a link.
    """
    if target.is_symlink() or (target.exists() and not (target / marker).exists() and any(target.iterdir())):
        raise UserError(
            f"{target} exists and is not a folder that this command made "
            f"(it has no {marker}). It is left untouched; name another with --out."
        )


def _swap_in(staging: Path, target: Path, marker: str) -> None:
    """Put `staging` where `target` is; what `target` was is left at `staging`, or gone."""
    refuse_foreign(target, marker)
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        # No atomic exchange on this platform or file system: a reader that comes between the two renames finds no
        # folder, never half of one.
        aside = target.with_name(f"{staging.name}.old")
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_entries(target.parent)


def _sync_entries(folder: Path) -> None:
    """Bring a folder's list of files to the disk; Windows has no handle for a folder."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one atomic step; False where the system has no such call.

    Linux: renameat2 with RENAME_EXCHANGE (man 2 rename); macOS: renamex_np with RENAME_SWAP (man 2 renamex_np).
    """
    if os.name == "nt":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        at_cwd, exchange = -100, 2
        failed = library.renameat2(at_cwd, a, at_cwd, b, exchange)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        swap = 2
        failed = library.renamex_np(a, b, swap)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))

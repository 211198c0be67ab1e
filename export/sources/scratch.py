"""A place on the disk for what can't be read a piece at a time from where it lies.

Owns writing it there. Whoever makes the folder removes it, once nothing is read from it any more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from export.bundle.rows import StoredRows
from trainer.errors import UserError


def store(folder: Path, arrays: Iterable[np.ndarray]) -> StoredRows:
    """The rows of all `arrays` [n, …], of one dtype and shape of a row, at least one of them, in a file of `folder`.

    Raises UserError where they can't be written.
    """
    count, first = 0, None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            for array in arrays:
                first = array[:0] if first is None else first
                file.write(np.ascontiguousarray(array).data)
                count += len(array)
    except OSError as error:
        raise UserError(
            f"the inputs can't be kept in {folder} while they are exported ({error.strerror or error}). Free some "
            "space there, set TMPDIR to a folder on another disk, or take fewer with --samples."
        ) from error
    assert first is not None
    return StoredRows(Path(file.name), 0, first.dtype, (count, *first.shape[1:]))

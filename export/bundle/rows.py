"""Arrays of which rows are read when they are asked for, so that memory does not grow with the data.

Owns what such an array is, and one that lies in a file. Knows neither what the numbers mean nor any file format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.errors import UserError

PIECE_BYTES = 8 * 2**20
"""About so many bytes are read at a time."""


class Rows(Protocol):
    """An array [N, …]: `rows[a:b]` are rows again, and `np.asarray` makes an array of them. NumPy's are rows too."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True)
class StoredRows:
    """Rows that lie in a file one after the other from byte `offset` on, in C order. Only `np.asarray` reads them."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> StoredRows:
        start, stop, step = rows.indices(len(self))
        assert step == 1, "only rows that follow each other"
        count = max(0, stop - start)
        return StoredRows(self.path, self.offset + start * self.row_bytes, self.dtype, (count, *self.shape[1:]))

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> np.ndarray:
        """Read them; a mapped file would count as memory. Raises UserError where the file changed meanwhile."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                found = np.fromfile(file, self.dtype, int(np.prod(self.shape, dtype=np.int64)))
            return found.reshape(self.shape).astype(dtype or self.dtype, copy=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} can't be read any more, or became shorter, since it was first looked at ({error}). Leave "
                "it as it is until the command has ended."
            ) from error


def pieces(rows: Rows) -> Iterator[np.ndarray]:
    """All of the rows, in arrays of about `PIECE_BYTES`, at least one row each."""
    row_bytes = int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, len(rows), step):
        yield np.asarray(rows[start : start + step])

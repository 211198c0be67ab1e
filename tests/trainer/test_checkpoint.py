"""A checkpoint says what it is, equal ones are equal files, and a damaged one is told."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer import checkpoint
from trainer.checkpoint import CheckpointMetadata, PixelScaling
from trainer.errors import UserError
from trainer.model import Net

METADATA = CheckpointMetadata(
    model="trainer.model:Net",
    recipe="article",
    seed=3,
    steps=150,
    test_top1=91.5,
    precision="float32",
    preprocessing=PixelScaling(scale=1 / 255, mean=0.5, std=0.5),
    versions={"torch": "9.9", "numpy": "8.8", "ninefold": "0.1.0"},
    git_commit=None,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, Net().state_dict(), METADATA)
    return path


def test_round_trip(saved: Path) -> None:
    torch.manual_seed(0)
    expected = Net().state_dict()
    weights, metadata = checkpoint.load(saved)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].dtype == tensor.dtype
    assert weights["features.5.num_batches_tracked"].dtype == torch.int64
    assert metadata.model_copy(update={"weights_sha256": None}) == METADATA
    assert checkpoint.read_metadata(saved) == metadata
    Net().load_state_dict(weights)


def test_equal_checkpoints_are_equal_files_whatever_the_order_and_the_memory_format(
    saved: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = Net().to(memory_format=torch.channels_last).double().state_dict()
    shuffled = dict(reversed(state.items()))
    facts = METADATA.model_copy(update={"versions": dict(reversed(METADATA.versions.items()))})
    checkpoint.save(tmp_path / "again.safetensors", shuffled, facts)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_it_is_plain_safetensors_with_one_json_text(saved: Path) -> None:
    with safetensors.safe_open(saved, framework="np") as file:
        entries = file.metadata()
    assert list(entries) == ["ninefold"]
    facts = json.loads(entries["ninefold"])
    assert list(facts) == sorted(facts)
    assert (facts["recipe"], facts["steps"], facts["test_top1"]) == ("article", 150, 91.5)


def test_reading_metadata_needs_no_torch(saved: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer import checkpoint, mnist, recipes; "
        "print(checkpoint.read_metadata(Path(sys.argv[1])).recipe, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["article", "False"]


def header_length(content: bytes) -> int:
    length: int = struct.unpack("<Q", content[:8])[0]
    return length


DAMAGE = {
    "truncated": lambda content: content[:-1000],
    "cut in the header": lambda content: content[:100],
    "empty": lambda content: b"",
    "no safetensors": lambda content: b"PK\x03\x04 something else altogether" * 100,
    "a header without end": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("read", [checkpoint.read_metadata, checkpoint.load])
def test_a_damaged_file(saved: Path, damage: object, read: object) -> None:
    saved.write_bytes(damage(saved.read_bytes()))  # type: ignore[operator]
    refuses(read, saved)


def refuses(read: object, path: Path) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(UserError) as refused:
        read(path)  # type: ignore[operator]
    message = str(refused.value)
    assert refused.value.exit_code == 4
    assert str(path) in message
    assert "python -m trainer" in message
    assert "\n" not in message
    return message


def test_one_altered_byte_of_the_weights(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[header_length(bytes(content)) + 8 + 123_456] ^= 1
    saved.write_bytes(content)
    assert "altered" in refuses(checkpoint.load, saved)


@pytest.mark.parametrize("read", [checkpoint.read_metadata, checkpoint.load])
def test_a_missing_file_and_a_folder(tmp_path: Path, read: object) -> None:
    assert "there is no checkpoint" in refuses(read, tmp_path / "none.safetensors")
    refuses(read, tmp_path)


@pytest.mark.parametrize("entries", [None, {"format": "pt"}], ids=["no metadata", "another's metadata"])
def test_a_safetensors_file_of_somebody_else(tmp_path: Path, entries: dict[str, str] | None) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path, entries)
    assert "no checkpoint of this project" in refuses(checkpoint.load, path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": "three"}, "seed"),
        ({"recipe": None}, "recipe"),
        ({"future": 1}, "future"),
    ],
    ids=["type", "missing", "unknown"],
)
def test_metadata_that_is_not_understood(tmp_path: Path, change: dict[str, object], where: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    facts = METADATA.model_dump() | change
    safetensors.torch.save_file(Net().state_dict(), path, {"ninefold": json.dumps(facts)})
    assert where in refuses(checkpoint.read_metadata, path)


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path, {"ninefold": "{"})
    refuses(checkpoint.read_metadata, path)

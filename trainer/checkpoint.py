"""The checkpoint: a network's weights and what they are, in one safetensors file.

Owns the file's form and the checks on reading it. Knows neither the network nor how it was trained. `read_metadata`
needs no torch.

Never a pickle: reading a checkpoint runs no code of its author's. safetensors keeps metadata in no stable order, so
everything is one JSON text with sorted keys under the one key `ninefold`: equal weights and facts give equal bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from trainer.errors import UserError

if TYPE_CHECKING:
    import torch

METADATA_KEY = "ninefold"
FILE_NAME = "checkpoint.safetensors"
HISTORY_NAME = "history.jsonl"  # lies beside it: one line per evaluation


class PixelScaling(pydantic.BaseModel):
    """How raw pixels become the model's input: `(raw * scale - mean) / std`, each step in float32."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    scale: float
    mean: float
    std: float


class CheckpointMetadata(pydantic.BaseModel):
    """What a checkpoint says of itself.

    `model` names the factory of the network, `module:callable`. `steps` counts the optimizer's steps behind the
    weights; `test_top1` is the test accuracy after the last of them in percent, None where it was never evaluated.
    `versions` are those of the libraries that trained it. `git_commit` is None outside a git checkout.
    `weights_sha256` is filled in by `save`.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    model: str
    recipe: str
    seed: int
    steps: int
    test_top1: float | None
    precision: str
    preprocessing: PixelScaling
    versions: dict[str, str]
    git_commit: str | None
    weights_sha256: str | None = None


def save(path: Path, state_dict: dict[str, torch.Tensor], metadata: CheckpointMetadata) -> None:
    """Write weights and metadata; equal weights and metadata give equal bytes.

    Tensors are stored contiguous, floating-point ones as float32, integer ones (BatchNorm's `num_batches_tracked`) as
    they are. Raises OSError where the file can't be written.
    """
    import safetensors.torch
    import torch

    tensors = {
        name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()  # whatever memory format was trained in, the file has the plain one
        for name, tensor in state_dict.items()
    }
    stamped = metadata.model_copy(update={"weights_sha256": _weights_sha256(tensors)})
    # Through Python's own file: safetensors' reports a full disk as its own kind of error.
    path.write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: _json(stamped)}))


def read_metadata(path: Path) -> CheckpointMetadata:
    """What the checkpoint says of itself, without reading the weights.

    Raises UserError (exit 4) where the file is missing, damaged or no checkpoint of this project.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            entries = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}. Train one with python -m trainer, or name another.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}). {_REMEDY}") from error
    if METADATA_KEY not in entries:
        raise UserError(f"{path} is a safetensors file, but no checkpoint of this project: no metadata. {_REMEDY}")
    try:
        return CheckpointMetadata.model_validate_json(entries[METADATA_KEY])
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        raise UserError(f"{path} has metadata that this version can't read ({what}). {_REMEDY}") from error


def load(path: Path) -> tuple[dict[str, torch.Tensor], CheckpointMetadata]:
    """The weights (CPU tensors, by `state_dict` key) and the metadata.

    Raises UserError (exit 4) where the file is missing, damaged, altered or no checkpoint of this project.
    """
    metadata = read_metadata(path)  # first: it tells what is wrong with a file that is none of ours
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}). {_REMEDY}") from error
    if _weights_sha256(tensors) != metadata.weights_sha256:
        raise UserError(f"{path} was altered: its weights have another SHA-256 than the one it names. {_REMEDY}")
    return tensors, metadata


_REMEDY = "Train it again with python -m trainer, or name another checkpoint."


def _json(metadata: CheckpointMetadata) -> str:
    import json

    return json.dumps(metadata.model_dump(mode="json"), sort_keys=True)


def _weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """One SHA-256 over all tensors: names, dtypes, shapes and bytes, by name in alphabetical order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

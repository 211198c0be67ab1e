"""Results as files: written whole or not at all, and found out beforehand whether they can be."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bench.errors import EXIT_BAD_INPUT, BenchError
from export.bundle.foundations import replace_file


def check_writable(path: Path, option: str = "--json") -> None:
    """Find out before anything is measured that a result can be written. Makes the folder. Raises BenchError (bad
    input), which names the `option` that names another place.
    """
    target = path.resolve()  # the file that a link points to is replaced, not the link
    if target.exists() and not target.is_file():
        raise BenchError(
            f"the result can't be written to {path}: it is not a regular file. Name another place with {option}.",
            EXIT_BAD_INPUT,
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise BenchError(
            f"the result can't be written to {path}: {error.strerror}. Name another place with {option}.",
            EXIT_BAD_INPUT,
        ) from None


def write_result(result: BaseModel, path: Path, option: str = "--json") -> None:
    """Write the JSON as `write_whole` does."""
    write_whole(indented_json(json.loads(result.model_dump_json())) + "\n", path, option)


def write_whole(content: str, path: Path, option: str) -> None:
    """Write a text file: a reader sees the old one or the new one. Raises BenchError (bad input), the old one intact;
    it names the `option` that names another place.
    """
    try:
        replace_file(path.resolve(), content.encode())
    except OSError as error:
        raise BenchError(
            f"the result could not be written to {path}: {error.strerror}. What was there before is unchanged; name "
            f"another place with {option}.",
            EXIT_BAD_INPUT,
        ) from None


def indented_json(value: Any, indent: str = "") -> str:
    """The JSON of what `json.loads` returns, a line for each field, and one for a whole list of numbers: the durations
    of a block are read together, and compared together.
    """
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{_json(key)}: {indented_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        items = [deeper + indented_json(item, deeper) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

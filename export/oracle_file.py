"""The oracle's file: safetensors, written a piece at a time, so that the inputs need not fit into memory.

Owns the layout of such a file (https://github.com/huggingface/safetensors#format), in the library's own order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.bundle import Oracle, Output, TensorSpec
from export.bundle.rows import Rows, pieces

LETTERS = {"f": "F", "i": "I", "u": "U"}
"""What safetensors calls a kind of numbers, before their bits."""


def write(path: Path, oracle: Oracle, more_inputs: Sequence[TensorSpec], more_outputs: Sequence[Output]) -> None:
    """`raw`, `logits` and, if there are any, `labels` and what further inputs and outputs have. Raises OSError."""
    arrays: dict[str, Rows] = {"raw": oracle.raw, "logits": oracle.logits}
    if oracle.labels is not None:
        arrays["labels"] = oracle.labels
    arrays |= {f"raw.{spec.name}": rows for spec, rows in zip(more_inputs, oracle.more_raw, strict=True)}
    arrays |= {f"output.{spec.name}": array for spec, array in zip(more_outputs, oracle.more_outputs, strict=True)}
    # The library's order: what needs the largest alignment first.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, arrays[name].dtype.kind != "f", name))
    header, begin = {}, 0
    for name in order:
        rows = arrays[name]
        end = begin + int(np.prod(rows.shape, dtype=np.int64)) * rows.dtype.itemsize
        dtype = "BOOL" if rows.dtype.kind == "b" else f"{LETTERS[rows.dtype.kind]}{8 * rows.dtype.itemsize}"
        header[name] = {"dtype": dtype, "shape": list(rows.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in pieces(arrays[name]):
                file.write(np.ascontiguousarray(piece).data)

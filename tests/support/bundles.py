"""Copies of a bundle with something changed, and hashes that agree with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file


def tamper(
    bundle: Path,
    copy: Path,
    file: str | None = None,
    rewrite: Callable[[Path], None] | None = None,
    manifest: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A copy of `bundle` at `copy` with one file rewritten, or its manifest changed."""
    shutil.copytree(bundle, copy)
    fields = json.loads((copy / "bundle.json").read_text())
    if file is not None and rewrite is not None:
        rewrite(copy / file)
        entries = [*fields["files"], fields["oracle"], fields["checkpoint"]]
        (entry,) = [entry for entry in entries if entry["path"] == file]
        content = (copy / file).read_bytes()
        entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    if manifest is not None:
        manifest(fields)
    (copy / "bundle.json").write_text(json.dumps(fields))
    return copy


def shorten(bundle: Path, copy: Path, images: int) -> Path:
    """A copy whose oracle has the first `images` inputs only, so that nobody need wait for all of them."""

    def rewrite(path: Path) -> None:
        save_file({name: tensor[:images].copy() for name, tensor in load_file(path).items()}, path)

    return tamper(bundle, copy, "oracle.safetensors", rewrite)

"""A bare ONNX file in the place of a bundle: `python -m export --onnx` makes one of it, for as long as it is measured.

Owns that bundle's life, and which sizes of batches are worth a run nobody asked to be long. Knows nothing of folding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import export.bundle
from bench.cli.options import DEFAULT_BUNDLE
from bench.errors import EXIT_NEGATIVE, EXIT_USAGE, BenchError

if TYPE_CHECKING:
    from bench.results.schema import Result

SUFFIX = ".onnx"


@dataclass(frozen=True)
class Place:
    """Where a bundle is, and what the user named: `file` is the ONNX file that it was made of, None for a bundle."""

    bundle: Path
    file: Path | None = None

    @property
    def named(self) -> Path:
        """What a result is of, without the file's ending: it gives the result its name."""
        return self.bundle if self.file is None else self.file.with_suffix("")


@contextmanager
def opened_place(given: Path | None, bundle: Path, input_shape: str | None) -> Iterator[Place]:
    """The bundle that was named, `given` before `bundle`; of a file a bundle that is gone afterwards.

    `input_shape` is --input as it was given, for a file that does not state it. Raises BenchError, and typer.Exit where
    no bundle can be made of the file: python -m export has said why.
    """
    if given is not None and bundle != DEFAULT_BUNDLE:
        raise BenchError(f"both {given} and --bundle {bundle} were named; name one of them.", EXIT_USAGE)
    place = given or bundle
    if not _is_file(place):
        if input_shape is not None:
            raise BenchError(f"--input goes with an ONNX file; {place} is a bundle, which says its shape.", EXIT_USAGE)
        yield Place(place)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        made = Path(folder) / (place.stem or "model")
        _export(place, made, input_shape)
        yield Place(made, place)


def batch_sizes_for(where: Place, given: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to measure. Of a file none that nobody asked for is larger than the number of its random inputs:
    there are the fewer the larger one is, and 256 images of 224x224 would take a minute to warm up.
    """
    from bench.run.plan import batch_sizes, opened

    if where.file is not None and not given:
        inputs = len(opened(where.bundle, verified=False).oracle().raw)
        default = [*(size for size in default if size < inputs), min(inputs, max(default))]
    return batch_sizes([where.bundle], given, default)


def of_the_file(result: Result, where: Place) -> Result:
    """The result with the file's place in that of its bundle, which is gone."""
    if where.file is None:
        return result
    bundles = tuple(facts.model_copy(update={"path": str(where.file.resolve())}) for facts in result.bundles)
    return result.model_copy(update={"bundles": bundles})


def _is_file(place: Path) -> bool:
    """Whether it is a file, or named like one: export says what is wrong with it then."""
    return place.is_file() or (place.suffix == SUFFIX and not place.is_dir())


def _export(file: Path, target: Path, input_shape: str | None) -> None:
    """Make the bundle in a process of its own; what it prints goes to stderr, where progress is shown."""
    # Not from the current folder: it may hold an export.py of the user's.
    root = str(Path(export.bundle.__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "export", "--onnx", str(file), "--out", str(target)]
    command += ["--input", input_shape] if input_shape is not None else []
    sys.stderr.flush()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, stdout=2, check=False)
    if done.returncode < 0:
        raise BenchError(
            f"python -m export, which makes a bundle of {file}, was ended by signal "
            f"{-done.returncode}, which the system sends where memory is over.",
            EXIT_NEGATIVE,
        )
    if done.returncode:
        raise typer.Exit(done.returncode)

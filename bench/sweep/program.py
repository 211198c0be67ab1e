"""A program in Python that runs one file of a bundle as it was measured: what a user copies into one of his own.

Owns the text around the lines that each backend has for its runtime (`Backend.program`). It needs the runtime and
NumPy, and nothing of ninefold: no import, no bundle. Threads, options, memory and arithmetic are those of the measured
session in profile strict; what is not the same, a comment says. `tests/benchmarks/programs.py` holds the programs to
their rows.
"""

from __future__ import annotations

from bench.backends.contract import Runnable, shaped
from bench.backends.registry import find_backend
from export.bundle import TensorSpec

# In NumPy, of one image of the article's network: 7.8 µs at every call in a session, 3.7 in a program.
ONCE = "The measured session finds out the input's sizes at every call, which takes some µs; here they stand written."


def snippet(backend: str, what: Runnable) -> str:
    """A program that defines `logits`: raw input, as the bundle describes it, to float32 logits, in NumPy arrays."""
    lines = find_backend(backend).program(what)
    if lines is None:
        return f"# No program is known that runs a file as {backend} does.\n"
    raw = what.preprocessing.raw
    differs = lines.differs
    if lines.prepare is None and what.input != raw:
        differs = differs or ONCE
    body = [*(_prepared(what) if lines.prepare is None else lines.prepare), *lines.run]
    return "\n".join(
        [
            *([f"# {differs}"] if differs else []),
            *(["import numpy as np"] if any("np." in line for line in (*lines.load, *body)) else []),
            *lines.load,
            "",
            "",
            f"def logits(raw):  # {raw.dtype} {_shape(raw)} -> float32 {_shape(what.output)}",
            *(f"    {line}" for line in body),
            "",
        ]
    )


def _prepared(what: Runnable) -> list[str]:
    """From the raw input to `x`."""
    preprocessing = what.preprocessing
    if what.input == preprocessing.raw:
        return ["x = np.ascontiguousarray(raw)"]
    mean, std = (_constant(values, len(what.input.shape)) for values in (preprocessing.mean, preprocessing.std))
    return [
        f"x = {shaped(what, 'raw')}.astype(np.float32)",
        f"x = (x * np.float32({preprocessing.scale!r}) - {mean}) / {std}",
    ]


def _constant(values: tuple[float, ...], rank: int) -> str:
    """One value for all, or one for each channel, which is axis 1."""
    if len(values) == 1:
        return f"np.float32({values[0]!r})"
    return f"np.float32({list(values)!r}).reshape({', '.join(['1', '-1', *['1'] * (rank - 2)])})"


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"

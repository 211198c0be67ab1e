"""Which arithmetic a runtime may use. By itself, since every `--help` reads it."""

from __future__ import annotations

from enum import StrEnum


class Profile(StrEnum):
    """Which arithmetic a runtime may use."""

    STRICT = "strict"
    """float32 everywhere: TF32 is off in every runtime."""
    FAST = "fast"
    """TF32 is on in every runtime that has it."""

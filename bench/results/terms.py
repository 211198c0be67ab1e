"""The words that results are told in: timings, labels, scenarios, ways to fail.

Imports nothing, so that the command line can read it at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

Timing = Literal["device_resident", "end_to_end"]
"""`device_resident` times `run` on an input that is on the device; `end_to_end` times `prepare`, `run` and `fetch`."""
FailureKind = Literal["crashed", "hung", "raised"]


class Scenario(StrEnum):
    """How queries arrive."""

    SINGLE_STREAM = "single-stream"
    """One image at a time, the next when the last is done."""
    MULTI_STREAM = "multi-stream"
    """Several images at a time, the next when the last are done."""
    OFFLINE = "offline"
    """All images at once."""
    SERVER = "server"
    """One image at a time, at random moments (a Poisson process)."""


TIMINGS: tuple[Timing, ...] = ("device_resident", "end_to_end")
CONTROL_SUFFIX, LETTER_SIGN = ":unfolded", "@"


def label_of(backend: str, variant: str = "float32", threads: int | None = None, letter: str | None = None) -> str:
    """What a subject is called: `threads` only where they are not the run's, `letter` only where there are bundles."""
    return (
        backend
        + ("" if variant == "float32" else f":{variant}")
        + ("" if threads is None else f"/{threads}")
        + ("" if letter is None else LETTER_SIGN + letter)
    )

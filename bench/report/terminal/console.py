"""The console that results are printed on."""

from __future__ import annotations

from rich.console import Console

# What the widest table needs.
WIDE = 176


def console(stderr: bool = False, wide: bool = False) -> Console:
    """A console on stdout (or stderr), as wide as the window; with `wide` it has room for every column."""
    made = Console(stderr=stderr, highlight=False)
    if wide:
        made.width = max(made.width, WIDE)
    return made

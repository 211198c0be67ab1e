"""The console that results are printed on."""

from __future__ import annotations

from rich.console import Console

# What the widest table needs. In a narrower window or a log its lines are long; rich would cut figures off instead.
MIN_WIDTH = 176


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr), as wide as the window, and never narrower than the table."""
    made = Console(stderr=stderr, highlight=False)
    made.width = max(made.width, MIN_WIDTH)
    return made

"""The error that a user sees. Imports no torch, as a file that can't even be read needs none."""

from __future__ import annotations

from trainer.errors import UserError


class FoldError(UserError):
    """A model or file that can't be folded at all: in training mode, not a number in its weights, no valid file."""

"""What an export ends with where its own work is not right. Imports no torch."""

from __future__ import annotations

from trainer.errors import EXIT_NEGATIVE, UserError


class ExportRefused(UserError):
    """The export made something that isn't right, so nothing was published."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} Nothing was published.", EXIT_NEGATIVE)

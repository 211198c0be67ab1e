"""How a command of `bench` ends when it can't give what was asked for: exit codes, and errors of one paragraph."""

from __future__ import annotations

from export.bundle.errors import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from export.bundle.errors import EXIT_INCONCLUSIVE as EXIT_INCONCLUSIVE
from export.bundle.errors import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from export.bundle.errors import EXIT_NEGATIVE as EXIT_NEGATIVE
from export.bundle.errors import EXIT_UNAVAILABLE as EXIT_UNAVAILABLE
from export.bundle.errors import EXIT_USAGE as EXIT_USAGE
from export.bundle.errors import Terminated as Terminated
from export.bundle.errors import UserError


class BenchError(UserError):
    """What stops a command. The message is one paragraph: what was received, what was expected, what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)

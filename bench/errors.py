"""How a command of `bench` ends when it can't give what was asked for.

Owns the exit codes and the error that the command line turns into one paragraph on stderr. Knows nothing of what
failed.
"""

from __future__ import annotations

EXIT_NEGATIVE = 1
"""The verdict is no: parity failed, or a backend did not finish."""
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_BAD_INPUT = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class BenchError(Exception):
    """What stops a command. The message is one paragraph: what was received, what was expected, what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no `Exception`, so that nothing swallows it on the way out."""

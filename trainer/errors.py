"""What a user can get wrong, and how a command says so.

Owns the error that every command of `trainer` and `export` reports as one paragraph on stderr, the exit codes, and
the way a command ends when it is interrupted. Knows nothing of what the commands do.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

EXIT_NEGATIVE = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_BAD_INPUT = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """A mistake or a circumstance that the user can mend: bad data, a bad file, a full disk.

    The message is one paragraph: what was received, what was expected, what to do. `exit_code` is what the process
    returns (4, bad input, unless told otherwise).
    """

    def __init__(self, message: str, exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it is no `Exception`, so that nothing swallows it."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM (`terminated`) ended a training after `steps` steps; `saved` is its last save's iteration."""

    def __init__(self, steps: int, saved: int | None, terminated: bool) -> None:
        super().__init__(f"interrupted after {steps} iterations")
        self.steps, self.saved, self.terminated = steps, saved, terminated


ENDED = {False: ("interrupted", EXIT_INTERRUPTED), True: ("terminated", EXIT_TERMINATED)}
"""How a command that was ended says so, and its exit code, by whether it was SIGTERM."""


class _App(Protocol):
    def __call__(self, *, prog_name: str) -> object: ...


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Leave the block by the interrupt that arrived in it, whatever a library made of that.

    A KeyboardInterrupt in Python code that C++ called may come out of it as a TypeError, as it does within
    torch.export, or not at all. Signals act in the main thread; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        before[signal.Signals(number)](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in _anew:  # what it would bring is raised below
            again.cancel()
        _anew.clear()
        if arrived and not isinstance(sys.exc_info()[1], (KeyboardInterrupt, Terminated)):
            signal.raise_signal(arrived[0])


ANEW_S = 0.05
_anew: list[threading.Timer] = []
"""Interrupts that are to arrive once more."""


def _not_lost(swallowed: sys.UnraisableHookArgs) -> None:
    """An interrupt that arrived where nothing can be raised, as in a weak reference's callback, arrives again a moment
    later: Python would print and forget it. All else is said as ever.
    """
    number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(swallowed.exc_type)
    if number is None:
        sys.__unraisablehook__(swallowed)
        return
    again = threading.Timer(ANEW_S, _interrupt, (number,))
    again.daemon = True
    _anew.append(again)
    again.start()


def _interrupt(number: signal.Signals) -> None:
    """The signal to the main thread, which it wakes where that sleeps."""
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def run_app(app: _App, prog_name: str) -> None:
    """Run a Typer app as a whole process: a UserError becomes a paragraph on stderr and its exit code.

    What it prints is to be seen line by line in a log or a pipe too, not when the process ends. Under `python -m`,
    CPython kills itself by SIGINT at the end, whatever the exit code, where a KeyboardInterrupt passed
    through an `exec` or `eval` of a string (torch.export has several) and was then handled; the next one that
    ends well clears that mark.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.unraisablehook = _not_lost
    try:
        app(prog_name=prog_name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated:
        print("terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    finally:
        exec("")

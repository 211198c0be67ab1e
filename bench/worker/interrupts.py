"""Ctrl-C and SIGTERM around a child: held back while it starts, and left to the parent from then on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

HELD_BACK = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Start a child with SIGINT and SIGTERM blocked, which it inherits until it asks for them (`take_no_interrupts`).

    A signal in the middle of a start would print a traceback: the child's own, or that of one left half-started.
    Here it is kept, not lost: it acts when the block ends. Blocking alone would not do for this process, since the
    system may hand a signal to a library's thread, whereupon Python calls the handler in the main one.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    from multiprocessing import resource_tracker

    # With the first child, multiprocessing starts this helper and then unblocks both: start it beforehand.
    resource_tracker.ensure_running()
    arrived: list[int] = []
    handlers = {number: signal.signal(number, lambda n, frame: arrived.append(n)) for number in HELD_BACK}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for kept in arrived:
        signal.raise_signal(kept)


def take_no_interrupts() -> None:
    """In a child: Ctrl-C reaches the whole process group; the parent decides what it means, and ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

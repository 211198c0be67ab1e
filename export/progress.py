"""What is being done, said to whoever waits for it: a line as a step begins, one in between, one with its seconds.

Owns when a line is due. Knows nothing of the steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], None]
Advance = Callable[[int], None]
"""Told that so many more of a step's items are done."""

EVERY_S = 10.0
"""Seconds between two lines."""
WORTH_S = 1.0
"""What takes less is not worth a second line."""


def unheard(count: int) -> None:
    """For whoever doesn't want to know."""


class Progress:
    """Tells of steps by `say`, which is called from a thread of its own while a step runs."""

    def __init__(self, say: Say, every_s: float = EVERY_S) -> None:
        self.say, self._every_s = say, every_s

    @contextmanager
    def step(self, what: str, total: int | None = None, items: str = "inputs") -> Iterator[Advance]:
        """A step, in words. Of `total` items, those are counted that the function handed out is told of."""
        began, done, over = time.monotonic(), 0, threading.Event()

        def advance(count: int) -> None:
            nonlocal done
            done += count

        def tell() -> None:
            while not over.wait(self._every_s):
                counted = "" if total is None else f"{min(done, total)} of {total} {items}, "
                self.say(f"  {what}: {counted}{time.monotonic() - began:.0f} s so far")

        self.say(what)
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield advance
        finally:
            over.set()
            teller.join()
        if (seconds := time.monotonic() - began) >= WORTH_S:
            self.say(f"  {what}: done in {seconds:.1f} s")

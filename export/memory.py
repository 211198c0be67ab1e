"""Giving memory back to the system between two parts of an export that each take a large model several times.

Owns nothing but that.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Free what nobody can reach any more, a graph's nodes hold one another, and hand freed pages to the system.

    glibc keeps them else: after folding resnet50 in float64 a process held 300 MB of tensors that were gone.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)

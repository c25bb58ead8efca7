"""Memory of many paused forwards."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP, _LARGEST = 256 * 2**20, 32 * 2**20


def share_one_heap() -> None:
    """Makes all threads allocate from one heap that keeps what is freed.

    glibc hands large blocks back to the system at once and gives every thread a heap of its own. Batches that take
    turns would pay for each activation with fresh page faults, and for each thread with a heap. Does nothing where
    there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _KEEP)

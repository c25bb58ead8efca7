"""A thread pool over modules in which each worker has one BLAS thread.

Modules are many and small: one thread each is faster than one BLAS over many threads, and results do not depend on the
number of cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


_lock = threading.Lock()
_here = threading.local()


def _enter_worker() -> None:
    """One BLAS thread, and no pool inside this one."""
    torch.set_num_threads(1)
    _here.inside = True


@contextmanager
def one_thread() -> Iterator[int]:
    """Sets PyTorch to one thread and restores it; yields the number it had."""
    # The count belongs to the process: without the lock a second caller would take this one's 1 for what to restore.
    with _lock:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield before
        finally:
            torch.set_num_threads(before)


def pool_map(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """`[function(x) for x in items]` over as many workers as PyTorch had threads, each with one BLAS thread.

    Inside a worker it is a plain loop: the outer pool has all threads already.
    """
    if getattr(_here, "inside", False):
        return [function(item) for item in items]
    with one_thread() as threads:
        workers = min(threads, len(items), os.cpu_count() or 1)
        if workers <= 1:
            return _plainly(function, items)
        with ThreadPoolExecutor(workers, initializer=_enter_worker) as pool:
            return list(pool.map(function, items))


def _plainly(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """The loop of one worker, in the caller's thread."""
    _here.inside = True
    try:
        return [function(item) for item in items]
    finally:
        _here.inside = False

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
    """`[function(x) for x in items]` over as many workers as PyTorch had threads, each with one BLAS thread."""
    with one_thread() as threads:
        workers = min(threads, len(items), os.cpu_count() or 1)
        if workers <= 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))

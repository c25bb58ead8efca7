"""The most memory that a call needs, above what there was before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraforge.linalg.device import peak_rss

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of this process that are in memory now; where nothing says so, the most there ever were."""
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_rss()


def peak_above(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Calls a function and gives its result and its peak: allocated bytes on a GPU, resident ones of this process else.

    On the CPU the figure is a process's: memory that libraries keep for reuse is not given back between two calls, so
    a process should measure one thing only (see `children`).
    """
    gc.collect()
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - start
    if _RESET.exists():
        # The high-water mark starts anew: what led up to this call does not count. Some containers forbid it.
        try:
            _RESET.write_text("5", encoding="ascii")
        except OSError:
            pass
    start = resident()
    result = function()
    return result, max(0, peak_rss() - start)

"""Several processes in one run: who writes, and how they wait for each other. One process without a process group."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


def rank() -> int:
    """Number of this process; the launcher says it before there is a process group."""
    return dist.get_rank() if _grouped() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _grouped() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def wait() -> None:
    """Waits for all processes."""
    if _grouped():
        dist.barrier()


def gather(value: _T) -> list[_T]:
    """The value of every process, by rank, in every process."""
    if not _grouped():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def least(value: int, device: torch.device) -> int:
    """The least of all processes' values."""
    if not _grouped():
        return int(value)
    shared = torch.tensor(int(value), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


def from_first(value: _T) -> _T:
    """The first process's value, in every process."""
    if not _grouped():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    found: _T = held[0]
    return found


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()

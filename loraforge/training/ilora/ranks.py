"""What the processes of a run tell each other; alone, nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def least(value: int, device: torch.device) -> int:
    """The least of all processes' values."""
    if world() == 1:
        return int(value)
    shared = torch.tensor(int(value), device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MIN)
    return int(shared)


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values

"""Where to compute, how much memory that took, and what to say where it is full."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loraforge.errors import LoraforgeError, UsageError

ON_CPU = "--device cpu, whose memory is usually larger"


def choose_device(name: str) -> torch.device:
    """The device of a name; auto is the GPU where there is one.

    Raises:
        UsageError: No such device.
        LoraforgeError: A GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("unknown device", got=name, expected="auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("unsupported device", got=name, expected="auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoraforgeError("this torch sees no GPU", got=name, hint="use --device cpu; `loraforge doctor` says more")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoraforgeError("there is no GPU of this number", got=name, expected=f"below {torch.cuda.device_count()}")
    return device


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors of this process held on a GPU at a time; None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_rss() -> int:
    """Largest resident memory of this process in bytes.

    The kernel's own high-water mark where there is one: ru_maxrss of a child starts at what its parent had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def named_when_full(
    device: torch.device, doing: str, where: Callable[[], str | None] | str | None, hint: str
) -> Iterator[None]:
    """Turns a GPU's full memory into an error that says what was done there and what to change.

    Args:
        device: Where the block computes.
        doing: What it does, as in "merging a module".
        where: The module, or what tells it once it is known.
        hint: What needs less memory.

    Raises:
        LoraforgeError: The memory of the device is full.
    """
    try:
        yield
    except RuntimeError as error:
        # Libraries under PyTorch that allocate by themselves say it in words of their own.
        full = isinstance(error, torch.OutOfMemoryError) or "_STATUS_ALLOC_FAILED" in str(error)
        if not full or device.type != "cuda":
            raise
        free, total = torch.cuda.mem_get_info(device)
        asked = re.search(r"Tried to allocate ([\d.]+ [KMGT]?i?B)", str(error))
        raise LoraforgeError(
            f"the memory of the GPU is full while {doing}",
            where=where() if callable(where) else where,
            got=f"{free / 2**20:.0f} MiB free of {total / 2**20:.0f} MiB on {device}",
            expected=f"room for {asked[1]} more" if asked else None,
            hint=hint,
        ) from error

"""Where the time of a walk through the model goes, and how many operations its products take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by part, each without the parts inside it, so that they add up.

    A GPU works behind the program's back: at every border of a part the clock waits for it, so that each part pays for
    its own work. A module has about ten borders, and its solve waits for the device anyway.

    Attributes:
        seconds: Seconds by part.
        work: Floating-point operations by part, where the part counts them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.work: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a part, less that of parts inside it."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def did(self, name: str, operations: float) -> None:
        """Counts floating-point operations of a part."""
        self.work[name] = self.work.get(name, 0.0) + operations

    def _settle(self) -> None:
        """Gives the time since the last border to the innermost open part."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

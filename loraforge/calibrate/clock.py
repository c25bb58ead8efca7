"""Where the time of a walk through the model goes, and how many operations its products take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by part, each without the parts inside it, so that they add up.

    A GPU works behind the program's back: there the borders of the parts are marks in its queue, read when somebody
    asks. Nobody waits for them, and a part's time is what passed on the device between its marks.

    Attributes:
        work: Floating-point operations by part, where the part counts them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.work: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None
        self._known: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []
        self._since: float | torch.cuda.Event = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part so far."""
        if self._marks:
            torch.cuda.synchronize(self._device)
            for name, start, end in self._marks:
                self._add(name, start.elapsed_time(end) / 1e3)
            self._marks = []
        return dict(self._known)

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
        now: float | torch.cuda.Event
        if self._device is None:
            now = time.perf_counter()
        else:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        if self._open and isinstance(now, float) and isinstance(self._since, float):
            self._add(self._open[-1], now - self._since)
        elif self._open and not isinstance(now, float) and not isinstance(self._since, float):
            self._marks.append((self._open[-1], self._since, now))
        self._since = now

    def _add(self, name: str, seconds: float) -> None:
        self._known[name] = self._known.get(name, 0.0) + seconds

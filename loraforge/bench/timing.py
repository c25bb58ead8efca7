"""Times of several forms of one computation, taken in turn: A B C A B C ..., so that a slow minute hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

FEWEST, MOST = 3, 15  # timings where --runs does not say
SLOW = 0.3
LEAST_SECONDS = 1e-3  # a timing on the CPU repeats a short call up to this length
MOST_CALLS = 1000
FLUSH_BYTES = 256 * 2**20  # more than any GPU keeps in its caches


@dataclass(frozen=True, slots=True)
class Times:
    """Timings of one form, seconds a call.

    Attributes:
        seconds: All of them, in the order taken.
        result: What the last call gave.
    """

    seconds: list[float]
    result: Any

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles; 0 for a single timing."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


class Clock:
    """How time is measured on a device.

    One thread on the CPU: processor time of this process, which other work on the machine does not lengthen. Several
    threads: wall time. GPU: events on its stream, after its caches were overwritten, so that a call finds its data in
    memory as in use; what the host does is hidden behind that as far as it is asynchronous.

    Args:
        device: Where the forms compute.
        threads: Threads of the CPU.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.name = "events" if device.type == "cuda" else "processor" if threads == 1 else "wall"
        self._now = time.process_time if self.name == "processor" else time.perf_counter
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def calls(self, seconds: float) -> int:
        """Calls that one timing of so long a call should hold."""
        if self._flush is not None or seconds >= LEAST_SECONDS:
            return 1
        return min(MOST_CALLS, max(1, round(LEAST_SECONDS / max(seconds, 1e-9))))

    def time(self, function: Callable[[], Any], calls: int = 1) -> tuple[float, Any]:
        """Seconds of one call, and what the last one gave."""
        if self._flush is not None:
            return self._time_events(function, self._flush)
        started = self._now()
        for _ in range(calls - 1):
            function()
        result = function()
        return (self._now() - started) / calls, result

    def _time_events(self, function: Callable[[], Any], flush: torch.Tensor) -> tuple[float, Any]:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            result = function()
            end.record()
            torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3, result


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while it is open."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    forms: Mapping[str, Callable[[], Any]],
    clock: Clock,
    *,
    before: Callable[[str], object] | None = None,
    runs: int | None = None,
    budget: float = 1.0,
) -> dict[str, Times]:
    """Timings of every form, in turn.

    Each form is called twice before: the first call loads and allocates, the second says how long one takes. A call
    longer than SLOW says so itself.

    Args:
        forms: Name -> call.
        clock: How to measure.
        before: Gets the name before every call, outside of the time; a timing is then a single call.
        runs: Timings a form; None for as many as fit in `budget`, FEWEST to MOST.
        budget: Seconds by the wall that all timings together should take, on a busy machine too.
    """
    prepare = before or _nothing
    guess: dict[str, float] = {}
    for name, form in forms.items():
        for _ in range(2):
            if guess.get(name, 0.0) < SLOW:
                prepare(name)
                guess[name] = clock.time(form)[0]
    calls = {name: 1 if before else clock.calls(seconds) for name, seconds in guess.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}
    started = time.perf_counter()
    with no_collection():
        while _goes_on(len(next(iter(seconds.values()))), runs, started + budget):
            for name, form in forms.items():
                prepare(name)
                results.pop(name, None)  # what is kept must not make the next call's memory
                taken, results[name] = clock.time(form, calls[name])
                seconds[name].append(taken)
    return {name: Times(seconds[name], results[name]) for name in forms}


def _goes_on(done: int, runs: int | None, until: float) -> bool:
    """Whether another round is due."""
    if runs is not None:
        return done < runs
    return done < FEWEST or (done < MOST and time.perf_counter() < until)


def _nothing(_name: str) -> None:
    return None

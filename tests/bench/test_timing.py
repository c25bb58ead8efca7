from __future__ import annotations

import pytest
import torch

from loraforge.bench.timing import FEWEST, MOST, Clock, Times, interleave


class CountedClock(Clock):
    """A clock whose calls take what the test says."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__(torch.device("cpu"), 1)
        self.fixed, self.order = seconds, []

    def time(self, function, calls=1):
        name = function()
        self.order.append(name)
        return self.fixed[name], name


def test_forms_are_timed_in_turn_after_a_warm_up() -> None:
    clock = CountedClock({"a": 0.01, "b": 0.02})
    found = interleave({"a": lambda: "a", "b": lambda: "b"}, clock, runs=3)
    assert clock.order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert found["a"].seconds == [0.01] * 3 and found["b"].result == "b"


def test_the_budget_says_how_often_and_slow_forms_warm_up_once() -> None:
    clock = CountedClock({"a": 0.1})
    assert len(interleave({"a": lambda: "a"}, clock, budget=60.0)["a"].seconds) == MOST
    slow = CountedClock({"a": 5.0})
    assert len(interleave({"a": lambda: "a"}, slow, budget=0.0)["a"].seconds) == FEWEST
    assert len(slow.order) == FEWEST + 1


def test_the_preparation_is_told_the_form_before_every_call() -> None:
    told: list[str] = []
    clock = CountedClock({"a": 1e-6, "b": 1e-6})
    interleave({"a": lambda: "a", "b": lambda: "b"}, clock, before=told.append, runs=2)
    assert told == clock.order


def test_short_calls_are_repeated_within_a_timing() -> None:
    clock = Clock(torch.device("cpu"), 1)
    assert clock.calls(1e-5) == 100 and clock.calls(0.5) == 1 and clock.calls(0.0) == 1000
    calls = []
    clock.time(lambda: calls.append(1), 7)
    assert len(calls) == 7


@pytest.mark.parametrize(("threads", "name"), [(1, "processor"), (2, "wall")])
def test_the_clock_of_the_cpu(threads: int, name: str) -> None:
    assert Clock(torch.device("cpu"), threads).name == name


def test_median_and_quartiles() -> None:
    times = Times([5.0, 1.0, 2.0, 3.0, 4.0], None)
    assert times.median == 3.0 and times.iqr == 2.0
    assert Times([7.0], None).iqr == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_measure_a_gpu() -> None:
    x = torch.ones(1 << 24, device="cuda")
    clock = Clock(torch.device("cuda", 0), 1)
    found = interleave({"sum": lambda: x + 1.0}, clock, runs=5)["sum"]
    assert clock.name == "events" and found.result[0].item() == 2.0
    assert len(found.seconds) == 5 and min(found.seconds) > 0.0

"""Batches in step: who stands where and in which order, what the hooks add, and that nothing outlives an error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from loraforge.calibrate import lockstep
from loraforge.calibrate.carriers import GreenletCarrier, ThreadCarrier, make_carrier
from loraforge.calibrate.lockstep import Deltas, Lockstep, Visit
from loraforge.errors import LoraforgeError

D = 4


class Net(nn.Module):
    """Two linear modules; `path` may change the way between them, `seen` keeps the outputs."""

    def __init__(self, path: Callable[[Net, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(D, D).double(), nn.Linear(D, D).double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
        self.path = path
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        y = self.path(self, x) if self.path else self.second(torch.tanh(self.first(gain * x)))
        self.seen.append(y)
        return y


def inputs(count: int) -> list[tuple[int, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(1)
    return [(j % 2, {"x": torch.randn(2, 3, D, generator=g, dtype=torch.float64)}) for j in range(count)]


def pair(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in ((D, 2), (2, D)))  # type: ignore[return-value]


def walk_of(net: Net, *, both: bool = True, **options: object) -> tuple[Lockstep, dict[str, Deltas]]:
    modules = {"first": net.first, "second": net.second}
    deltas = {name: Deltas([pair(2 * i), pair(2 * i + 1)]) for i, name in enumerate(modules)}
    return Lockstep(net, modules, deltas, options, both_streams=both, make=lockstep.make_carrier), deltas


@contextmanager
def nothing_left(net: Net) -> Iterator[None]:
    """No thread and no hook more than before, and gradients as they were."""
    before = set(threading.enumerate())
    assert torch.is_grad_enabled()
    yield
    assert set(threading.enumerate()) == before
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True, params=[GreenletCarrier, ThreadCarrier], ids=["greenlets", "threads"])
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Every test runs in both kinds of carrier."""
    if request.param is GreenletCarrier:
        pytest.importorskip("greenlet")
    monkeypatch.setattr(lockstep, "make_carrier", request.param)
    return request.param


def ignore(name: str, visits: list[Visit]) -> None:
    """A visitor that does nothing."""


def dense(net: Net, x: Tensor, deltas: dict[str, tuple[Tensor, Tensor] | None]) -> Tensor:
    def linear(name: str, h: Tensor) -> Tensor:
        module, low = getattr(net, name), deltas[name]
        return nn.functional.linear(h, module.weight + (0 if low is None else low[0] @ low[1]), module.bias)

    with torch.no_grad():
        return linear("second", torch.tanh(linear("first", x)))


def test_visits_come_in_a_fixed_order() -> None:
    logs = []
    for _ in range(3):
        net = Net()
        log: list[tuple[str, list[int]]] = []
        walk_of(net)[0].run(
            inputs(5), lambda name, visits, log=log: log.append((name, [v.worker for v in visits if v.merged]))
        )
        logs.append(log)
    assert logs[0] == [("first", [0, 1, 2, 3, 4]), ("second", [0, 1, 2, 3, 4])]
    assert logs[1] == logs[0] and logs[2] == logs[0]


def test_one_stream_runs_the_adapter_and_the_other_what_the_visitor_installs() -> None:
    net = Net()
    walk, deltas = walk_of(net)
    merged = {"first": pair(20), "second": pair(21)}

    def install(name: str, visits: list[Visit]) -> None:
        # Before any delta: the base module's own output, for both streams.
        for v in visits:
            module = getattr(net, name)
            torch.testing.assert_close(v.y, nn.functional.linear(v.x, module.weight, module.bias))
        deltas[name].merged = merged[name]

    batches = inputs(3)
    with nothing_left(net):
        walk.run(batches, install)
    assert len(net.seen) == 6
    for j, (task, given) in enumerate(batches):
        own = {name: deltas[name].tasks[task] for name in deltas}
        torch.testing.assert_close(net.seen[2 * j], dense(net, given["x"], own))
        torch.testing.assert_close(net.seen[2 * j + 1], dense(net, given["x"], dict(merged)))
        assert not any(y.requires_grad for y in net.seen)


def test_the_task_stream_alone() -> None:
    net = Net()
    walk, deltas = walk_of(net, both=False)
    deltas["first"] = Deltas([None, None], merged=pair(20))  # a merged delta has no stream to go to
    walk._deltas = deltas
    batches = inputs(1)
    walk.run(batches, ignore)
    own = {"first": None, "second": deltas["second"].tasks[0]}
    torch.testing.assert_close(net.seen[0], dense(net, batches[0][1]["x"], own))


def test_options_reach_the_forward() -> None:
    net, doubled = Net(), Net()
    batches = inputs(1)
    walk_of(net, gain=2.0)[0].run(batches, ignore)
    walk_of(doubled)[0].run([(0, {"x": 2.0 * batches[0][1]["x"]})], ignore)
    assert torch.equal(net.seen[0], doubled.seen[0])


def test_a_module_called_by_keyword() -> None:
    net = Net(lambda self, x: self.second(input=self.first(input=x)))
    seen = []
    walk_of(net)[0].run(inputs(1), lambda name, visits: seen.append((name, visits[0].x.shape)))
    assert seen == [("first", (2, 3, D)), ("second", (2, 3, D))]


def either(self: Net, x: Tensor) -> Tensor:
    return self.first(x) if float(x.sum()) > 0 else self.second(x)


def sometimes(self: Net, x: Tensor) -> Tensor:
    h = self.first(x)
    return self.second(h) if float(x.sum()) > 0 else h


@pytest.mark.parametrize(("path", "places"), [(either, ("first", "second")), (sometimes, ("None", "second"))])
def test_batches_that_part_are_refused(path: Callable[[Net, Tensor], Tensor], places: tuple[str, str]) -> None:
    net = Net(path)
    batches = [(0, {"x": sign * torch.ones(1, 2, D, dtype=torch.float64)}) for sign in (1.0, -1.0, 1.0)]
    with nothing_left(net), pytest.raises(LoraforgeError, match="same modules in the same order") as caught:
        walk_of(net)[0].run(batches, ignore)
    assert caught.value.got is not None and all(place in caught.value.got for place in places)
    assert caught.value.hint is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_inside_a_forward_comes_out(error: type[BaseException], late: bool) -> None:
    def broken(self: Net, x: Tensor) -> Tensor:
        h = self.first(x) if late else x
        if float(x[0, 0, 0]) == 7.0:
            raise error("broken forward")
        return self.second(h)

    net = Net(broken)
    batches = inputs(4)
    batches[2][1]["x"][0, 0, 0] = 7.0
    with nothing_left(net), pytest.raises(error, match="broken forward"):
        walk_of(net)[0].run(batches, ignore)
    assert net.seen == [], "no other batch walks on to the end"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", ["first", "second"])
def test_an_error_in_the_visitor_comes_out(error: type[BaseException], at: str) -> None:
    net = Net()

    def stop(name: str, visits: list[Visit]) -> None:
        if name == at:
            raise error("stopped")

    with nothing_left(net), pytest.raises(error, match="stopped"):
        walk_of(net)[0].run(inputs(3), stop)
    assert net.seen == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_from_outside_leaves_nothing() -> None:
    """Ctrl-C while a batch is on its way: the main thread waits for the baton."""

    def interrupted(self: Net, x: Tensor) -> Tensor:
        h = self.first(x)
        os.kill(os.getpid(), signal.SIGINT)
        return self.second(h)

    net = Net(interrupted)
    with nothing_left(net), pytest.raises(KeyboardInterrupt):
        walk_of(net)[0].run(inputs(3), ignore)


def test_a_model_that_swallows_errors_cannot_swallow_the_end() -> None:
    """Unwinding a paused forward is no `Exception`: a model's own `except Exception` does not keep it alive."""

    def careful(self: Net, x: Tensor) -> Tensor:
        try:
            return self.second(self.first(x))
        except Exception:  # noqa: BLE001 - what this test is about
            return x

    net = Net(careful)

    def stop(name: str, visits: list[Visit]) -> None:
        raise RuntimeError("stopped")

    with nothing_left(net), pytest.raises(RuntimeError, match="stopped"):
        walk_of(net)[0].run(inputs(2), stop)
    assert net.seen == []


def test_no_batch_at_all() -> None:
    net = Net()
    with nothing_left(net):
        walk_of(net)[0].run([], ignore)
    assert net.seen == []


def test_greenlets_are_taken_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("greenlet")
    assert isinstance(make_carrier(lambda: None), GreenletCarrier)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(make_carrier(lambda: None), ThreadCarrier)


def test_a_carrier_that_was_never_resumed_stops_without_running(carrier: type) -> None:
    ran = []
    fresh = carrier(lambda: ran.append(1))
    fresh.stop()
    fresh.stop()
    assert fresh.done and ran == []


def test_what_follows_the_last_stop_is_left_out() -> None:
    """With the number of stops known, the model's head never runs; hooks and carriers are gone all the same."""
    net = Net()
    walk, _ = walk_of(net)
    met: list[str] = []
    with nothing_left(net):
        walk.run(inputs(3), lambda name, visits: met.append(name), stops=2)
    assert met == ["first", "second"] and net.seen == [], "no forward came to its end"
    walk, _ = walk_of(net)
    walk.run(inputs(3), ignore)
    assert len(net.seen) == 6

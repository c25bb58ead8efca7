"""Where the time goes."""

from __future__ import annotations

import pytest
import torch

from loraforge.calibrate import clock
from loraforge.calibrate.clock import Clock


def test_parts_leave_out_what_lies_inside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    watch = Clock()
    with watch.part("walk"):  # 0 .. 1, then 3 .. 7
        with watch.part("solve"):  # 1 .. 3
            pass
    with watch.part("solve"):  # 20 .. 21
        pass
    assert watch.seconds == {"walk": 5.0, "solve": 3.0}


def test_a_part_that_fails_is_closed() -> None:
    watch = Clock(torch.device("cpu"))
    with pytest.raises(KeyError), watch.part("a"):
        raise KeyError
    with watch.part("b"):
        pass
    assert set(watch.seconds) == {"a", "b"} and watch.work == {}
    watch.did("b", 2.0)
    watch.did("b", 3.0)
    assert watch.work == {"b": 5.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_parts_on_a_gpu_are_those_of_the_device() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    watch = Clock(device)
    with watch.part("busy"):
        for _ in range(50):
            x @ x
    with watch.part("idle"):
        pass
    found = watch.seconds
    assert found["busy"] > 1e-3 > found["idle"] and watch.seconds == found

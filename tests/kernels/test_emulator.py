"""The emulator itself: it must find the mistakes that it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.emulator import EmulatorError, emulate

MISTAKES = Path(__file__).parent / "emulated" / "mistakes.cpp"


def _run(case, kind="plain", **inputs):
    return emulate(case, "mistakes", kind, source=MISTAKES, **inputs)


@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
def test_a_sound_kernel_passes(kind):
    x = torch.arange(70, dtype=torch.float64)
    assert _run("fine", kind, x=x)["out"].item() == 2415.0


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("divergent", "plain", "barrier"),
        ("divergent", "thread", "barrier"),
        ("two_barriers", "plain", "threads wait at different barriers"),
        ("half_a_shuffle", "plain", "returned|barrier"),
        ("too_much_shared", "plain", "more dynamic shared memory"),
        ("beyond_shared", "address", "heap-buffer-overflow"),
        ("beyond_global", "address", "heap-buffer-overflow"),
        ("missing_barrier", "thread", "data race"),
    ],
)
def test_a_planted_mistake_is_found(case, kind, words):
    with pytest.raises(EmulatorError, match=words):
        _run(case, kind)


def test_an_unknown_case_is_refused():
    with pytest.raises(EmulatorError, match="no such case"):
        _run("nothing")


def test_a_missing_input_is_named():
    with pytest.raises(EmulatorError, match="no input named x"):
        _run("fine")


def test_arrays_come_back_as_they_went(rng):
    from tests.kernels.emulator import _pack, _unpack

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        for shape in ((), (0, 3), (2, 3)):
            t = (torch.rand(shape, generator=rng) * 100).to(dtype)
            back = _unpack((1).to_bytes(8, "little") + _pack("t", t))["t"]
            assert torch.equal(back, t) and back.dtype == dtype

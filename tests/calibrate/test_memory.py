"""The request to the allocator: what is asked, and that its absence is no error."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from loraforge.calibrate import memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What `mallopt` was told."""
    told: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=told.__setitem__))
    return told


def test_one_arena_that_keeps_what_is_freed(monkeypatch: pytest.MonkeyPatch, asked: dict[int, int]) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    memory.share_one_heap()
    # M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; the threshold may be 32 MiB at most.
    assert asked == {-8: 1, -3: 32 * 2**20, -1: 256 * 2**20}


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, asked: dict[int, int]) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory.share_one_heap()
    assert asked == {}


def test_a_library_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or SimpleNamespace())
    memory.share_one_heap()
    assert opened == [None]

"""Jobs for the test of processes."""

from __future__ import annotations

import os
from typing import Any

import torch

from loraforge.bench.memory import peak_above


def pid() -> dict[str, Any]:
    return {"pid": os.getpid(), "threads": torch.get_num_threads()}


def grow(mebi: int) -> dict[str, Any]:
    return {"peak": peak_above(lambda: torch.ones(mebi * 2**18), torch.device("cpu"))[1]}


def speak() -> dict[str, Any]:
    print("not an answer")
    return {"said": True}


def fail() -> dict[str, Any]:
    return {"quotient": 1 / 0}


def die() -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}

"""How results of two devices are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from loraforge.types import LowRank
from tests.device.pretend import Pretend

# Where nothing is but rounding: work in float64 rounded once to float32 factors, whose products then are compared.
# On a real GPU sums run in another order, and its own decompositions: 1e-5 is what is promised.
TOLERANCE = {"pretended": 2e-6, "real": 1e-5}
# Reading, writing and the inputs of calibration are the CPU's work; so are random draws, which no device may change.
CPU_WORK = (
    "adapters/", "storage/", "checkpoints/", "calibrate/data", "calibrate/tensors", "calibrate/checks",
    "calibrate/batches", "calibrate/encode", "linalg/draws", "linalg/randomized", "outside",
)  # fmt: skip


def tolerance(gpu: Pretend | None) -> float:
    """Largest relative Frobenius distance of two merged deltas."""
    return TOLERANCE["real" if gpu is None else "pretended"]


def away(found: Mapping[str, LowRank], want: Mapping[str, LowRank]) -> float:
    """Largest relative Frobenius distance of a module's deltas; both in the computer's own memory."""
    assert set(found) == set(want) and want
    worst = 0.0
    for name, pair in want.items():
        got = found[name]
        assert type(got.B) is type(got.A) is torch.Tensor and got.B.device.type == got.A.device.type == "cpu"
        expected = pair.delta(torch.float64)
        worst = max(worst, float((got.delta(torch.float64) - expected).norm() / expected.norm().clamp_min(1e-30)))
    return worst


def files_away(found: Path, want: Path) -> float:
    """Largest relative distance of a tensor in two folders of files (or two files) of the same names."""
    files = [want] if want.is_file() else sorted(want.rglob("*.safetensors"))
    assert files
    worst = 0.0
    for file in files:
        own = load_file(file)
        other = load_file(found if want.is_file() else found / file.relative_to(want))
        assert set(own) == set(other)
        for key, tensor in own.items():
            assert tensor.dtype == other[key].dtype and tensor.shape == other[key].shape
            size = tensor.double().norm().clamp_min(1e-30)
            worst = max(worst, float((other[key].double() - tensor.double()).norm() / size))
    return worst


def host_work(gpu: Pretend, entries: int) -> dict[tuple[str, str], int]:
    """Operators on CPU tensors of more than so many entries, but for what is the CPU's work."""
    return {key: n for key, n in gpu.host_ops.items() if n > entries and not key[1].startswith(CPU_WORK)}

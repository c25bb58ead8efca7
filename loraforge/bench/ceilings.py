"""What the device can do at most, measured in the same run: the ceilings that a roofline share refers to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from loraforge.bench.costs import Cost
from loraforge.bench.timing import Clock, interleave

# (bytes of the copied tensor, side of the multiplied matrices) by device and whether it is a tiny run.
_SIZES = {("cpu", False): (128 * 2**20, 768), ("cuda", False): (2**30, 8192), ("cpu", True): (2**16, 32)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of a device.

    Attributes:
        bytes_per_second: Of a copy, read and written bytes together.
        flops_per_second: Of a square matrix product, by dtype.
    """

    bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def shortest(self, cost: Cost) -> float:
        """Least seconds for that many bytes and flops: max(bytes / bandwidth, flops / rate).

        Products of 16-bit numbers may be made in float32 where that is faster (most processors).
        """
        rate = self.flops_per_second[cost.precision]
        if cost.precision == "bfloat16":
            rate = max(rate, self.flops_per_second["float32"])
        return max(cost.bytes / self.bytes_per_second, cost.flops / rate)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"flops_per_second": dict(self.flops_per_second)}


def measure_ceilings(clock: Clock, *, tiny: bool = False) -> Ceilings:
    """Copy bandwidth and matrix rates of the clock's device; the best of five, as a ceiling should be.

    Matrix products run as torch runs them by default: float32 without reduced precision unless the caller allowed it.
    """
    size, side = _SIZES.get((clock.device.type, tiny), _SIZES["cpu", tiny])
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    forms: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    for name, dtype in _DTYPES.items():
        # Processors without bfloat16 arithmetic take very long.
        d = side // 2 if dtype == torch.bfloat16 and clock.device.type == "cpu" else side
        a = torch.randn(d, d, device=clock.device).to(dtype)  # of ones a GPU multiplies faster than of numbers
        forms[name] = partial(torch.mm, a, a, out=torch.empty_like(a))
    times = interleave(forms, clock, runs=5)
    best = {name: max(min(found.seconds), 1e-9) for name, found in times.items()}
    flops = {name: 2.0 * times[name].result.shape[0] ** 3 / best[name] for name in _DTYPES}
    return Ceilings(2.0 * size / best["copy"], flops)

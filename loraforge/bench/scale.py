"""Time and memory against one size at a time: adapters, rank, width and modules of an `svd` merge, tokens of a sweep.

The other sizes stay at those of `_BASE`. Every point is a process of its own on the CPU, and points are taken in turn,
round after round. The exponents are those of the range measured: fixed costs of small sizes pull them towards 0.

An `svd` merge is compared with the best approximation in float64, by its relative error, found through a QR of the
stacked factors; a sweep by its objective, which must be below 1, that of no merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from loraforge.bench.fit import fit_power
from loraforge.bench.memory import peak_above
from loraforge.bench.merge import layer_of, make_adapters, pairs_of
from loraforge.bench.peers import dense
from loraforge.bench.session import Session
from loraforge.bench.timing import Clock, Times
from loraforge.linalg.device import choose_device
from loraforge.linalg.factored import truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.merging.methods import find_method
from loraforge.types import LowRank

ROUNDS = {"default": 3, "full": 5, "tiny": 1}
_BASE = {
    "tiny": {"adapters": 2, "rank": 4, "width": 64, "modules": 1},
    "default": {"adapters": 4, "rank": 16, "width": 1024, "modules": 4},
    "full": {"adapters": 4, "rank": 16, "width": 4096, "modules": 28},
}
_AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"adapters": (2, 3), "width": (32, 64)},
    "default": {
        "adapters": (2, 4, 8, 16), "rank": (4, 8, 16, 32, 64), "width": (128, 256, 512, 1024, 2048),
        "modules": (1, 2, 4, 8, 16),
    },
    "full": {
        "adapters": (2, 4, 8, 16), "rank": (4, 8, 16, 32, 64), "width": (512, 1024, 2048, 4096, 8192),
        "modules": (7, 14, 28, 56, 112, 224),
    },
}  # fmt: skip
# The dense peer is shown where it ends within seconds.
_DENSE = {"tiny": 32, "default": 512, "full": 1024}
_SWEEP = {
    "tiny": {"layers": 1, "width": 32, "rank": 2, "tasks": 2, "tokens": 16, "solves": 1},
    "default": {"layers": 1, "width": 128, "rank": 8, "tasks": 2, "tokens": 32, "solves": 1},
    "full": {"layers": 4, "width": 384, "rank": 8, "tasks": 3, "tokens": 64, "solves": 1},
}
_SAMPLES = {"tiny": (4, 8), "default": (8, 16, 32, 64), "full": (16, 32, 64, 128, 256)}
_FLOAT32 = 1e-5  # factors in float32
_HERE, _SWEEPS = "loraforge.bench.scale:merge_once", "loraforge.bench.iteris_problem:solve"

Point = tuple[str, str, int, dict[str, int]]
"""(axis, form, its value, all sizes)."""


def points(size: str) -> list[Point]:
    """All points of a size."""
    found: list[Point] = []
    for axis, values in _AXES[size].items():
        for value in values:
            sizes = _BASE[size] | {axis: value}
            found.append((axis, "loraforge", value, sizes))
            if axis == "width" and value <= _DENSE[size]:
                found.append((axis, "torch", value, sizes))
    for samples in _SAMPLES[size]:
        sizes = _SWEEP[size] | {"samples": samples}
        found.append(("tokens", "loraforge", samples * sizes["tasks"] * sizes["tokens"], sizes))
    return found


def measure(session: Session) -> None:
    """Measures the group `scale`."""
    found, rounds = points(session.size), session.runs or ROUNDS[session.size]
    results: list[list[dict[str, Any]]] = [[] for _ in found]
    for round_ in range(rounds):
        for at, point in enumerate(found):
            session.tell("scale", f"{point[0]} {point[2]}", round_ * len(found) + at, rounds * len(found))
            results[at].append(_run(session, point, last=round_ == rounds - 1))
    for point, runs in zip(found, results, strict=True):
        _add(session, point, runs)
    _fit(session)


def _run(session: Session, point: Point, *, last: bool) -> dict[str, Any]:
    axis, form, _, sizes = point
    place = {"device": str(session.device), "threads": session.threads}
    if axis == "tokens":
        return session.jobs.run(_SWEEPS, side="sweep", sizes=sizes, exact=None, **place)
    return session.jobs.run(_HERE, form=form, sizes=sizes, compare=last, **place)


def _add(session: Session, point: Point, runs: list[dict[str, Any]]) -> None:
    axis, form, value, sizes = point
    times = Times([run["seconds"] for run in runs], None)
    peak = sorted(run["peak_bytes"] for run in runs)[len(runs) // 2]
    common: dict[str, Any] = {"op": axis, "size": sizes | {axis: value}, "peak_bytes": peak}
    if axis == "tokens":
        objective = runs[-1]["objective"]
        session.add("scale", f"{axis} {value}", form, times, objective=objective, ok=objective < 1.0, **common)
        return
    error = runs[-1]["error"]
    row = session.add(
        "scale", f"{axis} {value}", form, times, error=error, allowed=_FLOAT32, ok=error <= _FLOAT32, **common
    )
    ours = [r for r in session.rows if r["group"] == "scale" and r["case"] == row["case"] and r["form"] == "loraforge"]
    if form == "torch" and ours:
        ours[0] |= {"peer": "torch", "speedup": row["seconds"] / max(ours[0]["seconds"], 1e-9)}


def _fit(session: Session) -> None:
    """The exponent of every axis and form, of seconds and of bytes."""
    rows = [row for row in session.rows if row["group"] == "scale"]
    for axis, form in dict.fromkeys((row["op"], row["form"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["form"]) == (axis, form)]
        for quantity in ("seconds", "peak_bytes"):
            fit = fit_power([row["size"][axis] for row in mine], [row[quantity] for row in mine])
            if fit is not None:
                session.fits.append({"axis": axis, "form": form, "quantity": quantity, **asdict(fit)})


def merge_once(form: str, sizes: Mapping[str, int], device: str, threads: int, compare: bool) -> dict[str, Any]:
    """One point, as a job: a first call for its peak memory, then the timed calls.

    Args:
        form: "loraforge" (through the factors) or "torch" (dense).
        sizes: adapters, rank, width, modules.
        device: cpu or cuda:i.
        threads: Threads of the CPU.
        compare: Whether to compare the result with float64.
    """
    place = choose_device(device)
    clock = Clock(place, threads)
    rank, count = sizes["rank"], sizes["adapters"]
    weights = [1.0 / count] * count
    small = make_adapters(32, 1, 2, count, place)
    _merge(form, small, weights, 2)()  # libraries allocate what they keep before the memory is looked at
    adapters = make_adapters(sizes["width"], sizes["modules"], rank, count, place)
    call = _merge(form, adapters, weights, rank)
    found, peak = peak_above(call, place)
    taken, _ = clock.time(call)
    seconds, _ = clock.time(call, clock.calls(taken))
    error = None
    if compare:
        error = max(
            _excess(mine, pairs, weights) for mine, pairs in zip(found, pairs_of(adapters).values(), strict=True)
        )
    return {"seconds": seconds, "peak_bytes": peak, "error": error}


def _merge(
    form: str, adapters: list[dict[str, LowRank]], weights: list[float], rank: int
) -> Callable[[], list[LowRank]]:
    """The call: weighted sum of every module, cut to a rank."""
    if form == "torch":
        return lambda: [dense.svd(pairs, weights, rank) for pairs in pairs_of(adapters).values()]
    row = find_method("svd")
    function, params = row.load_function(), row.make_params()

    def ours() -> list[LowRank]:
        sums = [function(layer_of(name, pairs, weights), params) for name, pairs in pairs_of(adapters).items()]
        return [cut.factors for cut in truncate_many(sums, RankRule(rank=rank))]

    return ours


def _excess(found: LowRank, pairs: list[LowRank], weights: list[float]) -> float:
    """How far the relative error of a cut lies from that of the best one, in float64 and through the factors."""
    wide = [pair.to(torch.float64) for pair in pairs]
    B = torch.cat([w * pair.scaling * pair.B for w, pair in zip(weights, wide, strict=True)], dim=1)
    A = torch.cat([pair.A for pair in wide])
    S = torch.linalg.svdvals(_core(B, A))
    mine = found.to(torch.float64)
    missed = _core(torch.cat([B, -mine.scaling * mine.B], dim=1), torch.cat([A, mine.A])).norm()
    return abs(float((missed - S[found.rank :].norm()) / S.norm()))


def _core(B: Tensor, A: Tensor) -> Tensor:
    """The small matrix with the singular values of B A."""
    return torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T

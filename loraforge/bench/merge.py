"""Merge methods in memory beside what else a PyTorch user would call: PEFT, dense PyTorch, the document's rSVD.

Adapters are synthetic: factor columns fall off as i^-1/2, in float32, weights .5 each; modules are those of one layer.
Every side has its factors in memory and gives factors or the dense update; nothing is read or written.

What is compared: dense updates by their relative Frobenius distance to the float64 formula. Cuts to a rank by their
relative error ||M - W_k|| / ||W||, which the best approximation in float64 bounds from below: the cut itself may not be
unique. Random drops by <M, T> / <T, T> on the undropped sum T, whose expectation is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraforge.bench.cases import Case, Draws, Work, frobenius_error
from loraforge.bench.peers import dense
from loraforge.bench.peers.peft_merge import PeftMerge
from loraforge.bench.session import Session
from loraforge.linalg.factored import truncate_many
from loraforge.linalg.flatten import flatten_update
from loraforge.linalg.rank import RankRule
from loraforge.linalg.sketch import low_rank
from loraforge.merging.methods import find_method
from loraforge.types import LayerInputs, LowRank, Merged

BUDGET = {"default": 0.6, "full": 10.0, "tiny": 0.0}
# width of the square modules, how many, rank
_SIZES = {"tiny": (48, 2, 4), "default": (768, 2, 16), "full": (2048, 4, 16)}
_WEIGHTS = (0.5, 0.5)
_DENSITY = 0.2
_KEPT = 0.5  # density of the random drops

Adapters = Sequence[Mapping[str, LowRank]]


def cases(size: str) -> list[Case]:
    """The cases of a size."""
    width, modules, rank = _SIZES[size]
    label = f"{modules} x {width}x{width}, r={rank}"
    sizes = {"width": width, "modules": modules, "rank": rank, "adapters": len(_WEIGHTS)}
    builders = {
        f"svd, rank {rank}": _svd,
        "concat": _concat,
        f"rsvd, rank {rank}": _rsvd,
        "iso-c": _iso,
        "ties, dense": _ties,
        f"ties, rank {rank}": _ties_cut,
        "dare, dense": _dare,
        f"dare, rank {rank}": _dare_cut,
    }
    return [Case(op, label, sizes, partial(build, width, modules, rank)) for op, build in builders.items()]


def measure(session: Session) -> None:
    """Measures the group `merge`."""
    found = cases(session.size)
    for done, case in enumerate(found):
        session.tell("merge", case.name, done, len(found))
        session.measure("merge", case, BUDGET[session.size])


def make_adapters(width: int, modules: int, rank: int, count: int, device: torch.device) -> list[dict[str, LowRank]]:
    """`count` adapters of `modules` square modules."""
    draws = Draws(device)
    decay = torch.arange(1, rank + 1, dtype=torch.float32, device=device).rsqrt()
    return [
        {
            f"module{i}": LowRank(draws.normal(width, rank) * decay, draws.normal(rank, width) / width**0.5)
            for i in range(modules)
        }
        for _ in range(count)
    ]


def pairs_of(adapters: Adapters) -> dict[str, list[LowRank]]:
    """Module -> the factors of every adapter."""
    return {name: [adapter[name] for adapter in adapters] for name in adapters[0]}


def layer_of(name: str, pairs: Sequence[LowRank], weights: Sequence[float] = _WEIGHTS) -> LayerInputs:
    """What a method sees of a module."""
    return LayerInputs(name, pairs, weights, [f"task{i}" for i in range(len(pairs))], [None] * len(pairs))


def merged(method: str, adapters: Adapters, **params: Any) -> dict[str, Merged]:
    """A method's own part, module by module."""
    row = find_method(method)
    function, parameters = row.load_function(), row.make_params(params)
    return {name: function(layer_of(name, pairs), parameters) for name, pairs in pairs_of(adapters).items()}


def _summed(method: str, adapters: Adapters, rule: RankRule) -> list[LowRank]:
    """A sum of factors and its cut, as a merge does it."""
    return [cut.factors for cut in truncate_many([_low(u) for u in merged(method, adapters).values()], rule)]


def _low(update: Merged) -> LowRank:
    if not isinstance(update, LowRank):
        raise TypeError(f"factors expected, found {type(update).__name__}")
    return update


def _sums(adapters: Adapters) -> list[Tensor]:
    """sum_i w_i D_i of every module, dense float64."""
    return [dense.weighted([p.to(torch.float64) for p in pairs], _WEIGHTS) for pairs in pairs_of(adapters).values()]


def _deltas(found: Any) -> list[Tensor]:
    """Dense float64 updates of whatever a form gives."""
    items = found.values() if isinstance(found, Mapping) else found
    return [item.double() if isinstance(item, Tensor) else item.delta(torch.float64) for item in items]


def _misses(wanted: Sequence[Tensor]) -> Callable[[Any], list[Tensor]]:
    """Relative Frobenius error of a result against dense updates, one number a module."""
    return lambda found: [
        ((mine - right).norm() / right.norm())[None] for mine, right in zip(_deltas(found), wanted, strict=True)
    ]


def _least(wanted: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The relative error of the best approximation of that rank, from the singular values in float64."""
    spectra = [torch.linalg.svdvals(W) for W in wanted]
    return [(S[rank:].norm() / S.norm())[None] for S in spectra]


def _coefficients(wanted: Sequence[Tensor]) -> Callable[[Any], list[Tensor]]:
    """<M, T> / <T, T>, one number a module."""
    return lambda found: [
        ((mine * right).sum() / right.square().sum())[None] for mine, right in zip(_deltas(found), wanted, strict=True)
    ]


def _svd(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    peft, wanted = PeftMerge(adapters), _sums(adapters)
    return Work(
        forms={
            "loraforge": lambda: _summed_weighted(adapters, RankRule(rank=rank)),
            "peft": lambda: peft.merge("svd", _WEIGHTS, svd_rank=rank),
            "torch": lambda: [dense.svd(pairs, _WEIGHTS, rank) for pairs in pairs_of(adapters).values()],
        },
        exact=lambda: _least(wanted, rank),
        rtol=1e-5,  # float32 factors
        numbers=_misses(wanted),
        peer="peft",
    )


def _summed_weighted(adapters: Adapters, rule: RankRule) -> list[LowRank]:
    return _summed("svd", adapters, rule)


def _concat(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    peft = PeftMerge(adapters)
    return Work(
        forms={
            "loraforge": lambda: merged("concat", adapters),
            "peft": lambda: peft.merge("cat", _WEIGHTS),
        },
        exact=lambda: _sums(adapters),
        rtol=1e-6,  # float32 factors
        numbers=_deltas,
        distance=frobenius_error,
        peer="peft",
    )


def _rsvd(width: int, modules: int, rank: int, device: torch.device) -> Work:
    """The sketch on the factors beside the document's on the dense sum; norms are near, so both weigh nearly .5."""
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    wanted = _sums(adapters)
    return Work(
        forms={
            "loraforge": lambda: merged("rsvd", adapters, rank=rank, exact="never"),
            "document": lambda: [dense.document_rsvd(pairs, rank) for pairs in pairs_of(adapters).values()],
        },
        exact=lambda: _least(wanted, rank),
        rtol=0.03,  # what a sketch with 8 columns more and two power steps misses beyond the best
        own={"document": 0.25},  # no column more
        numbers=_misses(wanted),
        peer="document",
    )


def _iso(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    params = find_method("iso-c").make_params()

    def ours() -> list[LowRank]:
        cut = truncate_many([_low(update) for update in merged("iso-c", adapters).values()], RankRule())
        return [_low(flatten_update(found.factors, found.spectrum, params)[0]) for found in cut]

    def exact() -> list[Tensor]:
        return [dense.iso_c([p.to(torch.float64) for p in pairs], _WEIGHTS) for pairs in pairs_of(adapters).values()]

    return Work(
        forms={
            "loraforge": ours,
            "torch": lambda: [dense.iso_c(pairs, _WEIGHTS) for pairs in pairs_of(adapters).values()],
        },
        exact=exact,
        rtol=1e-5,
        numbers=_deltas,
        distance=frobenius_error,
    )


def _exact_ties(adapters: Adapters) -> list[Tensor]:
    return [
        dense.ties([p.to(torch.float64) for p in pairs], _WEIGHTS, _DENSITY) for pairs in pairs_of(adapters).values()
    ]


def _our_ties(adapters: Adapters) -> dict[str, Merged]:
    return merged("ties", adapters, density=_DENSITY, scope="module")


def _ties(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    return Work(
        forms={
            "loraforge": lambda: [update.delta() for update in _our_ties(adapters).values()],
            "torch": lambda: [dense.ties(pairs, _WEIGHTS, _DENSITY) for pairs in pairs_of(adapters).values()],
        },
        exact=lambda: _exact_ties(adapters),
        rtol=8.0 / width,  # a few entries at the threshold, or with a sum near 0, flip with the rounding of float32
        numbers=_deltas,
        distance=frobenius_error,
    )


def _ties_cut(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    peft, wanted = PeftMerge(adapters), _exact_ties(adapters)
    rule = RankRule(rank=rank)
    return Work(
        forms={
            "loraforge": lambda: [low_rank(u, rule, name).factors for name, u in _our_ties(adapters).items()],
            "peft": lambda: peft.merge("ties_svd", _WEIGHTS, svd_rank=rank, density=_DENSITY),
        },
        exact=lambda: _least(wanted, rank),
        rtol=0.01,  # a sketch of a flat spectrum
        numbers=_misses(wanted),
        peer="peft",
    )


def _dare(width: int, modules: int, rank: int, device: torch.device) -> Work:
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    wanted = _sums(adapters)
    return Work(
        forms={
            "loraforge": lambda: [u.delta() for u in merged("dare", adapters, density=_KEPT).values()],
            "torch": lambda: [dense.dare(pairs, _WEIGHTS, _KEPT) for pairs in pairs_of(adapters).values()],
        },
        exact=lambda: [W.new_ones(1) for W in wanted],
        rtol=10.0 / width,  # more than five standard deviations of width^2 draws
        numbers=_coefficients(wanted),
    )


def _dare_cut(width: int, modules: int, rank: int, device: torch.device) -> Work:
    """Against a float64 merge with other draws: the leading directions hardly depend on which entries went."""
    adapters = make_adapters(width, modules, rank, len(_WEIGHTS), device)
    peft, wanted = PeftMerge(adapters), _sums(adapters)
    rule = RankRule(rank=rank)

    def exact() -> list[Tensor]:
        dropped = [dense.dare(pairs, _WEIGHTS, _KEPT).double() for pairs in pairs_of(adapters).values()]
        return _coefficients(wanted)([dense.best_rank(W, rank) for W in dropped])

    return Work(
        forms={
            "loraforge": lambda: [
                low_rank(u, rule, name).factors for name, u in merged("dare", adapters, density=_KEPT).items()
            ],
            "peft": lambda: peft.merge("dare_linear_svd", _WEIGHTS, svd_rank=rank, density=_KEPT),
        },
        exact=exact,
        rtol=20.0 / width,  # two draws, and a sketch of a flat spectrum
        numbers=_coefficients(wanted),
        peer="peft",
    )

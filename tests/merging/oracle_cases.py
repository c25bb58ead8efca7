"""The table of oracle cases: a method, its parameters, what it must give, and on which adapters it is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.merging.scenarios import Array, Scenario
from tests.oracles import document, elementwise, iasad, scalars, spectral

SIGNED = (0.7, -0.4, 1.3)
Weights = Sequence[float]
Oracle = Callable[[Scenario, Weights], dict[str, Array]]


@dataclass(frozen=True)
class Case:
    """A method under parameters, and what it must give.

    `default` is what the oracle takes for weights that were not given; `signed` are tried beside them (`shares`: made
    to sum to 1; None: the method takes none, or their meaning is not laid down). `dense` results have no low rank: an
    adapter can hold their best approximation of rank R only.
    """

    method: str
    oracle: Oracle
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    default: str = "one"
    signed: Weights | None = SIGNED
    shares: bool = False
    dense: bool = False
    where: tuple[str, ...] = ("mixed", "full", "twice")

    @property
    def id(self) -> str:
        said = {**self.params, **self.options}
        return self.method + "".join(f" {k}={v}" for k, v in said.items())


def by_module(rule: Callable[..., Array], **options: Any) -> Oracle:
    return lambda s, w: {m: rule(d, w, **options) for m, d in s.deltas.items()}


def together(rule: Callable[..., dict[str, Array]], **options: Any) -> Oracle:
    return lambda s, w: rule(s.deltas, w, **options)


def flat(oracle: Oracle, **options: Any) -> Oracle:
    """The rank rule of an adapter (at most R), then the flattening."""
    return lambda s, w: {m: spectral.flattened(W, rank=s.bound(m), **options) for m, W in oracle(s, w).items()}


def rescaled(oracle: Oracle, size: Callable[[list[Array], Array], float], measure: Callable[[Array], float]) -> Oracle:
    """The flattened result with `measure` of it made `size` of (the D_i, their sum)."""

    def of(s: Scenario, w: Weights) -> dict[str, Array]:
        out = {}
        for m, W in oracle(s, w).items():
            D = [x * d if d is not None else np.zeros_like(W) for x, d in zip(w, s.deltas[m], strict=True)]
            out[m] = W * size(D, np.sum(D, axis=0)) / measure(W)
        return out

    return of


def nuclear(W: Array) -> float:
    return float(np.linalg.svd(W, compute_uv=False).sum())


def norm(W: Array) -> float:
    return float(np.linalg.norm(W))


def best(s: Scenario, w: Weights) -> dict[str, Array]:
    """svd: the best approximation of the sum at the largest rank of the adapters."""
    return {m: spectral.truncated(spectral.total(d, w), max(s.ranks(m))) for m, d in s.deltas.items()}


def split(**options: Any) -> Oracle:
    return lambda s, w: {m: iasad.iso_iasad(d, w, s.ranks(m), **options) for m, d in s.deltas.items()}


def by_aligned(s: Scenario, w: Weights) -> dict[str, Array]:
    return {m: document.geometric_aligned([d for d in ds if d is not None]) for m, ds in s.deltas.items()}


def core_ties(density: float, scope: str) -> Oracle:
    def of(s: Scenario, w: Weights) -> dict[str, Array]:
        sides = {m: [None if p is None else (p.scaling * p.B, p.A) for p in s.pairs(m)] for m in s.modules}
        factors = {
            m: ([None if x is None else x[0] for x in xs], [None if x is None else x[1] for x in xs])
            for m, xs in sides.items()
        }
        return elementwise.core_ties(factors, w, density, scope)

    return of


def on_factors(rule: Callable[..., Array], **options: Any) -> Oracle:
    """A rule on raw factors; adapters that lack the module are not there."""

    def of(s: Scenario, w: Weights) -> dict[str, Array]:
        out = {}
        for m in s.modules:
            here = [(p, x) for p, x in zip(s.pairs(m), w, strict=True) if p is not None]
            parts = ([p.B for p, _ in here], [p.A for p, _ in here], [p.scaling for p, _ in here])
            more = ([x for _, x in here],) if rule is document.robust_merge else ()
            out[m] = rule(*parts, *more, **options)
        return out

    return of


def vectors(rule: Callable[..., Array], scope: str = "module", weighted: bool = False, **options: Any) -> Oracle:
    def of(s: Scenario, w: Weights) -> dict[str, Array]:
        more = {"weights": w} if weighted else {}
        return scalars.over(s.deltas, scope, lambda v: rule(v, **more, **options))

    return of


SUM = by_module(spectral.total)
ISO = flat(SUM)
CTS = by_module(spectral.iso_cts)
TWO = ("full", "equal")
DENSE: dict[str, Any] = {"dense": True}
FIXED: dict[str, Any] = {"signed": None}
ANY = ("mixed", "full", "twice", "equal")

CASES = [
    Case("task-arithmetic", SUM),
    Case("concat", SUM),
    Case("weighted-average", SUM, default="mean"),
    Case("svd", best),
    Case("rsvd", lambda s, w: {m: document.rsvd(W) for m, W in SUM(s, w).items()}, {"exact": "always"}, default="mean"),
    Case(
        "rsvd",
        lambda s, w: {m: document.rsvd(W, 0.7, 1, 5) for m, W in SUM(s, w).items()},
        {"exact": "always"},
        {"energy": 0.7, "min_rank": 1, "max_rank": 5},
        default="mean",
    ),
    Case("geometric-mean", on_factors(document.geometric_mean), where=("equal", "twice"), **FIXED),
    Case("geometric-mean", on_factors(document.geometric_code), {"variant": "code"}, where=("equal",), **FIXED),
    Case("geometric-mean", by_aligned, {"align": True}, where=("equal", "twice"), **FIXED),
    # --- spectral
    Case("iso-c", ISO),
    Case("iso-c", flat(SUM, mean_over="full", alpha=1.5), {"mean_over": "full", "alpha": 1.5}),
    Case("iso-c", flat(SUM, kind="rms"), {"average": "rms"}),
    Case("iso-c", flat(SUM, kind="geo", power=0.5), {"average": "geo", "power": 0.5}),
    Case("iso-c", flat(SUM, power=0.25), {"power": 0.25}),
    Case("iso-c", rescaled(ISO, lambda D, W: norm(W), norm), {"target_norm": "fro"}),
    Case(
        "iso-c",
        rescaled(ISO, lambda D, W: 2 * nuclear(W), nuclear),
        {"target_norm": "nuclear", "mean_over": "full", "alpha": 2.0},
    ),
    Case(
        "iso-c",
        rescaled(ISO, lambda D, W: float(np.mean([norm(d) for d in D])), norm),
        {"target_norm": "mean-adapter"},
    ),
    Case(
        "iso-c",
        lambda s, w: {m: spectral.flattened(W, rank=3) for m, W in SUM(s, w).items()},
        options={"rank": 3},
    ),
    Case("iso-cts", flat(CTS)),
    Case("iso-cts", flat(by_module(spectral.iso_cts, fraction=0.3)), {"common_fraction": 0.3}),
    Case("iso-cts", flat(by_module(spectral.iso_cts, fraction=0.0)), {"common_fraction": 0.0}),
    Case("iso-cts", flat(CTS, mean_over="full"), {"mean_over": "full"}),
    Case("iso-iasad", flat(split()), where=ANY),
    Case("iso-iasad", flat(split(rank_basis="lora")), {"rank_basis": "lora"}, where=ANY),
    Case(
        "iso-iasad",
        flat(split(rank_basis="lora", rank_ratio=0.4, sparsity=0.3, prune_level="element", iters=4)),
        {"rank_basis": "lora", "rank_ratio": 0.4, "sparsity": 0.3, "prune_level": "element", "iters": 4},
    ),
    Case(
        "iso-iasad",
        flat(split(rank_basis="lora", keep="smallest", final_svd=False), mean_over="full"),
        {"rank_basis": "lora", "preset": "document"},
    ),
    Case(
        "iso-iasad",
        flat(split(rank_basis="lora", center="mean")),
        {"rank_basis": "lora", "center": "mean"},
        where=ANY,
    ),
    Case("tsv", by_module(spectral.tsv)),
    Case("tsv", by_module(spectral.tsv, k=2), {"k": 2}),
    Case("wudi", by_module(spectral.wudi)),
    Case("wudi", by_module(spectral.wudi, ridge=0.05), {"ridge": 0.05}),
    Case("svc", by_module(spectral.svc, floor=0.1)),
    Case("svc", by_module(spectral.svc, floor=1.2), {"alpha": 1.2}),
    # --- element-wise
    *(
        Case(method, together(rule, density=density, scope=scope), {"density": density, "scope": scope}, **DENSE)
        for method, rule in (("ties", elementwise.ties), ("magnitude-prune", elementwise.magnitude_prune))
        for density, scope in ((0.2, "global"), (0.2, "module"), (0.55, "global"), (1.0, "module"))
    ),
    *(
        Case(
            method,
            together(rule, density=density, scope=scope),
            {"density": density, "scope": scope},
            signed=(1.0, -1.0),
            where=("integers",),
            **DENSE,
        )
        for method, rule in (("ties", elementwise.ties), ("magnitude-prune", elementwise.magnitude_prune))
        for density, scope in ((1e-5, "module"), (0.1, "global"), (0.3, "module"), (0.99, "global"))
    ),
    Case("breadcrumbs", by_module(elementwise.breadcrumbs), **DENSE),
    Case(
        "breadcrumbs",
        by_module(elementwise.breadcrumbs, density=0.6, gamma=0.1),
        {"density": 0.6, "gamma": 0.1},
        **DENSE,
    ),
    Case(
        "breadcrumbs",
        by_module(elementwise.breadcrumbs, density=0.5, gamma=0.0),
        {"density": 0.5, "gamma": 0.0},
        **DENSE,
    ),
    *(
        Case(method, rule(density, scope), {"density": density, "scope": scope})
        for method, rule in (
            ("knots-ties", lambda d, s: together(elementwise.knots_ties, density=d, scope=s)),
            ("core-ties", core_ties),
        )
        for density, scope in ((0.2, "global"), (0.2, "module"), (0.7, "global"))
    ),
    Case(
        "ties",
        flat(together(elementwise.ties, density=0.3, scope="module")),
        {"density": 0.3, "scope": "module"},
        {"post": "iso"},
    ),
    # --- one coefficient an adapter
    *(
        Case(method, vectors(rule, scope, **options), {"scope": scope, **options}, where=where, default="mean", **FIXED)
        for method, rule, options, where in (
            ("slerp", scalars.slerp, {}, TWO),
            ("slerp", scalars.slerp, {"t": 0.2}, TWO),
            ("karcher", scalars.karcher, {}, ANY),
            ("model-stock", scalars.model_stock, {}, ANY),
        )
        for scope in ("module", "global")
    ),
    Case(
        "karcher",
        vectors(scalars.karcher, weighted=True),
        default="mean",
        signed=(0.5, 0.2, 0.3),
        shares=True,
        where=("full", "twice"),
    ),
    # --- factors
    Case("robust-merge", on_factors(document.robust_merge), where=("equal", "twice", "mixed")),
]

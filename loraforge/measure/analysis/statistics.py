"""Statistics over heads: rank correlations, top-K overlap, counterexamples, bootstrap. Numbers in and out, torch-free.

Values are (n,) arrays in the order of the heads; NaN and infinities are heads without a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, rankdata

from loraforge.measure.analysis.null import DRAWS, Chance, common_members, permutation_p, rho_band, standard_ranks

Values = NDArray[np.float64]
BOOTSTRAPS = 1000


def finite_pairs(x: ArrayLike, y: ArrayLike) -> tuple[Values, Values]:
    """The values of the heads that have both, as (m,) and (m,)."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(a) & np.isfinite(b)
    return a[keep], b[keep]


def why_none(x: ArrayLike, y: ArrayLike) -> str | None:
    """Why two columns have no rank correlation; None if they have one."""
    a, b = finite_pairs(x, y)
    if len(a) < 2:
        return f"{len(a)} heads have both values"
    constant = [name for name, values in (("first", a), ("second", b)) if np.all(values == values[0])]
    return f"the {' and the '.join(constant)} value is the same for all {len(a)} heads" if constant else None


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rho with average ranks, over the heads that have both values; None where `why_none` says why."""
    a, b = finite_pairs(x, y)
    first, second = standard_ranks(a), standard_ranks(b)
    return None if first is None or second is None else float(np.clip(first @ second, -1, 1))


def kendall(x: ArrayLike, y: ArrayLike) -> float | None:
    """Kendall's tau-b, over the heads that have both values; None where `why_none` says why."""
    if why_none(x, y):
        return None
    return float(kendalltau(*finite_pairs(x, y)).statistic)


def within_layer_rho(x: ArrayLike, y: ArrayLike, layers: Sequence[Any]) -> tuple[float | None, int]:
    """Mean over the layers of rho within a layer, and how many layers have one: depth is partialled out.

    Args:
        x: (n,) values.
        y: (n,) values.
        layers: (n,) label of each head's layer.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    members: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        members.setdefault(layer, []).append(i)
    found = [rho for chosen in members.values() if (rho := spearman(a[chosen], b[chosen])) is not None]
    return (float(np.mean(found)) if found else None), len(found)


def correlation(
    x: ArrayLike, y: ArrayLike, layers: Sequence[Any], *, draws: int = DRAWS, seed: int = 0, brief: bool = False
) -> dict[str, Any]:
    """Everything that is said about one pair of columns, ready for JSON.

    Args:
        x: (n,) values.
        y: (n,) values.
        layers: (n,) label of each head's layer.
        draws: Permutations of each p.
        seed: Of permutations and resamples.
        brief: Leave out what takes most of the time: ci, kendall and within_layer.

    Returns:
        rho, n (heads with both), p_perm, rho95 (null band), reason (why there is no rho, or None), ci (percentile
        bootstrap over heads, 95 %), kendall and within_layer {rho, p_perm, layers}.
    """
    rho = spearman(x, y)
    n = len(finite_pairs(x, y)[0])
    found = {
        "rho": rho,
        "n": n,
        "p_perm": permutation_p(x, y, draws=draws, seed=seed),
        "rho95": rho_band(n),
        "reason": why_none(x, y),
    }
    if brief:
        return found
    inside, counted = within_layer_rho(x, y, layers)
    p_inside = permutation_p(x, y, groups=layers, draws=draws, seed=seed) if counted else None
    return found | {
        "ci": None if rho is None else bootstrap_rho(x, y, seed=seed),
        "kendall": kendall(x, y),
        "within_layer": {"rho": inside, "p_perm": p_inside, "layers": counted},
    }


def top_k(values: ArrayLike, k: int) -> list[int]:
    """Positions of the k largest finite values, largest first; of equal ones the earlier head."""
    numbers = np.asarray(values, dtype=float)
    places = np.flatnonzero(np.isfinite(numbers))
    return [int(i) for i in places[np.argsort(-numbers[places], kind="stable")][:k]]


def top_overlap(x: ArrayLike, y: ArrayLike, k: int) -> dict[str, Any]:
    """Share of the top k that two columns have in common, beside what chance gives.

    Over the heads that have both values; fewer than k of them cut k.

    Returns:
        overlap (hits / k), hits, k, n, expected (k / n), range95 (of the overlap by chance), p (hypergeometric, at
        least so many hits). Without heads overlap, expected, range95 and p are None.
    """
    a, b = finite_pairs(x, y)
    n = len(a)
    k = min(k, n)
    hits = len(set(top_k(a, k)) & set(top_k(b, k)))
    chance = common_members(hits, n, k, k) if k else None
    found: dict[str, Any] = {"overlap": hits / k if k else None, "hits": hits, "k": k, "n": n}
    if chance is None:
        return found | dict.fromkeys(("expected", "range95", "p"))
    return found | {"expected": k / n, "range95": [count / k for count in chance.range95], "p": chance.p}


@dataclass(frozen=True, slots=True)
class Cases:
    """The two kinds of counterexample to "what is important is what moves".

    Attributes:
        static: Positions of heads that are important and hardly move.
        plastic: Positions of heads that move much and are unimportant.
        thresholds: `x_hi`, `x_lo`, `y_hi`, `y_lo`; None without heads.
        chance: `static` and `plastic` beside what independence gives; None without heads.
    """

    static: list[int]
    plastic: list[int]
    thresholds: Mapping[str, float | None]
    chance: Mapping[str, Chance | None]


def find_cases(
    x: ArrayLike, y: ArrayLike, *, hi: float = 90, lo: float = 30, above_zero: NDArray[np.bool_] | None = None
) -> Cases:
    """Heads with x at or above its percentile `hi` and y at or below its `lo`, and the other way round.

    Percentiles are numpy's linear ones over the heads that have both values; thresholds belong to the sets.

    Args:
        x: (n,) importance.
        y: (n,) update.
        hi: Percentile from which a value is high, 0 to 100.
        lo: Percentile up to which a value is low.
        above_zero: (n,) whether a head's importance is above zero beyond doubt: others are not called important.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        return Cases([], [], dict.fromkeys(("x_hi", "x_lo", "y_hi", "y_lo")), {"static": None, "plastic": None})
    x_hi, x_lo = (float(v) for v in np.percentile(a[both], (hi, lo)))
    y_hi, y_lo = (float(v) for v in np.percentile(b[both], (hi, lo)))
    important = both & (a >= x_hi)
    if above_zero is not None:
        important &= above_zero
    pairs = {"static": (important, both & (b <= y_lo)), "plastic": (both & (b >= y_hi), both & (a <= x_lo))}
    found = {name: [int(i) for i in np.flatnonzero(first & second)] for name, (first, second) in pairs.items()}
    chance = {
        name: common_members(len(found[name]), int(both.sum()), int(first.sum()), int(second.sum()))
        for name, (first, second) in pairs.items()
    }
    thresholds = {"x_hi": x_hi, "x_lo": x_lo, "y_hi": y_hi, "y_lo": y_lo}
    return Cases(found["static"], found["plastic"], thresholds, chance)


def bootstrap_rho(x: ArrayLike, y: ArrayLike, *, draws: int = BOOTSTRAPS, seed: int = 0) -> list[float] | None:
    """95 % percentile interval of rho over seeded resamples of the heads; None below four heads."""
    a, b = finite_pairs(x, y)
    return _interval(_resampled(len(a), draws, seed, lambda chosen: _rhos(a[chosen], b[chosen])))


def bootstrap_rho_difference(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], *, draws: int = BOOTSTRAPS, seed: int = 0
) -> tuple[list[float] | None, list[float] | None]:
    """95 % intervals of rho1 - rho2 and of |rho1| - |rho2| over paired resamples: the same heads for both methods.

    Args:
        first: The two (n,) columns of one method.
        second: Those of the other, head by head.
        draws: Resamples.
        seed: Of the resamples.
    """
    columns = [np.asarray(values, dtype=float) for values in (*first, *second)]
    keep = np.all([np.isfinite(values) for values in columns], axis=0)
    a, b, c, d = (values[keep] for values in columns)

    def both(chosen: NDArray[np.int64]) -> Values:
        one, two = _rhos(a[chosen], b[chosen]), _rhos(c[chosen], d[chosen])
        return np.stack([one - two, np.abs(one) - np.abs(two)])

    found = _resampled(len(a), draws, seed, both)
    return (None, None) if found is None else (_interval(found[0]), _interval(found[1]))


def _resampled(n: int, draws: int, seed: int, statistic: Callable[[NDArray[np.int64]], Values]) -> Values | None:
    """The statistic of resampled heads, piece by piece so that memory stays bounded; None below four heads."""
    if n < 4:
        return None
    random = np.random.default_rng(seed)
    piece = max(1, 2_000_000 // n)
    counts = [min(piece, draws - start) for start in range(0, draws, piece)]
    return np.concatenate([statistic(random.integers(n, size=(count, n))) for count in counts], axis=-1)


def _rhos(x: Values, y: Values) -> Values:
    """Spearman's rho of each row of two (draws, n) arrays; NaN where a row is constant."""
    a, b = rankdata(x, axis=1), rankdata(y, axis=1)
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0)


def _interval(found: Values | None) -> list[float] | None:
    """Central 95 % of what is finite; None without anything."""
    kept = found[np.isfinite(found)] if found is not None else np.empty(0)
    return [float(v) for v in np.quantile(kept, (0.025, 0.975))] if len(kept) else None

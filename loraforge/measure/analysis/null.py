"""What chance alone gives: null band and permutation p of a rank correlation, of overlaps, of counts. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom, rankdata, t

DRAWS = 10_000
# Student's t is off by up to 0.02 below this number of heads; there the band is drawn.
_SMALL = 30
_BAND_DRAWS = 50_000
_PIECE = 2_000_000
# Rank correlations of the same ranks differ by rounding alone.
_ROUNDING = 1e-12


@cache
def rho_band(n: int, level: float = 0.95) -> float | None:
    """Smallest b with P(|rho| > b) <= 1 - level for Spearman's rho of n independent pairs without ties.

    By Student's t with n - 2 degrees of freedom (Kendall and Stuart, vol. 2, 31.19); by seeded draws for up to 30
    pairs. None below three pairs, where every rho is 1 or -1.
    """
    if n < 3:
        return None
    if n > _SMALL:
        bound = float(t.ppf(0.5 + level / 2, n - 2))
        return bound / (n - 2 + bound**2) ** 0.5
    orders = np.random.default_rng(0).random((_BAND_DRAWS, n)).argsort(axis=1)
    away = ((orders - np.arange(n)) ** 2).sum(axis=1)
    return float(np.quantile(np.abs(1 - 6 * away / (n * (n**2 - 1))), level, method="higher"))


def permutation_p(
    x: ArrayLike, y: ArrayLike, *, groups: Sequence[Any] | None = None, draws: int = DRAWS, seed: int = 0
) -> float | None:
    """Two-sided p of Spearman's rho, (1 + #{|rho*| >= |rho|}) / (1 + draws) over seeded permutations of x.

    Args:
        x: (n,) values; pairs with one that is not finite are left out.
        y: (n,) values.
        groups: (n,) labels; given, ranks are taken and values permuted within a group, and the statistic is the mean
            of the groups' rhos. Groups of fewer than two pairs, or constant in either, do not count.
        draws: Permutations.
        seed: Of the permutations.

    Returns:
        None where there is no rho.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(a) & np.isfinite(b)
    labels = np.zeros(len(a), dtype=int) if groups is None else _numbered(groups)
    random = np.random.default_rng(seed)
    null, seen = np.zeros(draws), 0.0
    used = 0
    for label in np.unique(labels[keep]):
        chosen = keep & (labels == label)
        ranks = standard_ranks(a[chosen]), standard_ranks(b[chosen])
        if ranks[0] is None or ranks[1] is None:
            continue
        # Piece by piece, so that memory stays bounded.
        piece = max(1, _PIECE // len(ranks[0]))
        for start in range(0, draws, piece):
            count = min(piece, draws - start)
            shuffled = random.permuted(np.broadcast_to(ranks[0], (count, len(ranks[0]))), axis=1)
            null[start : start + count] += shuffled @ ranks[1]
        seen += float(ranks[0] @ ranks[1])
        used += 1
    if not used:
        return None
    return float((1 + np.count_nonzero(np.abs(null) >= abs(seen) - _ROUNDING * used)) / (1 + draws))


def standard_ranks(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Average ranks (n,), centred and of length one: rho is their product; None if constant or fewer than two."""
    if len(values) < 2:
        return None
    ranks = rankdata(values)
    ranks -= ranks.mean()
    length = np.linalg.norm(ranks)
    return None if length == 0 else ranks / length


@dataclass(frozen=True, slots=True)
class Chance:
    """A number of common members of two sets of heads beside what independent sets would have.

    Attributes:
        observed: Members of both.
        expected: Mean under independence, size times size over n.
        range95: Likeliest values under independence that together have 95 % (hypergeometric).
        ratio: observed / expected; None if nothing is expected.
        p: P(at least `observed`) under independence.
    """

    observed: int
    expected: float
    range95: tuple[int, int]
    ratio: float | None
    p: float

    def to_json(self) -> dict[str, Any]:
        """As in stats.json."""
        return asdict(self) | {"range95": list(self.range95)}


def common_members(observed: int, n: int, first: int, second: int) -> Chance | None:
    """How a number of common members compares with chance: two independent sets of `first` and `second` of n heads.

    None without heads.
    """
    if n < 1:
        return None
    expected = first * second / n
    values = np.arange(max(0, first + second - n), min(first, second) + 1)
    shares = hypergeom.pmf(values, n, first, second)
    likely = np.argsort(-shares, kind="stable")
    # The law has one peak: its likeliest values are neighbours.
    kept = values[likely[: int(np.searchsorted(np.cumsum(shares[likely]), 0.95)) + 1]]
    ratio = observed / expected if expected else None
    p = float(hypergeom.sf(observed - 1, n, first, second))
    return Chance(observed, expected, (int(kept.min()), int(kept.max())), ratio, p)


def _numbered(labels: Sequence[Any]) -> NDArray[np.int64]:
    """(n,) labels as numbers, equal labels equal numbers."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)

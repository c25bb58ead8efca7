"""Rank rules: how many singular directions of a spectrum are kept.

k = rule(S), clamped to [min_rank, max_rank], then to the numerical rank and to min(m, n). Energy is the share of sum
S^2 over the full spectrum, so an energy rule bounds the relative squared Frobenius error exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from loraforge.errors import UsageError


@dataclass(frozen=True, slots=True)
class RankRule:
    """Which rank a module gets. With neither `rank` nor `energy` every numerically present direction is kept.

    Attributes:
        rank: Fixed k.
        energy: Smallest k with sum_{i<=k} S_i^2 >= energy * sum S^2, in (0, 1].
        min_rank: Lower clamp; it never invents directions beyond the numerical rank.
        max_rank: Upper clamp.
    """

    rank: int | None = None
    energy: float | None = None
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UsageError: A field has a wrong value, named with what came and what is allowed.
        """
        for field, optional in (("rank", True), ("min_rank", False), ("max_rank", True)):
            value = getattr(self, field)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError("A rank is not a positive whole number", where=field, got=value, expected="1 or more")
        if self.energy is not None and (isinstance(self.energy, bool) or not 0.0 < self.energy <= 1.0):
            raise UsageError("An energy is out of range", where="energy", got=self.energy, expected="0 < energy <= 1")
        if self.rank is not None and self.energy is not None:
            raise UsageError(
                "A rank rule names both a fixed rank and an energy",
                where="rank, energy",
                got=f"rank={self.rank}, energy={self.energy}",
                expected="one of the two",
                hint="use --energy with --max-rank to bound an energy rule",
            )
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise UsageError(
                "The largest rank is below the smallest",
                where="min_rank, max_rank",
                got=f"min_rank={self.min_rank}, max_rank={self.max_rank}",
                expected="min_rank <= max_rank",
            )

    @property
    def is_lossless(self) -> bool:
        """True where nothing above rounding is cut."""
        return self.rank is None and self.energy is None and self.max_rank is None


def numerical_rank(S: Tensor) -> int:
    """Number of singular values above the rounding of S's dtype.

    Args:
        S: (R,) singular values in descending order. float32 stands for factors that were rounded to float32, so what
            lies under 2 eps of the largest is their rounding; float64 allows R eps for the decomposition itself.

    Returns:
        A number in 0..R, 0 for a spectrum of zeros.
    """
    values = S.tolist()
    # Python floats: a spectrum is short, and a handful of tensor operations costs more than the comparison.
    factor = max(16, len(values)) if S.dtype == torch.float64 else 2
    cut = factor * torch.finfo(S.dtype).eps * values[0] if values else 0.0
    return sum(value > cut for value in values)


def energy_rank(S: Tensor, energy: float) -> int:
    """Smallest k with sum_{i<=k} S_i^2 >= energy * sum S^2.

    Args:
        S: (R,) singular values in descending order.
        energy: Share in (0, 1].

    Returns:
        A number in 0..R; an energy that is met exactly counts as met.
    """
    head = list(accumulate(value * value for value in S.tolist()))
    return next((k for k, kept in enumerate(head, 1) if kept >= energy * head[-1] > 0.0), 0)


def choose(S: Tensor, rule: RankRule, m: int, n: int) -> int:
    """The rank that `rule` gives a module.

    Args:
        S: (R,) singular values in descending order, in the dtype whose rounding they carry.
        rule: The rank rule.
        m: Rows of the delta.
        n: Columns of the delta.

    Returns:
        k >= 1. A zero delta gets max(1, min_rank): its factors are zero and any rank holds them.
    """
    present = numerical_rank(S)
    if present == 0:
        return max(1, min(m, n, rule.min_rank))
    if rule.energy is not None:
        wanted = energy_rank(S, rule.energy)
    else:
        wanted = rule.rank or present
    wanted = max(wanted, rule.min_rank)
    return max(1, min(wanted, rule.max_rank or wanted, present, m, n))

"""Rank rules: how many singular directions of a spectrum are kept.

k = rule(S), clamped to [min_rank, max_rank], then to the numerical rank and to min(m, n). All shares are of the full
spectrum, which is known exactly: energy of sum S^2, so an energy rule bounds the relative squared Frobenius error;
nuclear of sum S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from loraforge.errors import UsageError

# The fields of which a rule names at most one, and how a message calls them.
GOALS = {
    "rank": "a fixed rank",
    "energy": "an energy",
    "nuclear": "a nuclear share",
    "ratio": "a ratio",
    "fro_error": "a Frobenius error",
}


@dataclass(frozen=True, slots=True)
class RankRule:
    """Which rank a module gets. Without any of the five goals every numerically present direction is kept.

    Attributes:
        rank: Fixed k.
        energy: Smallest k with sum_{i<=k} S_i^2 >= energy * sum S^2, in (0, 1].
        min_rank: Lower clamp; it never invents directions beyond the numerical rank.
        max_rank: Upper clamp.
        nuclear: Smallest k with sum_{i<=k} S_i >= nuclear * sum S, in (0, 1].
        ratio: Keeps S_i > S_1 / ratio, above 1.
        fro_error: Smallest k with a relative Frobenius error of at most this, in [0, 1).
    """

    rank: int | None = None
    energy: float | None = None
    min_rank: int = 1
    max_rank: int | None = None
    nuclear: float | None = None
    ratio: float | None = None
    fro_error: float | None = None

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
        if self.energy is not None and (_is_no_number(self.energy) or not 0.0 < self.energy <= 1.0):
            raise UsageError("An energy is out of range", where="energy", got=self.energy, expected="0 < energy <= 1")
        if self.nuclear is not None and (_is_no_number(self.nuclear) or not 0.0 < self.nuclear <= 1.0):
            raise UsageError(
                "A nuclear share is out of range", where="nuclear", got=self.nuclear, expected="0 < nuclear <= 1"
            )
        if self.ratio is not None and (_is_no_number(self.ratio) or not 1.0 < self.ratio < math.inf):
            raise UsageError("A ratio is out of range", where="ratio", got=self.ratio, expected="a number above 1")
        if self.fro_error is not None and (_is_no_number(self.fro_error) or not 0.0 <= self.fro_error < 1.0):
            raise UsageError(
                "A Frobenius error is out of range", where="fro_error", got=self.fro_error, expected="0 <= error < 1"
            )
        self._check_together()

    def _check_together(self) -> None:
        """Refuses two goals, and clamps that exclude each other."""
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if len(goals) > 1:
            many = "both " if len(goals) == 2 else ""
            raise UsageError(
                f"A rank rule names {many}{' and '.join(GOALS[name] for name in goals)}",
                where=", ".join(goals),
                got=", ".join(f"{name}={getattr(self, name)}" for name in goals),
                expected="one of them",
                hint="use --max-rank to bound any other rule",
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
        return self.max_rank is None and all(getattr(self, name) is None for name in GOALS)


def _is_no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


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


def nuclear_rank(S: Tensor, share: float) -> int:
    """Smallest k with sum_{i<=k} S_i >= share * sum S; arguments and result as of `energy_rank`."""
    head = list(accumulate(S.tolist()))
    return next((k for k, kept in enumerate(head, 1) if kept >= share * head[-1] > 0.0), 0)


def error_rank(S: Tensor, tolerance: float) -> int:
    """Smallest k with sqrt(sum_{i>k} S_i^2) <= tolerance * sqrt(sum S^2).

    Args:
        S: (R,) singular values in descending order.
        tolerance: Relative Frobenius error in [0, 1).

    Returns:
        A number in 0..R. The tail is summed from its small end, so tolerances far below sqrt(eps) are met too.
    """
    tails = list(accumulate(value * value for value in reversed(S.tolist())))
    if not tails or tails[-1] <= 0.0:
        return 0
    return len(tails) - sum(tail <= tolerance**2 * tails[-1] for tail in tails)


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
    wanted = max(_wanted(S, rule, present), rule.min_rank)
    return max(1, min(wanted, rule.max_rank or wanted, present, m, n))


def _wanted(S: Tensor, rule: RankRule, present: int) -> int:
    """The rank of the rule's goal, before any clamp."""
    if rule.energy is not None:
        return energy_rank(S, rule.energy)
    if rule.nuclear is not None:
        return nuclear_rank(S, rule.nuclear)
    if rule.ratio is not None:
        values = S.tolist()
        return sum(value * rule.ratio > values[0] for value in values)
    if rule.fro_error is not None:
        return error_rank(S, rule.fro_error)
    return rule.rank or present

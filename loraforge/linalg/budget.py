"""One budget of parameters shared over all modules of an adapter.

A singular direction of an (m, n) module costs m + n parameters and is worth S_i^2 of squared Frobenius norm. All
spectra are known exactly, so the directions of all modules are taken in the order of S_i^2 / (m + n) while they fit.
Within a module that is the order of the spectrum at one price, hence what is taken is always a leading part of it. Up
to the first direction that no longer fits, no other choice of that size keeps more; what is left of the budget then
goes to cheaper modules, so the energy kept is within one direction's of the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError
from loraforge.linalg.rank import RankRule, choose, numerical_rank


def share_budget(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """The rank of every module under one budget.

    Args:
        spectra: module -> (R,) singular values in descending order, in the dtype whose rounding they carry.
        shapes: module -> (m, n).
        budget: Largest sum of k (m + n) over all modules.
        min_rank: Rank that every module gets first, as far as it has directions.
        max_rank: Largest rank of a module.

    Returns:
        module -> k, in the order of `spectra`. Directions of equal worth are taken in that order.

    Raises:
        UsageError: The budget is no positive whole number, or the clamps are wrong.
        LoraforgeError: The budget does not hold the least rank of every module; says what it would take.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError("A budget is not a positive number of parameters", where="budget", got=budget)
    least = RankRule(rank=min_rank, min_rank=min_rank, max_rank=max_rank)
    ranks = {module: choose(S, least, *shapes[module]) for module, S in spectra.items()}
    left = budget - sum(k * sum(shapes[module]) for module, k in ranks.items())
    if left < 0:
        raise LoraforgeError(
            "The budget does not hold the smallest rank of every module",
            where="budget",
            got=f"{budget} parameters",
            expected=f"at least {budget - left} for rank {min_rank} in {len(ranks)} modules",
            hint="raise the budget" + (" or lower --min-rank" if min_rank > 1 else ""),
        )
    offers = []
    for place, (module, S) in enumerate(spectra.items()):
        m, n = shapes[module]
        top = min(numerical_rank(S), m, n, max_rank or min(m, n))
        values = S.tolist()
        offers += [(-values[i] * values[i] / (m + n), place, i, module) for i in range(ranks[module], top)]
    for _, _, _, module in sorted(offers):
        price = sum(shapes[module])
        if price <= left:
            ranks[module] += 1
            left -= price
    return ranks

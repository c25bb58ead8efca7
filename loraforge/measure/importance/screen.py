"""Screening: a gradient for every head, exact ablation for those that it puts first and for some others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from loraforge.errors import UsageError
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.choice import Unit

_FEWEST = 3  # pairs below which a rank correlation says nothing


def chosen_for_exact(
    units: Sequence[Unit], estimate: Mapping[HeadKey, float], top: int, seed: int = 0
) -> tuple[list[Unit], list[Unit]]:
    """The units that are ablated: the first `top` by the size of the estimate, and top / 4 (at least 1) others.

    A head whose removal helps is as much worth a look as one whose removal hurts, so the sign does not count. Ties go
    to the earlier unit.

    Args:
        units: All units.
        estimate: Signed estimates by head.
        top: How many of the first.
        seed: Of the draw of the others.

    Returns:
        Both lists, in the order of `units`.

    Raises:
        UsageError: `top` below 1.
    """
    if top < 1:
        raise UsageError("no head is left for exact ablation", where="--exact-top", got=top, expected="1 or more")
    ranked = sorted(range(len(units)), key=lambda at: (-abs(estimate[units[at].key]), at))
    rest = sorted(ranked[top:])
    drawn = random.Random(seed).sample(rest, min(len(rest), max(1, top // 4))) if rest else []
    return [units[at] for at in sorted(ranked[:top])], [units[at] for at in sorted(drawn)]


def reliability(
    others: Sequence[Unit], estimate: Mapping[HeadKey, float], exact: Mapping[HeadKey, float]
) -> dict[str, Any]:
    """How far the estimates of the drawn units agree with exact ablation.

    Returns:
        `heads`, `spearman` (null for fewer than three heads, or where one side is constant), and
        `largest_error` of an estimate.
    """
    pairs = [(estimate[unit.key], exact[unit.key]) for unit in others]
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    rho = None
    if len(pairs) >= _FEWEST and len(set(first)) > 1 and len(set(second)) > 1:
        rho = float(stats.spearmanr(first, second).statistic)
    error = max((abs(a - b) for a, b in pairs), default=None)
    return {"heads": len(pairs), "spearman": rho, "largest_error": error}

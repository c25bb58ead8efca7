"""Continual training by hand: EMA, reservoirs, consistency loss, total loss and the metrics of a sequence.

numpy float64 and the standard library alone. Written from the definitions; nothing of the library is used.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Matrix = Sequence[Sequence[float | None]]


def new_weight(alpha: float, step: int, convention: str = "weight_of_new", warmup: bool = False) -> float:
    """Share of the new value at optimiser step 1, 2, ...

    `weight_of_new`: alpha itself; `decay`: 1 - alpha. Warm-up bounds the decay by 1 - 1 / (step + 1), so it can only
    raise the share of the new value.
    """
    decay = 1.0 - alpha if convention == "weight_of_new" else alpha
    if warmup:
        decay = min(1.0 - 1.0 / (step + 1), decay)
    return 1.0 - decay


def ema_trajectory(
    start: Array | float,
    values: Sequence[Array | float],
    alpha: float,
    convention: str = "weight_of_new",
    warmup: bool = False,
) -> list[Array]:
    """The EMA after each step: e <- e + a (p_t - e), from `start`, p_t being the trained value after step t."""
    ema = np.asarray(start, dtype=np.float64)
    found = []
    for step, value in enumerate(values, 1):
        ema = ema + new_weight(alpha, step, convention, warmup) * (np.asarray(value, dtype=np.float64) - ema)
        found.append(ema)
    return found


def ema_closed_form(start: Array | float, values: Sequence[Array | float], alpha: float) -> Array:
    """(1 - a)^T e_0 + a sum_t (1 - a)^(T - t) p_t, with a the weight of the new value."""
    T = len(values)
    total = (1.0 - alpha) ** T * np.asarray(start, dtype=np.float64)
    for t, value in enumerate(values, 1):
        total = total + alpha * (1.0 - alpha) ** (T - t) * np.asarray(value, dtype=np.float64)
    return total


@dataclass
class Reservoir:
    """Algorithm R: the n-th item (from 0) fills slot n while n < K, else replaces slot j < K, j uniform in 0..n."""

    capacity: int
    generator: random.Random
    items: list[int] = field(default_factory=list)
    seen: int = 0

    def offer(self, item: int) -> None:
        """Takes one item, or lets it go."""
        if self.seen < self.capacity:
            self.items.append(item)
        else:
            slot = self.generator.randint(0, self.seen)
            if slot < self.capacity:
                self.items[slot] = item
        self.seen += 1


def merge_reservoirs(parts: Sequence[Reservoir], capacity: int, generator: random.Random) -> Reservoir:
    """One reservoir of what several saw: the next item comes from part i with probability ~ what is left of its stream.

    After k draws from part i, seen_i - k items of its stream are left; which of its stored items comes is uniform.
    """
    left = [part.seen for part in parts]
    stored = [list(part.items) for part in parts]
    merged = Reservoir(capacity, generator, seen=sum(left))
    while len(merged.items) < capacity and any(stored):
        weights = [count if items else 0 for count, items in zip(left, stored, strict=True)]
        chosen = generator.choices(range(len(parts)), weights)[0]
        merged.items.append(stored[chosen].pop(generator.randrange(len(stored[chosen]))))
        left[chosen] -= 1
    return merged


def inclusion_frequencies(n: int, capacity: int, trials: int, seed: int = 0) -> Array:
    """(n,) share of trials in which each of n items is in the reservoir at the end; expected min(1, K / n) for all."""
    counts = np.zeros(n)
    generator = random.Random(seed)
    for _ in range(trials):
        kept = Reservoir(capacity, generator)
        for item in range(n):
            kept.offer(item)
        counts[kept.items] += 1.0
    return counts / trials


def consistency_loss(
    plastic: Sequence[Array],
    stable: Sequence[Array],
    mask: Array | None = None,
    rule: str = "elementwise",
    threshold: float = 0.1,
    keep_tokens: Array | None = None,
) -> tuple[float, list[Array]]:
    """Mean over layers, counted tokens and width of the squared distance to the target, and its gradients for P.

    Rules: `elementwise` keeps P where P > S; `margin` where P - S > threshold; `deadband` where S - P <= threshold;
    `token` keeps whole tokens, those of `keep_tokens`; `none` keeps nothing. What is not kept is pulled to S.

    Args:
        plastic: P of each layer, (B, T, H); widths may differ.
        stable: S of each layer.
        mask: (B, T), tokens that count; all of them for None.
        keep_tokens: (B, T), for the rule `token`.
    """
    counted = np.ones(plastic[0].shape[:2]) if mask is None else np.asarray(mask, dtype=np.float64)
    entries = sum(P.shape[2] for P in plastic) * counted.sum()
    total, gradients = 0.0, []
    for P, S in zip(plastic, stable, strict=True):
        gap = np.asarray(P, dtype=np.float64) - np.asarray(S, dtype=np.float64)
        if rule == "elementwise":
            kept = gap > 0.0
        elif rule == "margin":
            kept = gap > threshold
        elif rule == "deadband":
            kept = -gap <= threshold
        elif rule == "token":
            if keep_tokens is None:
                raise ValueError("the rule `token` needs keep_tokens")
            kept = np.broadcast_to(np.asarray(keep_tokens, dtype=bool)[..., None], gap.shape)
        elif rule == "none":
            kept = np.zeros(gap.shape, dtype=bool)
        else:
            raise ValueError(f"no rule {rule!r}")
        residual = np.where(kept, 0.0, gap) * counted[..., None]
        total += float((residual**2).sum())
        gradients.append(2.0 * residual / entries if entries else residual)
    return (total / entries if entries else 0.0), gradients


def total_loss(current: float, replay: float | None, consistency: float, weight: float) -> float:
    """(CE current + CE replay) / 2 + lambda l_cons with a replay, else CE current alone."""
    if replay is None:
        return current
    return (current + replay) / 2.0 + weight * consistency


def cl_metrics(
    matrix: Matrix, base: Sequence[float] | None = None, single: Sequence[float] | None = None
) -> dict[str, float | None]:
    """Metrics of R[k][i], the score on task i after task k; None where one is not defined.

    Keys: acc, avg, bwt, fwt (needs `base`), forgetting, learning, intransigence (needs `single`).

    Raises:
        ValueError: A score with i <= k is missing.
    """
    n = len(matrix)
    R = np.array([[np.nan if matrix[k][i] is None else matrix[k][i] for i in range(n)] for k in range(n)], dtype=float)
    for k in range(n):
        for i in range(k + 1):
            if np.isnan(R[k, i]):
                raise ValueError(f"no score of task {i} after task {k}")
    last, own = R[-1], np.diag(R)
    fwt = bwt = forgetting = None
    if n > 1:
        bwt = float(np.mean(last[:-1] - own[:-1]))
        forgetting = float(np.mean([R[i:-1, i].max() - last[i] for i in range(n - 1)]))
        ahead = np.diag(R, 1)
        if base is not None and not np.isnan(ahead).any():
            fwt = float(np.mean(ahead - np.asarray(base)[1:]))
    return {
        "acc": float(last.mean()),
        "avg": float(np.mean([R[k, : k + 1].mean() for k in range(n)])),
        "bwt": bwt,
        "fwt": fwt,
        "forgetting": forgetting,
        "learning": float(own.mean()),
        "intransigence": None if single is None else float(np.mean(np.asarray(single) - own)),
    }

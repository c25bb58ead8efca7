"""Layers, dense arithmetic and shared invariants for tests of the spectral methods. numpy float64, no package code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from loraforge.types import Dense, LayerInputs, LowRank, Merged
from tests.oracles.factored import relative

Merge = Callable[[LayerInputs, Any], Merged]
# (m, n, ranks): wide, tall, many, more directions than rows, one adapter, ranks 1 to 64.
SHAPES = [
    (24, 17, (3, 2, 4)),
    (16, 30, (4, 4)),
    (20, 20, (2,) * 6),
    (12, 9, (5, 6, 4)),
    (15, 11, (4,)),
    (90, 80, (1, 64, 8)),
]


def layer(
    m: int = 24, n: int = 17, ranks: Sequence[int] = (3, 2, 4), *, seed: int = 0, dtype: torch.dtype = torch.float64,
    weights: Sequence[float] | None = None, shared: int = 1,
) -> LayerInputs:  # fmt: skip
    """Adapters of `ranks` that have `shared` directions of both sides nearly in common."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    common_B, common_A = draw(m, shared), draw(shared, n)
    factors: list[LowRank | Dense | None] = []
    for i, r in enumerate(ranks):
        B, A = draw(m, r), draw(r, n)
        s = min(shared, r)
        B[:, :s] = common_B[:, :s] + 0.3 * B[:, :s]
        A[:s] = common_A[:s] + 0.3 * A[:s]
        factors.append(LowRank(B.to(dtype), A.to(dtype), 0.5 + i / 2))
    return LayerInputs("module", factors, list(weights or [1.0] * len(ranks)), stats=[None] * len(ranks))


def deltas(inputs: LayerInputs) -> list[np.ndarray]:
    """w_i s_i B_i A_i of the adapters that have the module."""
    return [w * f.delta(torch.float64).numpy() for w, f in inputs.present]


def dense(inputs: LayerInputs) -> LayerInputs:
    """The same deltas as task vectors of full checkpoints."""
    return changed(inputs, lambda f: Dense(f.delta()))


def changed(inputs: LayerInputs, change: Callable[[Any], Any]) -> LayerInputs:
    factors = [None if f is None else change(f) for f in inputs.factors]
    return LayerInputs(inputs.module, factors, inputs.weights, inputs.keys, inputs.stats)


def result(merge: Merge, inputs: LayerInputs, params: Any) -> np.ndarray:
    return merge(inputs, params).delta(torch.float64).numpy()


def thin(W: np.ndarray, k: int | None = None, null: float = 1e-10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first k singular triplets (U, s, V^T) above rounding."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    k = min(len(s) if k is None else k, int((s > null * max(s[0], 1e-300)).sum()))
    return U[:, :k], s[:k], Vh[:k]


def polar(X: np.ndarray) -> np.ndarray:
    P, s, Qh = np.linalg.svd(X, full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum()) if len(s) else 0
    return P[:, :k] @ Qh[:k]


def orthogonal(size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q


def nudged(inputs: LayerInputs, size: float = 1e-13) -> LayerInputs:
    """Every factor moved by `size` of its norm."""
    g = torch.Generator().manual_seed(77)

    def move(X: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(X.shape, generator=g, dtype=X.dtype)
        return X + size * X.norm() / noise.norm() * noise

    def moved(f: LowRank | Dense) -> LowRank | Dense:
        return Dense(move(f.weight), f.scaling) if isinstance(f, Dense) else LowRank(move(f.B), move(f.A), f.scaling)

    return changed(inputs, moved)


def check_invariants(merge: Merge, params: Any, inputs: LayerInputs, tolerance: float = 1e-10) -> None:
    """Order, rotation of both sides, scale, gauge, adapters of zeros, gaps, rank bound, tiny changes, checkpoints."""
    before = result(merge, inputs, params)
    m, n = before.shape
    order = list(reversed(range(len(inputs.factors))))
    turned = LayerInputs("m", [inputs.factors[i] for i in order], [inputs.weights[i] for i in order])
    assert relative(result(merge, turned, params), before) < tolerance
    P, Q = orthogonal(m, 1), orthogonal(n, 2)
    rotated = changed(inputs, lambda f: LowRank(P @ f.B, f.A @ Q, f.scaling))
    assert relative(result(merge, rotated, params), P.numpy() @ before @ Q.numpy()) < tolerance
    scaled = changed(inputs, lambda f: LowRank(f.B * 4.0, f.A, f.scaling))
    assert relative(result(merge, scaled, params), 4.0 * before) < tolerance
    gauge = iter((3.0, -0.2, 7.0, 0.5, 11.0, -1.3))
    moved = changed(inputs, lambda f: LowRank(f.B * (c := next(gauge)), f.A / c, f.scaling))
    assert relative(result(merge, moved, params), before) < tolerance
    assert relative(result(merge, nudged(inputs), params), before) < 1e-9
    none = LowRank(torch.zeros(m, 2, dtype=torch.float64), inputs.present[0][1].A[:1].repeat(2, 1), 1.0)
    for extra in (None, none):
        more = LayerInputs("m", [*inputs.factors, extra], [*inputs.weights, 1.0])
        assert relative(result(merge, more, params), before) < tolerance
    found = merge(inputs, params)
    assert isinstance(found, LowRank) and found.scaling == 1.0
    assert found.rank <= sum(f.rank for _, f in inputs.present)
    assert found.B.dtype == found.A.dtype == torch.float64


def check_zeros(merge: Merge, params: Any, *, checkpoints: bool = True) -> None:
    """A module of zeros gives zeros, of adapters and of checkpoints."""
    zero = LowRank(torch.zeros(6, 2), torch.ones(2, 5))
    found = merge(LayerInputs("m", [zero, zero], [1.0, 1.0], stats=[None, None]), params)
    assert found.shape == (6, 5) and not found.delta().any()
    if checkpoints:
        found = merge(LayerInputs("m", [Dense(torch.zeros(6, 5))] * 2, [1.0, 1.0], stats=[None, None]), params)
        assert isinstance(found, Dense) and not found.delta().any()

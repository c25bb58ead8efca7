"""Layers and dense float64 arithmetic for tests of the element-wise methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.linalg import elements
from loraforge.types import Dense, LayerInputs, LowRank, Merged

Array = np.ndarray
WEIGHTS = (1.0, -0.5, 0.25)
# Float32 entries are rounded once, summed and rounded again; float64 ones leave the rounding of the products.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def layer(
    ranks: Sequence[int] = (4, 2, 7),
    weights: Sequence[float] = WEIGHTS,
    dtype: torch.dtype = torch.float64,
    m: int = 23,
    n: int = 17,
    gap: int | None = None,
    name: str = "m",
    seed: int = 5,
) -> LayerInputs:
    """One adapter a rank, scalings and keys of their own; `gap` makes that adapter lack the module."""
    g = torch.Generator().manual_seed(seed)
    factors: list[LowRank | None] = []
    for i, r in enumerate(ranks):
        B = torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype)
        A = torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype)
        factors.append(None if i == gap else LowRank(B, A, (i + 1) * 2 / r))
    return LayerInputs(name, factors, weights, [f"key{i}" for i in range(len(ranks))])


def as_dense(inputs: LayerInputs, dtype: torch.dtype = torch.float64) -> LayerInputs:
    """The same deltas as task vectors of checkpoints."""
    whole = [None if f is None else Dense(f.delta(torch.float64).to(dtype) / 4, 4.0) for f in inputs.factors]
    return LayerInputs(inputs.module, whole, inputs.weights, inputs.keys, context=inputs.context)


def with_zero(inputs: LayerInputs) -> LayerInputs:
    """Zeros where an adapter lacks the module."""
    m, n = inputs.shape
    dtype = next(f.A.dtype for f in inputs.factors if f is not None)
    zero = LowRank(torch.zeros(m, 3, dtype=dtype), torch.ones(3, n, dtype=dtype), 2.0)
    factors = [zero if f is None else f for f in inputs.factors]
    return LayerInputs(inputs.module, factors, inputs.weights, inputs.keys, context=inputs.context)


def dense(inputs: LayerInputs) -> list[Array]:
    """D_i = s_i B_i A_i, weights not in them; zeros where an adapter lacks the module."""
    shape = inputs.shape
    return [
        np.zeros(shape) if f is None else f.scaling * (f.B.double().numpy() @ f.A.double().numpy())
        for f in inputs.factors
    ]


def kept(D: Array, density: float) -> Array:
    """The floor(density n) largest entries and those equal to the last of them; the others 0."""
    k = math.floor(density * D.size)
    if k == 0:
        return np.zeros_like(D)
    return np.where(np.abs(D) >= np.sort(np.abs(D), axis=None)[-k], D, 0.0)


def kept_over(all_deltas: Sequence[Array], density: float) -> list[Array]:
    """`kept` over several modules together."""
    flat = kept(np.concatenate([D.ravel() for D in all_deltas]), density)
    ends = np.cumsum([D.size for D in all_deltas])[:-1]
    return [part.reshape(D.shape) for part, D in zip(np.split(flat, ends), all_deltas, strict=True)]


def elect(parts: Sequence[Array]) -> Array:
    """Sign of the sum, then the mean of the parts with that sign."""
    X = np.stack(list(parts))
    agrees = (np.sign(X) == np.sign(X.sum(axis=0))) & (X != 0)
    return (X * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def weigh(parts: Sequence[Array], inputs: LayerInputs) -> list[Array]:
    return [w * X for w, X in zip(inputs.weights, parts, strict=True)]


def array(update: Merged) -> Array:
    return update.delta(torch.float64).numpy()


def away(update: Merged, want: Array) -> float:
    """Relative Frobenius distance."""
    return float(np.linalg.norm(array(update) - want) / np.linalg.norm(want))


def check_rows(merge: Callable[[LayerInputs], Merged], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have the same bits however they are asked for and whatever the size of a tile; bounds; bad input."""
    inputs = layer(dtype=torch.float32, m=37)
    update = merge(inputs)
    whole = update.delta()
    assert update.shape == (37, 17) and whole.dtype == torch.float32 and update.rank_bound == 13
    assert merge(layer(gap=1)).rank_bound == merge(with_zero(layer(gap=1))).rank_bound == 11
    for entries in (1, 17 * 4, 17 * 8 + 3, 10**6):
        monkeypatch.setattr(elements, "TILE_ENTRIES", entries)
        again = merge(inputs)
        assert torch.equal(again.rows(0, 37), whole)
        for start, stop in ((0, 1), (3, 20), (36, 37), (5, 5)):
            assert torch.equal(again.rows(start, stop), whole[start:stop])
    monkeypatch.undo()
    bad = layer()
    bad.factors[1].A[0, 0] = float("nan")
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        merge(bad)
    crooked = [*layer((2,), (1.0,)).factors, *layer((2,), (1.0,), m=9).factors]
    with pytest.raises(LoraforgeError, match="do not fit together"):
        merge(LayerInputs("m", crooked, [1.0, 1.0], ["a", "b"]))


def check_checkpoints(merge: Callable[[LayerInputs], Merged]) -> None:
    """Task vectors give what adapters of the same delta do, also as one row of a vector."""
    inputs = layer()
    assert away(merge(as_dense(inputs)), array(merge(inputs))) < 1e-12
    vector = layer((1, 1, 1), m=1, n=301)
    update = merge(as_dense(vector, torch.float32))
    assert update.shape == (1, 301) and update.delta().dtype == torch.float32
    assert away(update, array(merge(vector))) < 2e-6

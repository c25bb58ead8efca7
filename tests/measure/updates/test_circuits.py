"""The change of a head's circuits against d x d products in numpy, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.measure.heads.layout import Attention, Projection
from loraforge.measure.updates.circuits import circuit_changes, relative_change
from loraforge.types import LowRank

D, K, R = 12, 3, 2


def draws(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_hand(L: torch.Tensor, dL: torch.Tensor, right: torch.Tensor, dR: torch.Tensor) -> float:
    old, new = (L @ right).numpy(), ((L + dL) @ (right + dR)).numpy()
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))


@pytest.mark.parametrize("kind", ["factors", "dense", "mixed", "left", "right"])
def test_equals_the_product_of_whole_matrices(kind: str) -> None:
    L, right, B1, A1, B2, A2 = draws((D, K), (K, D), (D, R), (R, K), (K, R), (R, D))
    left, other = LowRank(B1, A1, 0.5), LowRank(B2, A2, 2.0)
    ways = {
        "factors": (left, other), "dense": (left.delta(), other.delta()), "mixed": (left, other.delta()),
        "left": (left, None), "right": (None, other),
    }[kind]  # fmt: skip
    dL, dR = (torch.zeros_like(w) if c is None else c.delta() if isinstance(c, LowRank) else c
              for c, w in zip(ways, (L, right), strict=True))  # fmt: skip
    found = relative_change(L, ways[0], right, ways[1])
    assert found == pytest.approx(by_hand(L, dL, right, dR), rel=1e-12)


def test_zero_circuit_and_zero_update() -> None:
    L, right = draws((D, K), (K, D))
    assert relative_change(L, None, right, None) == 0.0
    assert relative_change(torch.zeros_like(L), LowRank(*draws((D, R), (R, K))), right, None) is None


def test_a_tiny_change_keeps_its_digits() -> None:
    """Without forming W' - W: a change of 1e-12 is right to 1e-10 of itself."""
    L, right, B, A = draws((D, K), (K, D), (D, R), (R, K))
    found = relative_change(L, LowRank(B, A, 1e-12), right, None)
    exact = float((B @ A @ right).norm() / (L @ right).norm()) * 1e-12
    assert found == pytest.approx(exact, rel=1e-10)


def attention(n_kv: int) -> Attention:
    return Attention("dec", "self", 0, 4, n_kv, q=Projection("q", 4, K), k=Projection("k", n_kv, K),
                     v=Projection("v", n_kv, K), o=Projection("o", 4, K))  # fmt: skip


def test_rescaling_value_against_output_changes_nothing() -> None:
    """W_v c, W_o / c (and W_q, W_k) are the same head: so is an update scaled along; norms of the parts differ."""
    place = attention(4)
    shapes = {"q": (12, D), "k": (12, D), "v": (12, D), "o": (D, 12)}
    weights = dict(zip(shapes, draws(*shapes.values()), strict=True))
    updates = {n: LowRank(*draws((m, R), (R, k), seed=i + 1)) for i, (n, (m, k)) in enumerate(shapes.items())}
    scales = {"q": 8.0, "k": 1 / 8, "v": 50.0, "o": 1 / 50}
    scaled = {n: w * scales[n] for n, w in weights.items()}
    moved = {n: LowRank(u.B, u.A, scales[n]) for n, u in updates.items()}
    one, two = circuit_changes(place, weights, updates), circuit_changes(place, scaled, moved)
    for name in ("OV", "QK"):
        assert one[name] == pytest.approx(two[name], rel=1e-12)
        assert all(value > 0 for value in one[name])


def test_query_heads_of_a_group_read_the_same_key_and_value() -> None:
    place = attention(2)
    weights = dict(zip("qkvo", draws((12, D), (6, D), (6, D), (D, 12)), strict=True))
    update = torch.zeros(6, D, dtype=torch.float64)
    update[3:] = 1.0
    found = circuit_changes(place, weights, {"v": update})
    assert found["OV"][:2] == [0.0, 0.0] and min(found["OV"][2:]) > 0.0 and found["QK"] == [0.0] * 4


def test_latent_attention_has_no_such_circuit() -> None:
    place = Attention("dec", "self", 0, 2, 2, o=Projection("o", 2, K))
    assert circuit_changes(place, {"o": torch.ones(D, 6)}, {}) == {"OV": [None, None], "QK": [None, None]}

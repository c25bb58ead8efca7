"""Intruder dimensions, alignment and amplification: what is known of simple updates, and both ways of decomposing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.measure.updates import intruders
from loraforge.measure.updates.intruders import (
    alignment,
    amplification,
    base_vectors,
    intruder_dimensions,
    leading_vectors,
)
from loraforge.types import LowRank


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts(weight: torch.Tensor, change: torch.Tensor | LowRank, eps: float = 0.5) -> list[int]:
    found = intruder_dimensions(weight, change, epsilons=(eps,))["n_intruder"]
    return [found[k][f"{eps:g}"] for k in ("k1", "k10", "k20")]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)], ids=["tall", "wide", "square"])
def test_no_update_and_a_multiple_bring_none(shape: tuple[int, int]) -> None:
    W = draw(*shape)
    for change in (torch.zeros_like(W), 0.3 * W):
        found = intruder_dimensions(W, change)
        assert all(value == 0 for row in found["n_intruder"].values() for value in row.values())
        assert min(found["cos_top"]) > 1 - 1e-9


def test_a_strong_random_line_is_one() -> None:
    W = draw(60, 50)
    u, v = draw(60, 1, seed=1), draw(50, 1, seed=2)
    line = LowRank(u / u.norm(), (v / v.norm()).mT, 10 * float(torch.linalg.matrix_norm(W, 2)))
    assert counts(W, line) == [1, 1, 1]
    assert counts(W, line.delta()) == [1, 1, 1]


def test_turning_the_left_vectors_makes_all_of_them_intruders_by_a_strict_threshold() -> None:
    W = draw(30, 30)
    turn = torch.linalg.qr(draw(30, 30, seed=3)).Q
    assert counts(W, turn @ W - W, eps=0.9) == [1, 10, 20]


def test_equal_singular_values_hide_no_vector_from_the_subspace() -> None:
    """Any vector of a plane of equal values is W0's own: single cosines may say 0.7, the subspace says 1."""
    S = torch.ones(8, dtype=torch.float64)
    S[2:] = 0.1
    U, V = torch.linalg.qr(draw(8, 8)).Q, torch.linalg.qr(draw(8, 8, seed=1)).Q
    W = U @ torch.diag(S) @ V.mT
    mixed = (U[:, :1] + U[:, 1:2]) / math.sqrt(2)
    along = (V[:, :1] + V[:, 1:2]) / math.sqrt(2)
    found = intruder_dimensions(W, mixed @ along.mT)
    assert found["cos_top_subspace"][0] == pytest.approx(1.0, abs=1e-9)


def test_leading_vectors_of_a_large_matrix() -> None:
    """ARPACK against LAPACK: the same triples up to sign, and the same bits again."""
    M = draw(300, 280) + 40 * draw(300, 3, seed=1) @ draw(3, 280, seed=2) / 280
    U, S, V = leading_vectors(M, 20)
    exact, values, right = np.linalg.svd(M.numpy(), full_matrices=False)
    assert S.tolist() == pytest.approx(values[:20].tolist(), rel=1e-10)
    # Neighbouring values of a random matrix are 1e-3 apart, which bounds what rounding can turn.
    assert np.abs((U.numpy() * exact[:, :20]).sum(0)).tolist() == pytest.approx([1.0] * 20, abs=1e-8)
    assert np.abs((V.numpy() * right[:20].T).sum(0)).tolist() == pytest.approx([1.0] * 20, abs=1e-8)
    assert torch.equal(U, leading_vectors(M, 20)[0])


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)], ids=["tall", "wide"])
def test_vectors_of_a_large_weight(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    W, change = draw(*shape), LowRank(draw(shape[0], 2, seed=1), draw(2, shape[1], seed=2), 0.5)
    small = base_vectors(W, 5)
    expected = intruder_dimensions(W, change, vectors=small)
    monkeypatch.setattr(intruders, "_LARGE", 8)
    large = base_vectors(W, 5)
    assert large.S.tolist() == pytest.approx(small.S.tolist(), rel=1e-9) and large.U.shape == small.U.shape
    found = intruder_dimensions(W, change, vectors=large)
    assert found["cos_top"] == pytest.approx(expected["cos_top"], abs=1e-8)
    assert found["n_intruder"] == expected["n_intruder"]
    assert alignment(change, large, 5) == pytest.approx(alignment(change, small, 5), rel=1e-9)


def test_alignment_of_known_updates() -> None:
    W = draw(20, 30)
    vectors = base_vectors(W, 5)
    inside = vectors.U[:, :5] @ draw(5, 5, seed=1) @ vectors.V[:, :5].mT
    assert alignment(inside, vectors, 5)["alignment"] == pytest.approx(1.0)
    outside = vectors.U[:, 5:] @ draw(15, 30, seed=2)
    assert alignment(outside, vectors, 5)["alignment"] == pytest.approx(0.0, abs=1e-12)
    assert alignment(torch.zeros(20, 30), vectors, 5)["alignment"] is None


def test_alignment_with_random_subspaces_is_what_is_said() -> None:
    m, n, k = 12, 20, 4
    change = LowRank(draw(m, 2, seed=1), draw(2, n, seed=2))
    squares = []
    for seed in range(2000):
        U, V = (torch.linalg.qr(draw(size, k, seed=10 + 2 * seed + i)).Q for i, size in enumerate((m, n)))
        squares.append(float((U.mT @ change.delta() @ V).norm() / change.delta().norm()) ** 2)
    said = alignment(change, base_vectors(draw(m, n), k), k)["alignment_random"]
    # 2000 draws: the mean's standard error is 2 % of it.
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(said, rel=0.05)


def test_amplification_by_hand() -> None:
    W = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    e = torch.eye(3, dtype=torch.float64)
    along = LowRank(e[:, 1:2], e[1:2], 10.0)
    assert amplification(W, along, 1) == pytest.approx(5.0)
    assert amplification(W, along.delta(), 1) == pytest.approx(5.0)
    # A second column of zeros is no direction.
    wide = LowRank(torch.cat([e[:, 1:2], 0 * e[:, :1]], 1), e[1:3], 10.0)
    assert amplification(W, wide, 2) == pytest.approx(5.0)
    assert amplification(W, LowRank(0 * e[:, :1], e[:1]), 1) is None
    assert amplification(W, LowRank(e[:, :1], e[1:2]), 1) is None  # W0 is zero between these directions

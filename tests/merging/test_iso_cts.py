from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.factored import truncate
from loraforge.linalg.flatten import flatten_update
from loraforge.linalg.rank import RankRule
from loraforge.merging.iso_cts import merge_layer, split_dimensions
from loraforge.merging.spectral_params import IsoCtsParams
from loraforge.types import Dense, LayerInputs, LowRank, Merged
from tests.oracles.factored import relative

from .spectra import SHAPES, check_invariants, check_zeros, deltas, dense, layer, nudged, polar, result, thin


def iso_cts(inputs: LayerInputs, params: IsoCtsParams) -> Merged:
    """The method and what the runner does after it, without a rank rule."""
    update = merge_layer(inputs, params)
    if isinstance(update, Dense):
        return flatten_update(update, None, params)[0]
    cut = truncate(update, RankRule())
    return flatten_update(cut.factors, cut.spectrum, params)[0]


def oracle(parts: list[np.ndarray], q: int, fraction: float) -> np.ndarray:
    """1.2 of the specification on dense matrices, with tasks that have less than t directions clamped; unflattened."""
    N = len(parts)
    t = min(round((q - int(q * fraction)) / N), q // N)
    own = [min(t, len(thin(D)[1])) for D in parts]
    Uc, sc, Vc = thin(sum(parts), q - sum(own))
    U, s, V = [], [], []
    for D, count in zip(parts, own, strict=True):
        found = np.linalg.svd(D - Uc @ (Uc.T @ D), full_matrices=False)
        count = min(count, int((found[1] > 1e-10 * np.linalg.norm(D, 2)).sum()))
        U, s, V = [*U, found[0][:, :count]], [*s, found[1][:count]], [*V, found[2][:count]]
    left, right = polar(np.hstack([*U, Uc])), polar(np.vstack([*V, Vc]))
    return left @ np.diag(np.concatenate([*s, sc])) @ right


def rank_of_stack(inputs: LayerInputs) -> int:
    return min(
        np.linalg.matrix_rank(np.hstack([f.B.numpy() for _, f in inputs.present])),
        np.linalg.matrix_rank(np.vstack([f.A.numpy() for _, f in inputs.present])),
    )


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_against_dense_arithmetic(m: int, n: int, ranks: tuple[int, ...], fraction: float) -> None:
    inputs = layer(m, n, ranks, weights=[(-0.5) ** i for i in range(len(ranks))])
    params = IsoCtsParams(common_fraction=fraction)
    want = oracle(deltas(inputs), rank_of_stack(inputs), fraction)
    assert relative(result(merge_layer, inputs, params), want) < 1e-10
    want = oracle(deltas(inputs), min(m, n), fraction)  # checkpoints: q = min(m, n)
    assert relative(result(merge_layer, dense(inputs), params), want) < 1e-10


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_full_rank_checkpoints_as_published(fraction: float) -> None:
    g = np.random.default_rng(4)
    parts = [g.standard_normal((14, 20)) for _ in range(3)]
    inputs = LayerInputs("m", [Dense(torch.tensor(D)) for D in parts], [1.0] * 3)
    q = 14
    k = q - round((q - int(q * fraction)) / 3) * 3
    t = (q - k) // 3
    Uc, sc, Vc = (X for X in np.linalg.svd(sum(parts), full_matrices=False))
    Uc, sc, Vc = Uc[:, :k], sc[:k], Vc[:k]
    own = [np.linalg.svd(D - Uc @ Uc.T @ D, full_matrices=False) for D in parts]
    left, right = np.hstack([*(o[0][:, :t] for o in own), Uc]), np.vstack([*(o[2][:t] for o in own), Vc])
    mean = np.concatenate([*(o[1][:t] for o in own), sc]).mean()
    want = mean * polar(left) @ polar(right)
    assert relative(result(iso_cts, inputs, IsoCtsParams(common_fraction=fraction)), want) < 1e-10


def test_by_hand() -> None:
    """Two tasks of one direction each, e1 (3) and e2 (1), f = 0: one direction a task, no common one, both become 2."""
    one = LowRank(torch.tensor([[3.0], [0.0], [0.0]]).double(), torch.eye(3)[:1].double())
    two = LowRank(torch.eye(3)[:, 1:2].double(), torch.eye(3)[1:2].double())
    inputs = LayerInputs("m", [one, two], [1.0, 1.0])
    want = np.diag([2.0, 2.0, 0.0])
    assert np.allclose(result(iso_cts, inputs, IsoCtsParams(common_fraction=0.0)), want, atol=1e-14)
    # f = 1/2 leaves (2 - 1) / 2 = 0.5 directions a task, rounded to 0: the sum, flattened.
    assert np.allclose(result(iso_cts, inputs, IsoCtsParams(common_fraction=0.5)), want, atol=1e-14)


@pytest.mark.parametrize(
    ("q", "tasks", "fraction", "want"),
    [
        (64, 8, 0.8, (48, 2)),  # 13 left: 1.625 a task -> 2
        (768, 8, 0.8, (616, 19)),  # 154 left: 19.25 -> 19
        (10, 4, 0.8, (10, 0)),  # 2 left: 0.5 -> 0, halves to even
        (10, 4, 0.4, (2, 2)),  # 6 left: 1.5 -> 2
        (2, 3, 0.0, (2, 0)),  # 0.67 -> 1 would need 3 of 2
        (9, 3, 1.0, (9, 0)),
    ],
)
def test_share_of_the_directions(q: int, tasks: int, fraction: float, want: tuple[int, int]) -> None:
    assert split_dimensions(q, tasks, fraction) == want


def test_without_task_directions_it_is_the_sum() -> None:
    inputs = layer()
    found = result(merge_layer, inputs, IsoCtsParams(common_fraction=1.0))
    assert relative(found, sum(deltas(inputs))) < 1e-12
    one = layer(ranks=(5,))
    for fraction in (0.8, 1.0):
        assert relative(result(merge_layer, one, IsoCtsParams(common_fraction=fraction)), deltas(one)[0]) < 1e-12


@pytest.mark.parametrize("ranks", [(3, 2, 4), (4, 4, 4, 4, 4), (1, 8), (5,)])
@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_invariants(ranks: tuple[int, ...], fraction: float) -> None:
    params = IsoCtsParams(common_fraction=fraction)
    check_invariants(iso_cts, params, layer(ranks=ranks))
    check_zeros(iso_cts, params)


def test_a_task_inside_the_common_subspace_brings_no_null_vectors() -> None:
    """The third adapter is a multiple of the first; E_i of what the common subspace holds is rounding."""
    inputs = layer(30, 20, (4, 4), shared=0)
    copy = LowRank(inputs.factors[0].B, inputs.factors[0].A, 3.0)
    more = LayerInputs("m", [*inputs.factors, copy], [1.0, 1.0, 1.0])
    params = IsoCtsParams(common_fraction=0.6)
    found = merge_layer(more, params)
    assert relative(found.delta(), oracle(deltas(more), 8, 0.6)) < 1e-10
    U = thin(sum(deltas(inputs)))[0]
    outside = found.delta().numpy() - U @ U.T @ found.delta().numpy()
    assert np.linalg.norm(outside) < 1e-10 * np.linalg.norm(found.delta())


def test_near_copies_are_copies() -> None:
    """Two adapters that agree to 13 digits bring one set of directions, not one and its rounding."""
    inputs = layer(30, 20, (4, 4), shared=0)
    twice = LayerInputs("m", [*inputs.factors, inputs.factors[0]], [1.0, 1.0, 1.0])
    for fraction in (0.5, 0.8):
        params = IsoCtsParams(common_fraction=fraction)
        found = result(iso_cts, twice, params)
        assert np.linalg.matrix_rank(found, tol=1e-8) <= 8
        assert relative(result(iso_cts, nudged(twice), params), found) < 1e-9


def test_the_published_rule_moves_with_the_rounding_and_this_one_does_not() -> None:
    inputs = layer(48, 40, (2,) * 4)
    before, after = deltas(inputs), deltas(nudged(inputs))

    def literal(parts: list[np.ndarray]) -> np.ndarray:
        q, f = 40, 0.8
        k = q - round((q - int(q * f)) / 4) * 4
        U, s, Vh = np.linalg.svd(sum(parts), full_matrices=False)
        own = [np.linalg.svd(D - U[:, :k] @ U[:, :k].T @ D, full_matrices=False) for D in parts]
        t = (q - k) // 4
        left, right = np.hstack([*(o[0][:, :t] for o in own), U[:, :k]]), np.vstack([*(o[2][:t] for o in own), Vh[:k]])
        P, _, Q = np.linalg.svd(left, full_matrices=False)
        X, _, Y = np.linalg.svd(right, full_matrices=False)
        return np.concatenate([*(o[1][:t] for o in own), s[:k]]).mean() * (P @ Q) @ (X @ Y)

    assert relative(literal(after), literal(before)) > 0.1
    ours = [result(iso_cts, x, IsoCtsParams()) for x in (inputs, nudged(inputs))]
    assert relative(ours[1], ours[0]) < 1e-9

"""The sums that a calibrated method solves with, against dense numpy; and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loraforge.calibrate.statistics import Sums, collect_stats, layer_basis
from loraforge.calibrate.weights import Collecting, Layer, Rows, Weighting
from loraforge.errors import LoraforgeError
from loraforge.types import LayerStats, LowRank
from tests.oracles import iteris as oracle

M, D, RANKS, TOKENS = 6, 5, (2, 1, 2), (14, 9, 11)
C = (1.0, 0.5, 2.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = [draw(i, t, D) for i, t in enumerate(TOKENS)]
XM = [x + 0.3 * draw(10 + i, *x.shape) for i, x in enumerate(X)]
FACTORS = [LowRank(draw(20 + i, M, r), draw(30 + i, r, D)) for i, r in enumerate(RANKS)]
W0 = draw(40, M, D)


def how(**changes: Any) -> Collecting:
    known: dict[str, Any] = {
        "coefficients": C, "folds": 2, "lambda_weight": "none", "rho": None, "full_weight": False,
        "target_merged": False, "exact_cross_norm": True, "offdiag": 1.0, "weighting": None,
    }  # fmt: skip
    return Collecting(**{**known, **changes})


def parts(fold: int, task: int, folds: int = 2) -> tuple[Tensor, Tensor]:
    return X[task][fold::folds], XM[task][fold::folds]


def rows(alone: bool = False) -> list[Rows]:
    """Three rows of a (task, fold) at a time, tasks and folds in turn."""
    found = []
    for task, factors in enumerate(FACTORS):
        W = W0 + factors.delta()
        for fold in range(2):
            for x, xm in zip(*(p.split(3) for p in parts(fold, task)), strict=True):
                found.append(Rows(task, fold, x, x if alone else xm, float((x @ W.mT).square().sum())))
    return found


def collect(factors: Any = None, shared: Any = None, given: Any = None, **changes: Any) -> LayerStats:
    layer = Layer("layers.1.q", FACTORS if factors is None else factors, W0)
    return collect_stats(layer, rows() if given is None else given, how(**changes), shared)


def close(found: Tensor | None, want: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


def summed(fold: int, term: Any) -> Tensor:
    """sum_i c_i term(X_i, X~_i, delta_i) over one fold."""
    return sum(C[i] * term(*parts(fold, i), FACTORS[i].delta()) for i in range(3))  # type: ignore[return-value]


def test_every_sum_of_every_fold() -> None:
    stats = collect()
    assert stats.basis is not None and stats.base_weight is None and stats.weighting is None
    for fold, sums in enumerate(stats.folds):
        close(sums.gram, summed(fold, lambda x, xm, d: xm.mT @ xm))
        close(sums.cross, summed(fold, lambda x, xm, d: x.mT @ xm))
        close(sums.prior, summed(fold, lambda x, xm, d: x.mT @ x))
        close(stats.basis @ sums.target, summed(fold, lambda x, xm, d: d @ x.mT @ xm))
        assert sums.target_prior is not None
        close(stats.basis @ sums.target_prior, summed(fold, lambda x, xm, d: d @ x.mT @ x))
        assert sums.share == pytest.approx(sum(len(parts(fold, i)[0]) for i in range(3)) / sum(TOKENS))
    assert (stats.tokens, stats.lambdas, stats.coefficients) == (list(TOKENS), [1.0] * 3, list(C))
    assert stats.rank == sum(RANKS)


def test_what_is_not_needed_is_not_there() -> None:
    fixed = collect(rho=0.0).folds[0]
    assert (fixed.cross, fixed.prior, fixed.target_prior) == (None, None, None)
    close(fixed.target, collect().folds[0].target)
    close(fixed.gram, collect().folds[0].gram)
    full = collect(rho=0.0, full_weight=True)
    assert full.basis is None and full.base_weight is W0 and full.folds[0].prior is None
    close(full.folds[0].cross, summed(0, lambda x, xm, d: x.mT @ xm))
    close(full.folds[0].target, summed(0, lambda x, xm, d: d @ x.mT @ xm))


def test_norms_and_variances_are_of_each_task_over_all_folds() -> None:
    stats, cheap = collect(), collect(exact_cross_norm=False)
    for i in range(3):
        assert stats.gram_norms[i] == pytest.approx(float((XM[i].mT @ XM[i]).norm()))
        assert stats.cross_norms[i] == pytest.approx(float((X[i].mT @ XM[i]).norm()))
        assert cheap.cross_norms[i] == cheap.gram_norms[i]
        close(stats.variances[i], XM[i].square().sum(0))


def test_a_pass_with_the_task_stream_alone_has_one_gram() -> None:
    sums = collect(given=rows(alone=True)).folds[1]
    close(sums.gram, summed(1, lambda x, xm, d: x.mT @ x))
    assert sums.cross is not None and sums.prior is not None
    assert torch.equal(sums.cross, sums.gram) and torch.equal(sums.prior, sums.gram)


def test_the_merged_target_takes_merged_inputs_on_both_sides() -> None:
    stats = collect(target_merged=True, rho=0.0)
    close(stats.basis @ stats.folds[0].target, summed(0, lambda x, xm, d: d @ xm.mT @ xm))
    assert stats.energy == pytest.approx(
        sum(c * float((xm @ f.delta().mT).square().sum()) for c, xm, f in zip(C, XM, FACTORS, strict=True))
    )


def test_off_diagonal_entries_are_scaled() -> None:
    stats = collect(offdiag=0.9, rho=0.0)
    gram = summed(0, lambda x, xm, d: xm.mT @ xm)
    close(stats.folds[0].gram, 0.9 * gram + 0.1 * torch.diag(gram.diagonal()))
    crosses = [x.mT @ xm for x, xm in (parts(0, i) for i in range(3))]
    crosses = [0.9 * k + 0.1 * torch.diag(k.diagonal()) for k in crosses]
    want = sum(c * f.delta() @ k for c, f, k in zip(C, FACTORS, crosses, strict=True))
    close(stats.basis @ stats.folds[0].target, want)


@pytest.mark.parametrize("mode", ["full", "delta", "none"])
def test_task_weights(mode: str) -> None:
    stats = collect(lambda_weight=mode)
    want = oracle.task_weights(
        [x.numpy() for x in X], [f.delta().numpy() for f in FACTORS], W0.numpy(), "one" if mode == "none" else mode
    )
    np.testing.assert_allclose(stats.lambdas, want, rtol=1e-10)
    np.testing.assert_allclose(stats.coefficients, want * np.array(C), rtol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_the_energy_that_is_to_be_matched(full: bool) -> None:
    want = 0.0
    for c, x, xm, f in zip(C, X, XM, FACTORS, strict=True):
        y = x @ f.delta().mT + ((x - xm) @ W0.mT if full else 0.0)
        want += c * float(y.square().sum())
    assert collect(full_weight=full).energy == pytest.approx(want)


def test_sample_weights_enter_every_gram_once() -> None:
    stats = collect(rho=0.0, weighting=Weighting(1.0, 0.5, "gaussian", False))
    deltas = [f.delta().numpy() for f in FACTORS]
    V = [oracle.dcs_variance(x.numpy(), deltas) for x in X]
    dcs = oracle.dcs_weights(V, oracle.Dcs(1.0, 0.5))
    gram = sum(c * xm.numpy().T @ (w[:, None] * xm.numpy()) for c, xm, w in zip(C, XM, dcs.w, strict=True))
    np.testing.assert_allclose(sum(f.gram for f in stats.folds).numpy(), gram, rtol=1e-7)
    assert stats.weighting is not None and stats.weighting["sigma"] == pytest.approx(dcs.sigma)
    assert stats.weighting["tau"] == pytest.approx(dcs.tau, rel=1e-6)
    assert stats.tokens == list(TOKENS), "weights do not change the count"


def test_shared_grams_change_nothing() -> None:
    """What one module has summed another one that is fed by the same tensor takes over."""
    shared: dict[tuple[int, int], Sums] = {}
    collect(shared=shared)
    assert set(shared) == {(task, fold) for task in range(3) for fold in range(2)}
    other = [LowRank(draw(50 + i, M, 2), draw(60 + i, 2, D)) for i in range(3)]
    found, want = collect(other, shared), collect(other)
    for a, b in zip(found.folds, want.folds, strict=True):
        assert torch.equal(a.gram, b.gram) and torch.equal(a.target, b.target)
    # They are really taken: a Gram that was tampered with shows.
    shared[0, 0] = Sums(torch.zeros(D, D, dtype=torch.float64), shared[0, 0].cross, shared[0, 0].prior)
    assert not torch.equal(collect(other, shared).folds[0].gram, want.folds[0].gram)


def test_a_missing_module_is_a_delta_of_zero() -> None:
    zero = [LowRank(0 * f.B, f.A) if i == 1 else f for i, f in enumerate(FACTORS)]
    found, want = collect([FACTORS[0], None, FACTORS[2]]), collect(zero)
    assert found.pairs[1] is None and found.basis is not None and want.basis is not None
    for a, b in zip(found.folds, want.folds, strict=True):
        close(a.gram, b.gram)
        close(found.basis @ a.target, want.basis @ b.target)
    assert found.gram_norms == want.gram_norms and found.energy == pytest.approx(want.energy)


@pytest.mark.parametrize("weighting", [None, Weighting(1.0, 0.5, "gaussian", False)], ids=["plain", "weighted"])
def test_a_missing_module_may_have_no_say(weighting: Weighting | None) -> None:
    """`--on-missing present`: the sums are those of the other tasks."""
    found = collect([FACTORS[0], None, FACTORS[2]], only_present=True, weighting=weighting)
    others = [Rows(min(r.task, 1), r.fold, r.X, r.Xm, r.out_sq) for r in rows() if r.task != 1]
    want = collect(
        [FACTORS[0], FACTORS[2]], given=others, coefficients=(C[0], C[2]), weighting=weighting, only_present=False
    )
    assert found.basis is not None and want.basis is not None
    for a, b in zip(found.folds, want.folds, strict=True):
        close(a.gram, b.gram)
        close(found.basis @ a.target, want.basis @ b.target)
        assert a.share == pytest.approx(b.share)
    assert found.gram_norms[1] == 0.0 and found.gram_norms[::2] == pytest.approx(want.gram_norms)
    assert found.energy == pytest.approx(want.energy) and found.weighting == pytest.approx(want.weighting)


def test_the_basis_spans_the_columns_of_every_b() -> None:
    basis = layer_basis(Layer("m", FACTORS, None))
    assert basis.shape == (M, sum(RANKS))
    close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))
    for f in FACTORS:
        close(basis @ (basis.mT @ f.B), f.B)
    twice = [FACTORS[0], None, FACTORS[0]]
    assert layer_basis(Layer("m", twice, None)).shape == (M, 2), "the numerical rank"
    zero = [LowRank(0 * FACTORS[0].B, FACTORS[0].A)]
    assert layer_basis(Layer("m", zero, None)).shape == (M, 1)
    assert not bool(collect(zero * 3).folds[0].target.any())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", ["X", "Xm"])
def test_inputs_that_are_not_finite_name_module_and_task(value: float, stream: str) -> None:
    broken = [Rows(r.task, r.fold, r.X.clone(), r.Xm.clone(), r.out_sq) for r in rows()]
    target = next(r for r in broken if r.task == 1)
    getattr(target, stream)[0, 2] = value
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        collect(given=broken)
    assert (caught.value.where, caught.value.got) == ("layers.1.q", "task 1")


def test_a_task_without_tokens() -> None:
    with pytest.raises(LoraforgeError, match="no calibration token") as caught:
        collect(given=[r for r in rows() if r.task != 2])
    assert (caught.value.where, caught.value.got) == ("layers.1.q", "task 2")


def test_float32_inputs_are_summed_in_float64() -> None:
    """One Gram of 4000 rows: the error is that of float32 products of chunks, not of a float32 sum."""
    x = draw(7, 4000, D) + 1.0
    one = [Rows(0, 0, x.float(), x.float(), 0.0)]
    stats = collect([FACTORS[0]], given=one, coefficients=(1.0,), folds=1)
    assert stats.folds[0].gram.dtype == torch.float64
    exact = x.float().double().mT @ x.float().double()
    assert float((stats.folds[0].gram - exact).norm() / exact.norm()) < 1e-6

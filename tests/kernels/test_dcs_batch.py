from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels import dcs_batch, dcs_variance, dcs_weights
from loraforge.kernels.dcs import dcs_batch_reference
from tests.kernels.conftest import SIZES
from tests.kernels.test_dcs import _form, _oracle

F64 = torch.float64


def _modules(rng, b, S, R, dtype=torch.float32, scale=1.0):
    Y = (torch.randn(b, S, R, generator=rng, dtype=F64) * scale).to(dtype)
    return Y, torch.stack([_form(rng, R) for _ in range(b)]) if b else torch.zeros(0, R, R, dtype=F64)


def _one_by_one(Y, M, counts, *options):
    """dcs_variance and dcs_weights of each module alone."""
    w, stats = torch.zeros(Y.shape[:2], dtype=F64), torch.empty(len(Y), 3, dtype=F64)
    for i, n in enumerate(counts):
        one = dcs_weights(dcs_variance(Y[i, :n], M[i]), *options)
        w[i, :n] = one.w
        stats[i] = torch.tensor(one[1:], dtype=F64)
    return w, stats


@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "S", "R"), [(1, 1, 1), (3, 7, 7), (2, 97, 129), (5, 129, 33), (2, 5, 0), (0, 4, 3)])
def test_it_is_the_two_operators_of_each_module(path, rng, b, S, R, dtype, kernel):
    Y, M = _modules(rng, b, S, R, dtype)
    got = dcs_batch(Y, M, None, 0.5, 0.4, kernel, True)
    w, stats = _one_by_one(Y, M, [S] * b, 0.5, 0.4, kernel, True)
    assert got.w.shape == (b, S) and got.stats.shape == (b, 3) and got.w.dtype == got.stats.dtype == F64
    assert torch.equal(got.w, w) and torch.equal(got.stats, stats)


def test_each_module_equals_the_oracle(path, rng):
    Y, M = _modules(rng, 4, 97, 7, F64)
    got = dcs_batch(Y, M, None, 0.1, 0.5)
    for y, m, w, stats in zip(Y.numpy(), M.numpy(), got.w, got.stats, strict=True):
        V = np.einsum("si,ij,sj->s", y, m, y)
        want, *numbers = _oracle(V, 0.1, 0.5, "gaussian", False)
        np.testing.assert_allclose(w.numpy(), want, rtol=1e-8, atol=1e-12)
        assert stats.tolist() == pytest.approx(numbers, rel=1e-9)


def test_rows_that_do_not_count_are_never_looked_at(path, rng):
    counts = [97, 0, 1, 33]
    Y, M = _modules(rng, 4, 97, 5)
    clean = _one_by_one(Y, M, counts, 0.3, 0.5)
    for i, n in enumerate(counts):
        Y[i, n:] = float("nan")
    got = dcs_batch(Y, M, torch.tensor(counts), 0.3, 0.5)
    assert torch.equal(got.w, clean[0]) and torch.equal(got.stats, clean[1])
    assert got.stats[1].tolist() == [0.0, 1.0, 1.0] and (got.w[1] == 0).all()
    assert got.w.sum(1).tolist() == pytest.approx([97, 0, 1, 33])


def test_a_module_that_cannot_be_weighed_says_so_and_spoils_no_other(path, rng):
    Y, M = _modules(rng, 3, 33, 5)
    Y[1, 30, 2] = float("nan")
    got = dcs_batch(Y, M, torch.tensor([33, 31, 33]))
    want = _one_by_one(Y[::2], M[::2], [33, 33])
    assert got.w[1, :31].isnan().all() and (got.w[1, 31:] == 0).all() and got.stats[1].isnan().all()
    assert torch.equal(got.w[::2], want[0]) and torch.equal(got.stats[::2], want[1])
    Y[1, 30, 2] = 1e38  # finite, and so is its square in float64
    assert dcs_batch(Y, M).stats.isfinite().all()


@pytest.mark.parametrize("scale", [1e-75, 1e75])
@pytest.mark.parametrize("kernel", ["gaussian", "excess"])
def test_tiny_and_huge_variances(path, rng, scale, kernel):
    Y, M = _modules(rng, 2, 129, 7, F64)
    plain, scaled = dcs_batch(Y, M, None, 1.0, 0.25, "excess"), dcs_batch(Y * scale, M, None, 1.0, 0.25, "excess")
    torch.testing.assert_close(scaled.w, plain.w, rtol=1e-9, atol=1e-12)  # excess is free of units
    got = dcs_batch(Y * scale, M, None, 1.0, 0.25, kernel)
    assert got.w.isfinite().all() and got.w.mean(1).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)
    assert (got.stats[:, 2] >= 0.25).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extremes_of_narrow_types(path, rng, dtype):
    big = torch.finfo(dtype).max
    Y, M = torch.full((1, 7, 2), big).to(dtype), torch.eye(2, dtype=F64)[None]
    Y[0, 3], Y[0, 4] = torch.finfo(dtype).smallest_normal, 0.0
    got = dcs_batch(Y, M)
    V = (Y[0].double() ** 2).sum(-1)
    want = dcs_weights(V)
    torch.testing.assert_close(got.w[0], want.w, rtol=1e-12, atol=0.0)
    assert got.stats[0].tolist() == pytest.approx(want[1:])


def test_equal_rows_duplicate_and_zero_columns(path, rng):
    Y, M = _modules(rng, 1, 9, 4)
    same = dcs_batch(Y[:, :1].expand(1, 9, 4), M)
    assert same.w.tolist() == [[1.0] * 9] and same.stats.tolist() == [[0.0, 1.0, 1.0]]
    # Columns of 0 at the end, as of a module of lower rank, change nothing beyond the order of sums.
    wide, form = torch.cat([Y, torch.zeros(1, 9, 3)], 2), torch.nn.functional.pad(M, (0, 3, 0, 3), value=7.0)
    torch.testing.assert_close(dcs_batch(wide, form).w, dcs_batch(Y, M).w, rtol=1e-10, atol=1e-13)
    # A column twice with half its form each: y^T M y is the same.
    twice = torch.cat([Y, Y], 2)
    quarter = torch.cat([torch.cat([M, M], 2)] * 2, 1) / 4
    torch.testing.assert_close(dcs_batch(twice, quarter).w, dcs_batch(Y, M).w, rtol=1e-10, atol=1e-13)


def test_strides_and_a_form_that_is_not_symmetric(path, rng):
    Y, M = _modules(rng, 3, 10, 6)
    skew = torch.randn(3, 6, 6, generator=rng, dtype=F64)
    want = dcs_batch(Y[:, ::2, :].contiguous(), M, torch.tensor([5, 4, 3]))
    counts = torch.tensor([5, 0, 4, 0, 3])[::2]
    views = (Y[:, ::2, :], M.mT), (Y.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2], M + skew - skew.mT)
    for y, m in views:
        torch.testing.assert_close(dcs_batch(y, m, counts).w, want.w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("S", SIZES)
def test_forms_agree(native, rng, S):
    Y, M = _modules(rng, 3, S, 13)
    counts = torch.tensor([S, S // 2, 0])
    for kernel, floor in (("gaussian", 0.25), ("excess", 0.9), ("gaussian", 0.0)):
        got, want = (f(Y, M, counts, 0.5, floor, kernel) for f in (dcs_batch, dcs_batch_reference))
        torch.testing.assert_close(got.w, want.w, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.stats, want.stats, rtol=1e-9, atol=0.0)


def test_results_do_not_depend_on_the_thread_count(native, rng, threads):
    (Y, M), found = _modules(rng, 5, 9001, 5), []
    for count in (1, 2, 3):
        threads(count)
        found.append((dcs_batch(Y, M, None, 0.01, 0.5), dcs_batch(Y[:1], M[:1], None, 0.01, 0.5)))
    for many, one in found:
        assert torch.equal(many.w, found[0][0].w) and torch.equal(many.stats, found[0][0].stats)
        assert torch.equal(one.w[0], many.w[0])


def test_what_does_not_fit_is_refused(path):
    Y, M = torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)
    for change, words in (
        ({"M": torch.zeros(2, 3, 3)}, ["tensor M", "(2, 4, 4)", "(2, 3, 3)"]),
        ({"Y": torch.zeros(2, 3, 4, dtype=torch.int64)}, ["tensor Y", "int64"]),
        ({"counts": torch.tensor([1, 2, 3])}, ["tensor counts", "(2,)"]),
        ({"counts": torch.tensor([1.0, 2.0])}, ["tensor counts", "int64"]),
        ({"counts": torch.tensor([1, 4])}, ["counts", "4", "0 to S = 3"]),
        ({"counts": torch.tensor([-1, 3])}, ["counts", "-1"]),
        ({"scale": 0.0}, ["scale", "above 0"]),
        ({"min_ess": math.nan}, ["min_ess", "0 to 1"]),
    ):
        with pytest.raises(LoraforgeError) as caught:
            dcs_batch(**({"Y": Y, "M": M} | change))
        assert all(word in str(caught.value) for word in words), change
    with pytest.raises(UsageError, match="did you mean 'excess'"):
        dcs_batch(Y, M, kernel="exces")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([4]), "counts has value 4, expected 0 to S = 3"),
        (torch.tensor([1, 2]), r"counts has shape \(2,\), expected size 1"),
        (torch.tensor([1.0]), "counts has dtype Float, expected dtype Long"),
    ],
)
def test_the_compiled_form_checks_for_itself(native, counts, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.loraforge.dcs_batch(torch.zeros(1, 3, 2), torch.zeros(1, 2, 2), counts, 1.0, 0.25, False, False)


def test_the_compiled_weights_of_what_has_none_are_nan(native):
    for bad in (float("nan"), float("inf"), -1.0):
        V = torch.tensor([1.0, bad, 2.0], dtype=F64)
        w, stats = torch.ops.loraforge.dcs_weights(V, 1.0, 0.25, False, False)
        assert w.isnan().all() and stats.isnan().all()

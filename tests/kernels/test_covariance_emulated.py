"""The text of csrc/cuda/covariance.cu on the thread emulator, and the operators on a GPU."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels import covariance
from loraforge.kernels.covariance import cov_fold_, cov_fold_reference, cov_pack, cov_pack_reference, gram_
from tests.kernels.conftest import SIZES
from tests.kernels.emulator import emulate

F64 = torch.float64
FLOATS = [torch.float32, F64, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _rows(rng, T, d, dtype, scale=1.0):
    return (torch.randn(T, d, generator=rng, dtype=F64) * scale).to(dtype)


def _same(got, want):
    """Bit for bit, but for the payload of a NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    known = ~want.isnan()
    assert torch.equal(got[known], want[known]) and torch.equal(got[known].signbit(), want[known].signbit())


def _pack(x, d, skip, mask, weight, to, kind="plain", rows=None):
    like = torch.zeros(1, dtype=to)
    return emulate("cov_pack", "covariance", kind, x=x, d=d, skip=skip, mask=mask, weight=weight, like=like, rows=rows)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pack_of_every_pair_of_types(rng, dtype, to):
    """Aligned rows, rows that lie apart, and rows of which nothing is aligned; masked and weighted or not."""
    T, d = 97, 264
    mask, weight = torch.rand(T, generator=rng) < 0.6, torch.randn(T, generator=rng)
    weight[3] = 0.0
    for ld, skip, wide in ((d, 0, d), (d + 16, 8, d), (d + 5, 1, d), (d + 7, 0, d - 1)):
        x = _rows(rng, T, ld, dtype)
        for m, w in ((mask, weight.to(dtype)), (mask, None), (None, weight)):
            got = _pack(x, wide, skip, m, w, to)["out"]
            _same(got, cov_pack_reference(x[:, skip : skip + wide], m, w, to))


@pytest.mark.parametrize("d", [*SIZES, 128, 1100])
@pytest.mark.parametrize("T", [*SIZES, 9000])
def test_pack_of_every_size(rng, T, d):
    if T * d > 10**6:
        d = 3
    x, mask = _rows(rng, T, d, torch.bfloat16), torch.rand(T, generator=rng) < 0.5
    for m in (mask, torch.zeros_like(mask), torch.ones_like(mask), torch.arange(T) == T - 1):
        found = _pack(x, d, 0, m, None, torch.bfloat16)
        assert torch.equal(found["out"], x[m])
        assert found["kept"][: int(m.sum())].tolist() == m.nonzero()[:, 0].tolist()


def test_pack_takes_any_byte_but_zero_as_set(rng):
    """A mask that was made from whole numbers: 2 and 128 are true."""
    mask = torch.tensor([0, 1, 2, 127, 128, 255, 0], dtype=torch.uint8)
    assert _pack(_rows(rng, 7, 3, F64), 3, 0, mask, None, F64)["kept"][:5].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("to", FLOATS)
def test_pack_of_huge_tiny_and_missing_numbers(to):
    row = [float("inf"), -float("inf"), float("nan"), 1e-41, -1e-8, 65519.0, 65520.0, 3.4e38, -0.0, 1e-45, 3.39e38]
    x = torch.tensor([row, row])
    _same(_pack(x, 11, 0, torch.ones(2).bool(), None, to)["out"], x.to(to))
    _same(_pack(x.double() * 1e10, 11, 0, None, torch.ones(2), to)["out"], (x.double() * 1e10).to(to))
    double = torch.full((2,), 2.0)
    _same(_pack(x, 11, 0, None, double, to)["out"], cov_pack_reference(x, None, double, to))


@pytest.mark.parametrize("rows", [0, 3, 4, 5, 7])
def test_pack_with_a_known_number_of_rows(rng, rows):
    x, mask = _rows(rng, 7, 9, torch.float32), torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
    for to in FLOATS:
        got = _pack(x, 9, 0, mask, None, to, rows=rows)["out"]
        if rows == 4:
            assert torch.equal(got, x[mask].to(to))
        else:
            assert got.shape == (rows, 9) and bool(got.isnan().all()), "a wrong number must not pass for data"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [*SIZES, 32, 64])
@pytest.mark.parametrize("slots", [1, 3])
def test_fold(rng, slots, d, dtype):
    acc, chunk = _rows(rng, d, d + 3, F64), _rows(rng, slots * d, d + 2, dtype).view(slots, d, d + 2)
    below = torch.ones(d, d).tril(-1).bool()
    chunk[:, :, :d][below.expand(slots, d, d)] = float("nan")
    for mirror in (False, True):
        want = acc[:, :d].clone()
        cov_fold_reference(want, chunk[:, :, :d], True, mirror)
        found = emulate("cov_fold", "covariance", acc=acc, chunk=chunk, m=d, n=d, symmetric=1, mirror=int(mirror))[
            "acc"
        ]
        assert torch.equal(found[:, :d], want) and torch.equal(found[:, d:], acc[:, d:])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 129), (97, 5), (33, 64)])
def test_fold_of_an_oblong_product(rng, m, n, dtype):
    acc, chunk = _rows(rng, m, n + 1, F64), _rows(rng, 2 * m, n, dtype).view(2, m, n)
    found = emulate("cov_fold", "covariance", acc=acc, chunk=chunk, m=m, n=n, symmetric=0, mirror=0)["acc"]
    assert torch.equal(found[:, :n], acc[:, :n] + chunk[0] + chunk[1]) and torch.equal(found[:, n:], acc[:, n:])


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(rng, kind):
    T, d = 4103, 9
    x, mask, weight = (
        _rows(rng, T, d + 2, torch.bfloat16),
        torch.rand(T, generator=rng) < 0.01,
        torch.rand(T, generator=rng),
    )
    for skip in (0, 2):
        got = _pack(x, d, skip, mask, weight, torch.float32, kind)["out"]
        assert torch.equal(got, cov_pack_reference(x[:, skip : skip + d], mask, weight, torch.float32))
    whole = _rows(rng, 5, 16, torch.float16)
    assert torch.equal(_pack(whole, 16, 0, None, torch.ones(5), torch.bfloat16, kind)["out"], whole.bfloat16())
    acc, chunk = _rows(rng, 70, 70, F64), _rows(rng, 140, 70, torch.float32).view(2, 70, 70)
    want = acc.clone()
    cov_fold_reference(want, chunk, True)
    found = emulate("cov_fold", "covariance", kind, acc=acc, chunk=chunk, m=70, n=70, symmetric=1, mirror=1)
    assert torch.equal(found["acc"], want)
    found = emulate("cov_fold", "covariance", kind, acc=acc, chunk=chunk, m=70, n=70, symmetric=0, mirror=0)
    assert torch.equal(found["acc"], acc + chunk[0] + chunk[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pack_on_the_gpu(rng, dtype, to):
    for T, d in ((1, 1), (97, 129), (5000, 264)):
        x, mask, weight = _rows(rng, T, d + 8, dtype), torch.rand(T, generator=rng) < 0.6, torch.rand(T, generator=rng)
        for m in (None, mask, torch.zeros_like(mask), torch.ones_like(mask)):
            for w in (None, weight.to(dtype)):
                for part in (x[:, :d], x[:, 8:], x[:, 3 : 3 + d]):
                    there = [None if t is None else t.cuda() for t in (part, m, w)]
                    want = cov_pack_reference(part, m, w, to)
                    _same(cov_pack(there[0], there[1], there[2], to).cpu(), want)
                    _same(cov_pack(there[0], there[1], there[2], to, rows=len(want)).cpu(), want)
    wrong = cov_pack(x.cuda(), mask.cuda(), None, to, rows=int(mask.sum()) - 1)
    assert bool(wrong.isnan().all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_fold_on_the_gpu(rng, dtype):
    for d in (1, 129, 500):
        acc, chunk = _rows(rng, d, d, F64), _rows(rng, 2 * d, d + 3, dtype).view(2, d, d + 3)[:, :, 3:]
        for symmetric, mirror in ((True, True), (True, False), (False, False)):
            want, found = acc.clone(), acc.cuda()
            cov_fold_reference(want, chunk, symmetric, mirror)
            cov_fold_(found, chunk.cuda(), symmetric, mirror)
            assert torch.equal(found.cpu(), want)
            turned = acc.T.contiguous().cuda().T
            cov_fold_(turned, chunk.cuda(), symmetric, mirror)
            assert torch.equal(turned.cpu(), want)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("sizes", "d"), [((97,), 129), ((3000, 1, 0, 6000), 2300), ((8192,), 4096)])
def test_gram_on_the_gpu(rng, dtype, sizes, d):
    """No worse than twice the plain product of all rows on the same device, and the same bits every time."""
    X = [_rows(rng, T, d, dtype).cuda() for T in sizes]
    acc, again, cross = (torch.zeros(d, d, dtype=F64, device="cuda") for _ in range(3))
    gram_(acc, X)
    gram_(again, X)
    gram_(cross, X, [x.flip(1) for x in X])
    rows = torch.cat(X)
    exact = rows.double().T @ rows.double()
    half = dtype in (torch.bfloat16, torch.float16)
    plain = torch.mm(rows.T, rows, out_dtype=torch.float32) if half else rows.T @ rows
    limit = 2 * (plain.double() - exact).abs().max() + 1e-13 * exact.abs().max()
    assert torch.equal(acc, again) and torch.equal(acc, acc.T)
    assert (acc - exact).abs().max() <= limit
    assert (cross - exact.flip(1)).abs().max() <= limit


@pytest.mark.gpu
@needs_gpu
def test_tf32_changes_no_gram_on_the_gpu(rng):
    X, found = _rows(rng, 500, 300, torch.float32).cuda(), []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            acc = torch.zeros(300, 300, dtype=F64, device="cuda")
            gram_(acc, X)
        finally:
            torch.set_float32_matmul_precision("highest")
        found.append(acc)
    assert torch.equal(found[0], found[1])


@pytest.mark.gpu
@needs_gpu
def test_a_known_number_of_rows_needs_no_wait_for_the_gpu(rng):
    x, mask = _rows(rng, 100, 64, torch.bfloat16).cuda(), (torch.arange(100) < 40).cuda()
    cov_pack(x, mask, None, torch.float32, rows=40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = cov_pack(x, mask, None, torch.float32, rows=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(packed, x[:40].float()) and covariance._stays_half(x)

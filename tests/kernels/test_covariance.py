from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend, cov_fold_, cov_pack, gram_
from tests.kernels.conftest import SIZES

F64 = torch.float64
FLOATS = [torch.float32, F64, torch.bfloat16, torch.float16]


def _rows(rng, T, d, dtype):
    return torch.randn(T, d, generator=rng, dtype=F64).to(dtype)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "d"), [(0, 3), (3, 0), (1, 1), (97, 129), (129, 7)])
def test_pack_rounds_as_torch_does(path, rng, T, d, dtype, to):
    x, weight = _rows(rng, T, d, dtype), torch.rand(T, generator=rng)
    mask = torch.rand(T, generator=rng) < 0.6
    wide = F64 if F64 in (dtype, to) else torch.float32
    for m, w in ((mask, weight), (mask, None), (None, weight), (None, None)):
        rows = x.to(wide) if w is None else x.to(wide) * w.to(wide)[:, None]
        want = (rows if m is None else rows[m]).to(to)
        got = cov_pack(x, m, w, to)
        assert got.dtype == to and torch.equal(got, want)


@pytest.mark.parametrize("to", FLOATS)
def test_pack_keeps_infinities_nans_and_denormals(path, to):
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1e-41, -1e-8, 65519.0, 65520.0, 3.4e38, -0.0]])
    got, want = cov_pack(x, None, torch.ones(1), to), x.to(to)
    assert got.isnan().tolist() == want.isnan().tolist()  # the sign of a NaN is nobody's business
    assert torch.equal(got[want == want], want[want == want])
    assert torch.equal(got[want == want].signbit(), want[want == want].signbit())


def test_pack_of_a_mask_that_drops_all_rows_is_empty(path, rng):
    got = cov_pack(_rows(rng, 7, 5, torch.float32), torch.zeros(7, dtype=torch.bool), torch.ones(7), torch.float32)
    assert got.shape == (0, 5)
    acc = torch.eye(5, dtype=F64)
    gram_(acc, got)
    assert torch.equal(acc, torch.eye(5, dtype=F64))


def test_pack_takes_any_strides(path, rng):
    x = _rows(rng, 33, 129, torch.float32)
    mask, weight = (torch.rand(129, 2, generator=rng) < 0.5)[:, 1], torch.rand(129, 2, generator=rng)[:, 0]
    want = cov_pack(x.T.contiguous(), mask.contiguous(), weight.contiguous(), torch.bfloat16)
    assert torch.equal(cov_pack(x.T, mask, weight, torch.bfloat16), want)
    apart = torch.zeros(129, 50)
    apart[:, 3:36] = x.T
    assert torch.equal(cov_pack(apart[:, 3:36], mask, weight, torch.bfloat16), want)


def test_pack_with_square_roots_of_weights_gives_the_weighted_gram(path, rng):
    x, weight = _rows(rng, 97, 7, F64), torch.rand(97, generator=rng, dtype=F64)
    acc = torch.zeros(7, 7, dtype=F64)
    gram_(acc, cov_pack(x, None, weight.sqrt(), F64))
    torch.testing.assert_close(acc, x.T @ torch.diag(weight) @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [0, *SIZES, 32, 64])
def test_fold_mirrors_the_upper_triangle_exactly(path, rng, d, dtype):
    chunk, start = _rows(rng, d, d, dtype), _rows(rng, d, d, F64)
    full, half = start.clone(), start.clone()
    cov_fold_(full, chunk, symmetric=False)
    assert torch.equal(full, start + chunk)
    upper = chunk.triu() + chunk.triu(1).T
    poisoned = chunk.clone()
    poisoned[torch.ones(d, d).tril(-1).bool()] = float("nan")  # below the diagonal nothing may be read
    cov_fold_(half, poisoned, symmetric=True)
    assert torch.equal(half, start + upper)


def test_fold_takes_any_strides_and_an_oblong_product(path, rng):
    acc, chunk = _rows(rng, 33, 70, F64), _rows(rng, 70, 33, torch.float32)
    want = acc + chunk.T
    whole = torch.zeros(40, 80, dtype=F64)
    for target in (acc.clone(), acc.T.contiguous().T, whole[:33, :70]):
        target.copy_(acc)
        cov_fold_(target, chunk.T, symmetric=False)
        assert torch.equal(target, want)
    assert not whole[33:].any() and not whole[:, 70:].any()
    square = _rows(rng, 97, 97, F64)
    turned = square.T.contiguous().T
    cov_fold_(square, square.float(), symmetric=True)
    cov_fold_(turned, turned.float(), symmetric=True)
    assert torch.equal(square, turned)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "d"), [(0, 7), (1, 1), (97, 129), (129, 97), (5000, 7), (300, 401)])
def test_gram_is_no_worse_than_twice_torch(path, rng, T, d, dtype):
    X = _rows(rng, T, d, dtype)
    acc = torch.zeros(d, d, dtype=F64)
    gram_(acc, X)
    gram_(acc, X)
    exact = 2 * (X.double().T @ X.double())
    plain = (
        2 * (X.to(F64 if dtype == F64 else torch.float32).T @ X.to(F64 if dtype == F64 else torch.float32))
    ).double()
    assert torch.equal(acc, acc.T)
    slack = 1e-13 * float(exact.diagonal().max()) if T else 0.0  # float64 against itself in another order
    assert (acc - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack


def test_gram_rounding_does_not_grow_with_the_tokens(path):
    # 2^24 ones: a float32 accumulator over all rows would stop at 2^24; here it must go on counting.
    acc = torch.full((1, 1), 2.0**24, dtype=F64)
    gram_(acc, torch.ones(4097, 1))
    assert acc.item() == 2.0**24 + 4097


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_gram(path, rng, dtype):
    X, Y = _rows(rng, 4100, 7, dtype), _rows(rng, 4100, 33, dtype)
    acc = torch.zeros(7, 33, dtype=F64)
    gram_(acc, X, Y)
    exact = X.double().T @ Y.double()
    plain = X.to(torch.float32).T @ Y.to(torch.float32) if dtype != F64 else exact
    assert (acc - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 1e-10


def test_gram_takes_strided_rows_and_counts_as_one_call(path, rng):
    X = _rows(rng, 97, 300, torch.float32)
    first, second = torch.zeros(129, 129, dtype=F64), torch.zeros(129, 129, dtype=F64)
    before = backend.kernel_report()["calls"].get("gram_", {}).get("blocks", 0)
    gram_(first, X[:, 100:229])
    gram_(second, X[:, 100:229].contiguous())
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)
    assert backend.kernel_report()["calls"]["gram_"]["blocks"] == before + 2


def test_results_do_not_depend_on_the_thread_count(native, rng, threads):
    x, found = _rows(rng, 999, 129, torch.float32), []
    mask, weight, start = (
        torch.rand(999, generator=rng) < 0.5,
        torch.rand(999, generator=rng),
        _rows(rng, 129, 129, F64),
    )
    for count in (1, 2, 3):
        threads(count)
        acc = start.clone()
        cov_fold_(acc, x[:129], symmetric=True)
        found.append((cov_pack(x, mask, weight, torch.bfloat16), acc))
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), None, None, torch.float32), ["tensor x", "(3,)", "(T, d)"]),
        ((torch.zeros(3, 2), torch.ones(3), None, torch.float32), ["tensor mask", "float32", "bool"]),
        ((torch.zeros(3, 2), torch.ones(2).bool(), None, torch.float32), ["tensor mask", "(2,)", "(3,)"]),
        ((torch.zeros(3, 2), None, torch.ones(3, 1), torch.float32), ["tensor weight", "(3, 1)", "(3,)"]),
        ((torch.zeros(3, 2), None, torch.ones(3), torch.int32), ["dtype", "int32", "bfloat16"]),
        ((torch.zeros(3, 2, dtype=torch.int64), None, None, torch.float32), ["tensor x", "int64"]),
    ],
)
def test_pack_refuses_what_does_not_fit(path, arguments, words):
    with pytest.raises(LoraforgeError) as caught:
        cov_pack(*arguments)
    assert all(word in str(caught.value) for word in ["cov_pack", *words])


def test_fold_and_gram_refuse_what_does_not_fit(path):
    acc = torch.zeros(3, 3, dtype=F64)
    with pytest.raises(LoraforgeError, match=r"tensor acc has the wrong dtype(.|\n)*float32(.|\n)*float64"):
        cov_fold_(acc.float(), acc, symmetric=False)
    with pytest.raises(LoraforgeError, match=r"tensor chunk has the wrong shape(.|\n)*\(2, 2\)(.|\n)*\(3, 3\)"):
        cov_fold_(acc, torch.zeros(2, 2), symmetric=True)
    with pytest.raises(LoraforgeError, match=r"tensor acc has the wrong shape(.|\n)*\(2, 3\)"):
        cov_fold_(torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3), symmetric=True)
    with pytest.raises(LoraforgeError, match=r"gram_: tensor acc has the wrong shape(.|\n)*\(4, 4\)"):
        gram_(acc, torch.zeros(5, 4))
    with pytest.raises(LoraforgeError, match="gram_: tensor Y has the wrong shape"):
        gram_(acc, torch.zeros(5, 3), torch.zeros(4, 3))

from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend, cov_fold_, cov_pack, covariance, gram_
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


@pytest.mark.parametrize("rows", [0, 5])
def test_a_known_number_of_rows_changes_nothing(path, rng, rows):
    x, mask = _rows(rng, 7, 5, torch.bfloat16), torch.arange(7) < rows
    assert torch.equal(cov_pack(x, mask, None, torch.float32, rows=rows), x[:rows].float())
    assert torch.equal(cov_pack(x, None, torch.ones(7), torch.float32, rows=7), x.float())
    for wrong in (rows + 1, -1):
        with pytest.raises(
            LoraforgeError, match=rf"cov_pack: the mask keeps another number(.|\n)*{wrong}(.|\n)*{rows}"
        ):
            cov_pack(x, mask, None, torch.float32, rows=wrong)
    with pytest.raises(LoraforgeError, match="another number of rows"):
        cov_pack(x, None, None, torch.float32, rows=6)


def test_the_compiled_form_refuses_a_wrong_number_of_rows(native):
    with pytest.raises(RuntimeError, match="cov_pack: rows has value 3, expected 2, the rows kept"):
        torch.ops.loraforge.cov_pack(torch.zeros(4, 2), torch.arange(4) < 2, None, torch.float32, 3)


def _poisoned(square):
    """NaN below the diagonal, where nothing may be read."""
    return square.masked_fill(torch.ones(square.shape[-2:]).tril(-1).bool(), float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [0, *SIZES, 32, 64])
def test_fold_reads_the_upper_triangle_alone(path, rng, d, dtype):
    chunk, start = _rows(rng, d, d, dtype), _rows(rng, d, d, F64)
    full, half, waiting = start.clone(), _poisoned(start), _poisoned(start)
    cov_fold_(full, chunk, symmetric=False)
    assert torch.equal(full, start + chunk)
    cov_fold_(half, _poisoned(chunk), symmetric=True)
    upper = (start + chunk).triu()
    assert torch.equal(half, upper + upper.triu(1).T)
    cov_fold_(waiting, _poisoned(chunk), symmetric=True, mirror=False)
    assert torch.equal(waiting.triu(), upper)
    cov_fold_(waiting, _poisoned(chunk), symmetric=True)
    cov_fold_(half, chunk, symmetric=True)
    assert torch.equal(waiting, half), "a mirror that comes once, at the end, is the same"


@pytest.mark.parametrize("symmetric", [False, True])
def test_fold_adds_several_products_in_order(path, rng, symmetric):
    acc, chunks = _rows(rng, 97, 97, F64), _rows(rng, 3 * 97, 97, torch.float32).view(3, 97, 97)
    acc += acc.T.clone()
    together, apart = acc.clone(), acc.clone()
    cov_fold_(together, chunks, symmetric)
    for chunk in chunks:
        cov_fold_(apart, chunk, symmetric)
    assert torch.equal(together, apart)
    cov_fold_(together, chunks[:0], symmetric)
    assert torch.equal(together, apart)
    longer = torch.zeros(3, 100, 120)
    longer[:, 2:99, 3:100] = chunks
    cov_fold_(acc, longer[:, 2:99, 3:100], symmetric)
    assert torch.equal(acc, apart)


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
    square += square.T.clone()
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
@pytest.mark.parametrize("cross", [False, True])
def test_blocks_of_rows_are_bit_for_bit_the_calls_one_by_one(path, rng, dtype, cross):
    X = [_rows(rng, T, 7, dtype) for T in (5, 0, 4099, 1)]
    Y = [_rows(rng, len(x), 33, dtype) for x in X] if cross else None
    together, apart = (torch.zeros(7, 33 if cross else 7, dtype=F64) for _ in range(2))
    gram_(together, X, Y)
    for k, x in enumerate(X):
        gram_(apart, x, None if Y is None else Y[k])
    assert torch.equal(together, apart) and together.any()
    gram_(together, [], None if Y is None else [])
    assert torch.equal(together, apart)


def _as_on_cuda(monkeypatch):
    """Runs what CUDA runs, with a product in float32 in place of the tensor cores'."""

    def multiply(left, right, out, add):
        product = left.float() @ right.float()
        out.copy_(out + product if add else product)

    real = covariance._panels, covariance._groups, covariance._multiply
    monkeypatch.setattr(covariance, "_panels", lambda d, cuda: real[0](d, cuda=True))
    monkeypatch.setattr(covariance, "_groups", lambda blocks, cuda: real[1](blocks, cuda=True))
    monkeypatch.setattr(covariance, "_multiply_half", multiply)
    monkeypatch.setattr(covariance, "_slots", lambda acc, wide, products: min(products, 2))
    monkeypatch.setattr(covariance, "_stays_half", lambda x: x.dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cross", [False, True])
def test_the_way_of_cuda_gives_the_same_sums(path, rng, monkeypatch, dtype, cross):
    """Panels, joined blocks and several products a fold: 10 000 rows in blocks that end anywhere."""
    _as_on_cuda(monkeypatch)
    monkeypatch.setattr(covariance, "_CUDA_PANEL", 16)
    X = [_rows(rng, T, 37, dtype) for T in (1000, 1, 0, 5000, 3095, 904)]
    Y = [_rows(rng, len(x), 20, dtype) for x in X] if cross else None
    acc = torch.zeros(37, 20 if cross else 37, dtype=F64)
    gram_(acc, X, Y)
    left, right = torch.cat(X), torch.cat(X if Y is None else Y)
    exact = left.double().T @ right.double()
    plain = (left.T @ right if dtype == F64 else left.float().T @ right.float()).double()
    assert (acc - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-12 * exact.abs().max()
    assert cross or torch.equal(acc, acc.T)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("d", [1, 129, 2048, 2049, 4096, 5120, 14336])
def test_panels_cover_the_triangle_once(d, cuda):
    panels = covariance._panels(d, cuda)
    covered = [row for panel in panels for row in range(*panel.indices(d))]
    assert covered == list(range(d))
    if cuda:  # all panels but the first have full height
        assert {p.stop - p.start for p in panels[1:]} <= {2048} and panels[0].stop <= 2048


def test_products_are_filled_to_4096_rows_on_cuda():
    blocks = [(torch.empty(T, 1), None) for T in (3000, 3000, 0, 5000, 7)]
    sizes = [[len(x) for x, _ in group] for group in covariance._groups(blocks, cuda=True)]
    assert sizes == [[3000, 1096], [1904, 2192], [2808, 7]]
    alone = [[len(x) for x, _ in group] for group in covariance._groups(blocks, cuda=False)]
    assert alone == [[3000], [3000], [4096], [904], [7]]


@pytest.mark.parametrize("how", ["off", "older", "medium", "newer"])
def test_tf32_is_off_during_a_product_and_back_after_it(how):
    switch = torch.backends.cuda.matmul
    try:
        if how == "older":
            switch.allow_tf32 = True
        elif how == "medium":
            torch.set_float32_matmul_precision("medium")
        elif how == "newer":
            switch.fp32_precision = "tf32"
        with covariance._full_float32(cuda=True):
            assert switch.fp32_precision != "tf32" and not switch.allow_tf32
        assert (switch.fp32_precision == "tf32") == (how != "off")
        if how in ("older", "medium"):
            assert torch.get_float32_matmul_precision() == {"older": "high"}.get(how, how)
        with covariance._full_float32(cuda=False):
            assert (switch.fp32_precision == "tf32") == (how != "off"), "nothing is touched for CPU products"
    finally:
        torch.set_float32_matmul_precision("highest")


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
    with pytest.raises(LoraforgeError, match="other numbers of blocks"):
        gram_(acc, [torch.zeros(5, 3)], [])
    with pytest.raises(LoraforgeError, match=r"gram_: tensor X has the wrong dtype(.|\n)*bfloat16(.|\n)*float32"):
        gram_(acc, [torch.zeros(5, 3), torch.zeros(5, 3).bfloat16()])

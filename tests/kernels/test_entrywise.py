from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import drop_rescale_, entry_counts_, entry_merge
from loraforge.kernels.entrywise import SPAN, Part, draw
from tests.kernels import entry_cases as cases
from tests.kernels.conftest import SIZES

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
DTYPES = list(NUMPY)


def check(given, start, stop, dtype, limit=SPAN, gain=1.0, elect=False):
    got = entry_merge(given, start, stop, limit=limit, gain=gain, elect=elect, dtype=dtype, step=4)
    want = cases.merged(given, start, stop, limit, gain, elect, NUMPY[dtype])
    assert got.shape == want.shape and got.dtype == dtype
    # Entries are exact; of the gain, the weights, the sum of three terms and the division each rounds once.
    floor = 6 * torch.finfo(dtype).eps * np.abs(want).max(initial=1.0)
    assert np.abs(got.double().numpy() - want).max(initial=0.0) <= floor
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("n", [*SIZES, 260])
def test_merge_against_numpy(path, n, elect, dtype):
    given = cases.parts(37, n)
    for limit in (SPAN, cases.LIMIT):
        check(given, 0, 37, dtype, limit, cases.GAIN if limit < SPAN else 1.0, elect)
        check(given, 5, 6, dtype, limit, cases.GAIN if limit < SPAN else 1.0, elect)


@pytest.mark.parametrize("dense", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 129, 5000])
def test_merge_of_dense_rows_of_any_float(path, n, dense):
    given = cases.parts(19, n, dense=dense)
    for elect in (False, True):
        check(given, 2, 19, torch.float32, cases.LIMIT, cases.GAIN, elect)
    check([dataclasses.replace(p, scaling=1.0) for p in given], 0, 19, torch.float64)


@pytest.mark.parametrize("r", [1, 7, 16, 64])
def test_entries_are_as_near_as_twice_a_product_in_float64(path, rng, r):
    left = torch.randn(33, r, generator=rng, dtype=torch.float64)
    right = torch.randn(r, 97, generator=rng, dtype=torch.float64)
    exact = left.numpy().astype(np.longdouble) @ right.numpy().astype(np.longdouble)
    got = entry_merge([Part(left, right)], 0, 33, dtype=torch.float64).numpy()
    plain = (left @ right).numpy()
    noise = np.finfo(float).eps * (left.abs() @ right.abs()).numpy()
    assert (np.abs(got - exact) <= np.maximum(2 * np.abs(plain - exact), 0.5 * r * noise)).all()
    assert np.abs(got - exact).max() <= 2 * np.abs(plain - exact).max() + 1e-18
    narrow = entry_merge([Part(left, right)], 0, 33).numpy()
    assert np.mean(narrow == got.astype(np.float32)) == 1.0, "rounded once"


def test_rows_that_lie_apart(path, rng):
    wide = torch.randn(40, 12, generator=rng, dtype=torch.float64)
    tall = torch.randn(97, 9, generator=rng, dtype=torch.float64)
    apart = Part(wide[::2, 3:10], tall[:, :7].T)
    packed = Part(apart.left.contiguous(), apart.right.contiguous())
    one, other = (entry_merge([p], 3, 20, dtype=torch.float64) for p in (apart, packed))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)  # BLAS may add in another order
    rows = torch.randn(20, 30, generator=rng)
    assert torch.equal(entry_merge([Part(rows[::2, ::3], None)], 0, 10), rows[::2, ::3])
    tile = rows.clone()
    drop_rescale_(tile[::2, ::3], 7, 0, cases.LIMIT, 1.0)
    kept = (draw(7, 0, 100).reshape(10, 10) < cases.LIMIT) * rows[::2, ::3].numpy()
    assert (tile[::2, ::3].numpy() == kept).all() and torch.equal(tile[1::2], rows[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_keep_what_equals_them(path, dtype):
    values = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5, 0.0, -0.0, 3.0]], dtype=dtype)
    for low, high, want in (
        (1.0, 2.0, [2, -2, 1, -1, 0, 0, 0, 0]),
        (0.0, math.inf, [2, -2, 1, -1, 0.5, 0, 0, 3]),
        (math.inf, math.inf, [0] * 8),
        (3.0, 3.0, [0] * 7 + [3]),
    ):
        got = entry_merge([Part(values, None, low=low, high=high)], 0, 1, dtype=dtype)
        assert got.tolist() == [want]
    equal = torch.full((5, 7), -0.25, dtype=dtype)
    assert torch.equal(entry_merge([Part(equal, None, low=0.25)], 0, 5, dtype=dtype, elect=True), equal)


def test_extreme_entries(path):
    values = torch.from_numpy(cases.numbers(24))[None]
    assert torch.equal(entry_merge([Part(values, None)], 0, 1, elect=True), values + 0.0)
    largest = float(torch.finfo(torch.float32).max)
    got = entry_merge([Part(torch.tensor([[largest]]), None, 4.0)], 0, 1)
    assert got.item() == math.inf, "an overflow is seen"
    drowned = entry_merge([Part(values, None, low=float(torch.finfo(torch.float32).tiny))], 0, 1)
    assert (drowned[values.abs() < 1e-40] == 0).all() and (drowned[values.abs() > 1e-31] != 0).all()


@pytest.mark.parametrize("elect", [False, True])
def test_nan_stays_visible(path, elect):
    values = torch.ones(3, 17)
    values[1, 5] = float("nan")
    parts = [Part(values, None, low=2.0, high=9.0, key=5), Part(torch.ones(3, 17), None, low=0.5, key=6)]
    for limit in (SPAN, 1):  # a draw below 1 is as good as never
        got = entry_merge(parts, 0, 3, limit=limit, gain=2.0, elect=elect)
        assert got.isnan().nonzero().tolist() == [[1, 5]]
    drop_rescale_(values, 5, 0, 1, 2.0)
    assert values.isnan().nonzero().tolist() == [[1, 5]] and values.nansum() == 0.0


def test_election_with_a_sum_of_zero_and_opposite_voters(path):
    rows = [[2.0, 9.0, 3.0, 0.0], [4.0, -2.0, -3.0, 5.0], [3.0, -3.0, 0.0, 0.0]]
    parts = [Part(torch.tensor([row]), None) for row in rows]
    assert entry_merge(parts, 0, 1, elect=True).tolist() == [[3.0, 9.0, 0.0, 5.0]]


@pytest.mark.parametrize("n", [1, 7, 8, 97, 1000])
def test_draws_are_those_of_numpy_wherever_a_tile_begins(path, n):
    key = 0x9E3779B97F4A7C15F39CC0605CEDC834
    words = np.random.Philox(key=key).random_raw(8 * n)
    whole = words.astype("<u8").view("<u4")[: 16 * n].reshape(16, n)
    for start, stop in ((0, 16), (3, 5), (15, 16)):
        tile = torch.ones(stop - start, n)
        drop_rescale_(tile, key, start, cases.LIMIT, 3.0)
        assert (tile.numpy() == 3.0 * (whole[start:stop] < cases.LIMIT)).all()
    far = 2**37 // n  # beyond 2^32 blocks
    tile = torch.ones(1, n, dtype=torch.float64)
    drop_rescale_(tile, key, far, cases.LIMIT, 1.0)
    assert (tile[0].numpy() == (draw(key, far * n, n) < cases.LIMIT)).all()


@pytest.mark.parametrize("limit", [0, SPAN - 1])
def test_drop_of_nearly_nothing_and_of_everything(path, limit):
    tile = torch.ones(40, 33, dtype=torch.float64)
    drop_rescale_(tile, 3, 0, limit, 0.5)
    assert torch.equal(tile, torch.full_like(tile, 0.5 if limit else 0.0))


@pytest.mark.parametrize("compared", DTYPES)
@pytest.mark.parametrize("entries", DTYPES)
def test_counts_against_numpy(path, entries, compared):
    kind, wide = NUMPY[compared], compared == torch.float64
    values = np.concatenate([cases.numbers(40, NUMPY[entries]), np.ones(23, NUMPY[entries]) * np.float32(0.3)])
    values = values[np.abs(values) < 1e38].reshape(1, -1)
    with np.errstate(under="ignore"):
        seen = values.astype(kind)
    prefix = int(np.abs(seen[:, -1:]).view(np.uint64 if wide else np.uint32)[0, 0])
    for prefixes, low, high in (([0], 47, 63), ([prefix >> 47, 0], 31, 47)) if wide else (
        ([0], 15, 31), ([prefix >> 15, prefix >> 15, 0], 0, 15), ([prefix >> 18, 3], 0, 18)
    ):  # fmt: skip
        table = torch.ones(len(prefixes), 1 << (high - low), dtype=torch.int64)
        entry_counts_(
            table, torch.from_numpy(values), None, dtype=entries, compared=compared, prefixes=prefixes, low=low,
            high=high,
        )  # fmt: skip
        assert (table.numpy() == 1 + cases.counts(seen, prefixes, low, high)).all()


@pytest.mark.parametrize("n", SIZES)
def test_counts_of_products(path, n):
    part = cases.parts(45, n)[2]
    whole = (part.left @ part.right).float().numpy()
    table = torch.zeros(1, 2**16, dtype=torch.int64)
    given = {"dtype": torch.float32, "compared": torch.float32, "prefixes": [0], "low": 15, "high": 31}
    entry_counts_(table, part.left, part.right, **given)
    assert (table.numpy() == cases.counts(whole, [0], 15, 31)).all() and table.sum() == 45 * n


def test_results_do_not_depend_on_threads_or_on_how_rows_are_cut(native, rng, threads):
    left = [torch.randn(150, 6, generator=rng, dtype=torch.float64) for _ in range(3)]
    right = [torch.randn(6, 1031, generator=rng, dtype=torch.float64) for _ in range(3)]
    parts = [Part(B, A, 1.0, 0.3, 0.5, key=i) for i, (B, A) in enumerate(zip(left, right, strict=True))]
    options = {"limit": cases.LIMIT, "gain": cases.GAIN, "elect": True}
    found = []
    for count in (1, 2, 3):
        threads(count)
        table = torch.zeros(1, 2**16, dtype=torch.int64)
        entry_counts_(
            table, left[0], right[0], dtype=torch.float32, compared=torch.float32, prefixes=[0], low=15, high=31
        )
        whole = entry_merge(parts, 0, 150, **options)
        cut = torch.cat([entry_merge(parts, a, b, **options) for a, b in ((0, 1), (1, 18), (18, 150))])
        found.append((table, whole, cut))
    for table, whole, cut in found:
        assert torch.equal(whole, found[0][1]) and torch.equal(cut, whole) and torch.equal(table, found[0][0])


def test_nothing_kept_and_no_rows(path):
    parts = [dataclasses.replace(p, low=math.inf) for p in cases.parts(5, 9)]
    assert not entry_merge(parts, 0, 5).any() and entry_merge(parts, 0, 5).shape == (5, 9)
    assert entry_merge(cases.parts(5, 9), 2, 2).shape == (0, 9)
    tile = torch.zeros(0, 4)
    drop_rescale_(tile, 1, 0, 5, 1.0)
    none = Part(torch.zeros(4, 0, dtype=torch.float64), torch.zeros(0, 9, dtype=torch.float64))
    assert torch.equal(entry_merge([none], 0, 4, elect=True), torch.zeros(4, 9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: [], "do not fit together"),
        (lambda p: [p[0], Part(torch.ones(5, 9), None)], "do not fit together"),
        (lambda p: [p[0], dataclasses.replace(p[1], left=p[1].left[:4])], "shapes differ"),
        (lambda p: [dataclasses.replace(p[0], left=p[0].left.float())], "tensor left has the wrong dtype"),
        (lambda p: [dataclasses.replace(p[1], right=p[1].right[:3])], "tensor right has the wrong shape"),
        (lambda p: [Part(torch.ones(5, 9, dtype=torch.int32), None)], "tensor left has the wrong dtype"),
    ],
)
def test_merge_refuses_what_does_not_fit(path, change, words):
    with pytest.raises(LoraforgeError, match=words):
        entry_merge(change(cases.parts(5, 9)), 0, 4)


def test_numbers_out_of_range_are_refused(path):
    given = cases.parts(5, 9)
    for bad in ({"limit": SPAN + 1}, {"limit": -1}, {"dtype": torch.float16}):
        with pytest.raises(LoraforgeError, match="out of range|cannot have this dtype"):
            entry_merge(given, 0, 5, **bad)
    with pytest.raises(LoraforgeError, match="rows are out of range"):
        entry_merge(given, 3, 6)
    with pytest.raises(LoraforgeError, match="limit is out of range"):
        drop_rescale_(torch.ones(2, 2), 0, 0, SPAN, 1.0)
    f32 = torch.float32
    with pytest.raises(LoraforgeError, match="no such digit"):
        entry_counts_(torch.zeros(1, 2).long(), torch.ones(2, 2), None, dtype=f32, compared=f32, prefixes=[0], low=31, high=32)  # fmt: skip # noqa: E501
    with pytest.raises(LoraforgeError, match="counts has the wrong shape"):
        entry_counts_(torch.zeros(1, 5).long(), torch.ones(2, 2), None, dtype=f32, compared=f32, prefixes=[0], low=29, high=31)  # fmt: skip # noqa: E501

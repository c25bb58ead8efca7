"""The text of csrc/cuda/entrywise.cu on the thread emulator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from loraforge.kernels.entrywise import SPAN, Part, draw
from tests.kernels import entry_cases as cases
from tests.kernels.conftest import SIZES
from tests.kernels.emulator import emulate

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def merge(given: list[Part], start: int, stop: int, limit: int, gain: float, elect: bool, dtype, kind="plain"):
    inputs = {f"left{i}": p.left[start:stop] for i, p in enumerate(given)}
    inputs |= {f"right{i}": p.right for i, p in enumerate(given) if p.right is not None}
    rules = torch.tensor([[p.scaling, p.weight, p.low, p.high] for p in given], dtype=torch.float64)
    keys = torch.tensor([cases.halves(p.key) for p in given], dtype=torch.int64)
    numbers = {"n": given[0].shape[1], "wide": int(dtype == torch.float64), "limit": limit, "gain": gain}
    numbers |= {"first": start, "elect": int(elect)}
    return emulate("entry_merge", "entrywise", kind, rules=rules, keys=keys, **inputs, **numbers)["out"]


def check(given, start, stop, dtype, limit=SPAN, gain=1.0, elect=False, kind="plain"):
    got = merge(given, start, stop, limit, gain, elect, dtype, kind)
    want = cases.merged(given, start, stop, limit, gain, elect, NUMPY[dtype])
    floor = 6 * torch.finfo(dtype).eps * np.abs(want).max(initial=1.0)
    assert got.dtype == dtype and np.abs(got.double().numpy() - want).max() <= floor


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_merge(n, elect, dtype):
    given = cases.parts(67, n, (1, 16, 21))
    check(given, 0, 67, dtype, SPAN, 1.0, elect)
    check(given, 3, 66, dtype, cases.LIMIT, cases.GAIN, elect)


@pytest.mark.parametrize("dense", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merge_of_dense_rows(dense):
    given = cases.parts(9, 129, dense=dense)
    for elect in (False, True):
        check(given, 0, 9, torch.float32, cases.LIMIT, cases.GAIN, elect)


@pytest.mark.parametrize("elect", [False, True])
def test_more_adapters_than_a_launch_takes(elect):
    given = cases.parts(5, 97, (1, 2, 3) * 12)
    check(given, 0, 5, torch.float32, cases.LIMIT, cases.GAIN, elect)
    check([dataclasses.replace(p, left=p.left @ p.right, right=None) for p in given], 0, 5, torch.float64, elect=elect)


def test_products_are_the_bits_of_the_cpu_operator(native, rng):
    """Sums over r by fused multiply-adds in order, in registers here and in lanes there."""
    from loraforge.kernels import entry_merge

    left = torch.randn(33, 19, generator=rng, dtype=torch.float64)
    right = torch.randn(19, 97, generator=rng, dtype=torch.float64)
    got = merge([Part(left, right)], 0, 33, SPAN, 1.0, False, torch.float64)
    # A CPU without fused multiply-adds rounds twice a term.
    noise = 2 * 19 * torch.finfo(torch.float64).eps * (left.abs() @ right.abs())
    assert ((got - entry_merge([Part(left, right)], 0, 33, dtype=torch.float64)).abs() <= noise).all()


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_merge_under_sanitizers(kind):
    given = cases.parts(67, 71, (1, 18))
    check(given, 0, 67, torch.float32, cases.LIMIT, cases.GAIN, True, kind)
    check(cases.parts(5, 71, (1,), dense=torch.bfloat16), 0, 5, torch.float32, cases.LIMIT, cases.GAIN, False, kind)


def counts(values, prefixes, low, high, compared, kind="plain"):
    """Of one tensor of rows, or of (left, right)."""
    left, right = values if isinstance(values, tuple) else (values, None)
    wide = left.dtype == torch.float64 and right is None
    return emulate(
        "entry_counts", "entrywise", kind, left=left, right=right, prefixes=torch.tensor(prefixes), low=low, high=high,
        wide=int(wide), compared_wide=int(compared == torch.float64),
    )["counts"]  # fmt: skip


@pytest.mark.parametrize("compared", list(NUMPY))
@pytest.mark.parametrize("entries", list(NUMPY))
def test_counts(entries, compared):
    values = np.resize(cases.numbers(40, NUMPY[entries]), (3, 71))
    values = np.where(np.abs(values) < 1e37, values, NUMPY[entries](0.3))
    with np.errstate(under="ignore"):
        seen = values.astype(NUMPY[compared])
    wide = compared == torch.float64
    prefix = int(np.abs(seen[:1, :1] * 0 + NUMPY[compared](0.5)).view(np.uint64 if wide else np.uint32)[0, 0])
    cuts = (([0], 47, 63), ([prefix >> 47, 0], 31, 47)) if wide else (([0, 0], 15, 31), ([prefix >> 15] * 9, 0, 15))
    for prefixes, low, high in cuts:
        got = counts(torch.from_numpy(values), prefixes, low, high, compared)
        assert (got.numpy() == cases.counts(seen, prefixes, low, high)).all()


@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
def test_counts_of_products(kind):
    part = cases.parts(67, 97, (18,))[0]
    whole = (part.left @ part.right).float().numpy()
    got = counts((part.left, part.right), [0], 15, 31, torch.float32, kind)
    assert (got.numpy() == cases.counts(whole, [0], 15, 31)).all()
    prefix = int(np.float32(1.5).view(np.uint32)) >> 15
    got = counts((part.left, part.right), [prefix, 3], 0, 15, torch.float32, kind)
    assert (got.numpy() == cases.counts(whole, [prefix, 3], 0, 15)).all()


def test_counts_far_below_the_largest():
    """Beyond what a block counts in shared memory."""
    values = torch.logspace(-37, 37, 640).reshape(10, 64)
    got = counts(values, [0], 15, 31, torch.float32)
    assert (got.numpy() == cases.counts(values.numpy(), [0], 15, 31)).all()


@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
@pytest.mark.parametrize(("n", "first"), [(1, 5), (7, 0), (97, 3), (129, 2**33)])
def test_drop_rescale(n, first, kind):
    key, tile = 0xFEDCBA98765432100123456789ABCDEF, torch.ones(5, n + 3)
    got = emulate(
        "drop_rescale", "entrywise", kind, tile=tile, n=n, key=torch.tensor(cases.halves(key)), first=first,
        limit=cases.LIMIT, gain=4.0,
    )["tile"]  # fmt: skip
    kept = draw(key, first * n, 5 * n).reshape(5, n) < cases.LIMIT
    assert (got[:, :n].numpy() == 4.0 * kept).all() and torch.equal(got[:, n:], tile[:, n:])

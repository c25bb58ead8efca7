"""The entry-wise operators on a GPU: the bits of the CPU ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraforge.kernels import drop_rescale_, entry_counts_, entry_merge
from loraforge.kernels.entrywise import SPAN, Part
from tests.kernels import entry_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on_gpu(part: Part) -> Part:
    return dataclasses.replace(part, left=part.left.cuda(), right=None if part.right is None else part.right.cuda())


@pytest.mark.parametrize("dense", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("n", [1, 97, 1031])
def test_merge_has_the_bits_of_the_cpu(n, elect, dense):
    given = cases.parts(301, n, (1, 16, 21) * 7, dense=dense)  # more than one launch takes
    for limit, dtype in ((SPAN, torch.float32), (cases.LIMIT, torch.float64)):
        options = {"limit": limit, "gain": 1.0, "elect": elect, "dtype": dtype}
        want = entry_merge(given, 3, 300, **options)
        assert torch.equal(entry_merge([on_gpu(p) for p in given], 3, 300, **options).cpu(), want)


def test_counts_and_draws_are_those_of_the_cpu():
    part = cases.parts(301, 1031, (18,))[0]
    for prefixes, low, high in (([0], 15, 31), ([0x3F800000 >> 15, 0x40000000 >> 15], 0, 15)):
        size = (len(prefixes), 1 << (high - low))
        tables = [torch.zeros(size, dtype=torch.int64, device=device) for device in ("cpu", "cuda")]
        for table, one in zip(tables, (part, on_gpu(part)), strict=True):
            entry_counts_(
                table, one.left, one.right, dtype=torch.float32, compared=torch.float32, prefixes=prefixes, low=low,
                high=high,
            )  # fmt: skip
        assert torch.equal(tables[0], tables[1].cpu()) and int(tables[0].sum()) > 0
    tile = torch.ones(301, 1031)
    other = tile.cuda()
    for one in (tile, other):
        drop_rescale_(one, 5 << 90, 7, cases.LIMIT, 3.0)
    assert torch.equal(tile, other.cpu())

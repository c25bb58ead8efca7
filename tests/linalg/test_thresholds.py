from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge.linalg.elements import deltas_of
from loraforge.linalg.thresholds import SHIFTS, Selection, kept_count, largest, thresholds_in
from loraforge.types import Dense, LayerInputs


def chunks(values: torch.Tensor, size: int = 7):
    return lambda: iter(values.split(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_sorting(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    values = (torch.randn(1000, generator=g, dtype=torch.float64) * torch.logspace(-40, 30, 1000).double()).to(dtype)
    want = values.abs().sort(descending=True).values
    ranks = [1, 2, 3, 500, 999, 1000]
    assert largest(chunks(values), ranks, dtype) == [float(want[k - 1]) for k in ranks]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.integers(0, 60),
    st.sampled_from(list(SHIFTS)),
)
def test_any_finite_values(values: list[float], k: int, dtype: torch.dtype) -> None:
    """Repeats, zeros of both signs, subnormal numbers; more asked for than there is counts as zeros."""
    found = largest(chunks(torch.tensor(values, dtype=dtype), 3), [k], dtype)[0]
    ordered = sorted(map(abs, values), reverse=True)
    assert found == (np.inf if k == 0 else ordered[k - 1] if k <= len(values) else 0.0)


def test_float32_entries_among_float64_ones() -> None:
    parts = [torch.tensor([0.1, 3.0]), torch.tensor([0.1, 0.2], dtype=torch.float64)]
    assert largest(lambda: parts, [1, 2, 3, 4], torch.float64) == [3.0, 0.2, float(torch.tensor(0.1)), 0.1]


def test_the_memory_does_not_grow_with_the_entries() -> None:
    selection = Selection()
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    while not selection.done:
        for block in values.split(100):
            before = block.clone()
            selection.add(block)
            assert torch.equal(block, before)
        assert [len(counts) for counts in selection._counts] in ([2**16], [2**15] * 2)
        selection.narrow([10, 4000])
    assert selection.passes == 2
    assert selection.values() == [float(values.abs().sort(descending=True).values[k - 1]) for k in (10, 4000)]


def test_counts() -> None:
    assert [kept_count(d, 10) for d in (0.0, 0.09, 0.1, 0.55, 1.0)] == [0, 0, 1, 5, 10]


def test_thresholds_of_a_module_leave_out_weights_and_keep_places() -> None:
    rows = [None, Dense(torch.tensor([[1.0, -4.0], [2.0, 3.0]]), 0.5), Dense(torch.tensor([[8.0, 7.0], [6.0, 5.0]]))]
    deltas = deltas_of(LayerInputs("m", rows, [1.0, -3.0, 0.1]))
    assert thresholds_in(deltas, [1, 3]) == [[0.0, 0.0], [2.0, 1.0], [8.0, 6.0]]

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge.linalg.elements import deltas_of
from loraforge.linalg.thresholds import (
    SHIFTS,
    WINDOW,
    Selection,
    kept_count,
    largest,
    thresholds_in,
    thresholds_over,
)
from loraforge.types import Dense, LayerInputs, LowRank


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
        assert [len(counts) for counts in selection._counts] in ([2**16 + 1], [2**15 + 1] * 2)
        selection.narrow([10, 4000])
    assert selection.passes == 2
    assert selection.values() == [float(values.abs().sort(descending=True).values[k - 1]) for k in (10, 4000)]


def test_counts() -> None:
    assert [kept_count(d, 10) for d in (0.0, 0.09, 0.1, 0.55, 1.0)] == [0, 0, 1, 5, 10]


def test_thresholds_of_a_module_leave_out_weights_and_keep_places() -> None:
    rows = [None, Dense(torch.tensor([[1.0, -4.0], [2.0, 3.0]]), 0.5), Dense(torch.tensor([[8.0, 7.0], [6.0, 5.0]]))]
    deltas = deltas_of(LayerInputs("m", rows, [1.0, -3.0, 0.1]))
    assert thresholds_in(deltas, [1, 3]) == [[0.0, 0.0], [2.0, 1.0], [8.0, 6.0]]


@pytest.mark.parametrize("away", [0.0, 0.003, -0.003, 0.5, -0.5])
def test_a_guess_changes_the_number_of_passes_and_nothing_else(away: float) -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(2))
    want = [float(values.abs().sort(descending=True).values[k - 1]) for k in (30, 12000)]
    selection, passes = Selection(), 0
    selection.expect(torch.tensor([v * (1 + away) for v in want]).view(torch.int32).tolist())
    while not selection.done:
        passes += 1
        for block in values.split(3000):
            selection.add(block)
        selection.narrow([30, 12000])
    assert selection.values() == want and passes == (1 if abs(away) < 0.1 else 3)


def test_windows_hold_what_is_expected_in_their_middle() -> None:
    for bits in (0, 1, 2**WINDOW, 0x3F800000 - 1, 0x3F800000, 0x7F7FFFFF):
        selection = Selection()
        selection.expect([bits])
        low, high = selection._windows[0] << WINDOW, (selection._windows[1] + 1) << WINDOW
        assert low <= bits < high and (bits - low >= 2 ** (WINDOW - 1) or low == 0) and high - bits >= 2 ** (WINDOW - 1)


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.1, 0.6, 1.0])
def test_thresholds_over_modules_that_are_large_enough_for_a_guess(density: float, monkeypatch) -> None:
    """Rows of unlike sizes, a module that an adapter lacks, one of many equal entries."""
    monkeypatch.setattr("loraforge.linalg.thresholds.SAMPLED", 2**13)
    monkeypatch.setattr("loraforge.linalg.thresholds.EVERY", 2)  # few entries: a good guess needs many of them
    g = torch.Generator().manual_seed(0)
    layers = []
    for index, (m, n) in enumerate([(640, 700), (300, 1100)]):
        scale = torch.rand(m, 1, generator=g)
        pair = LowRank(torch.randn(m, 4, generator=g) * scale, torch.randn(4, n, generator=g), 0.3)
        equal = LowRank(torch.ones(m, 1), torch.randint(-2, 3, (1, n), generator=g).float())
        layers.append(LayerInputs("m", [pair, equal if index else None], [1.0, 1.0]))
    passes = []

    def read():
        passes.append(1)
        return iter(layers)

    found = thresholds_over(read, density)
    assert len(passes) == (2 if density == 0.1 else 3)
    entries = 640 * 700 + 300 * 1100
    for adapter in range(2):
        deltas = [deltas_of(layer) for layer in layers]
        sizes = [
            t.abs().flatten().clone() for d in deltas for s in d.sources if s.index == adapter for _, t in d.tiles(s)
        ]
        ordered = torch.cat([*sizes, torch.zeros(entries - sum(len(s) for s in sizes))]).sort(descending=True).values
        k = kept_count(density, entries)
        assert found[adapter] == (float("inf") if k == 0 else float(ordered[k - 1]))

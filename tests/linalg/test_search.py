"""The descent on a grid: it finds the bottom of a basin and pays for every point once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge.linalg.search import descend_grid


def descend(table: np.ndarray, start: tuple[int, int]):
    calls: list[tuple[int, int]] = []

    def objective(row: int, column: int) -> float:
        calls.append((row, column))
        return float(table[row, column])

    best, seen = descend_grid(objective, *table.shape, start)
    return best, seen, calls


@st.composite
def basins(draw: st.DrawFn) -> np.ndarray:
    """A sum of two convex sequences: one basin, met along rows and columns."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    parts = []
    for size in (rows, columns):
        slopes = sorted(draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size, unique=True)))
        parts.append(np.cumsum(slopes))
    return parts[0][:, None] + parts[1][None, :]


@given(table=basins(), data=st.data())
def test_it_finds_the_least_value_of_a_basin(table: np.ndarray, data: st.DataObject) -> None:
    start = (data.draw(st.integers(0, table.shape[0] - 1)), data.draw(st.integers(0, table.shape[1] - 1)))
    best, seen, calls = descend(table, start)
    assert table[best] == table.min()
    assert len(calls) == len(set(calls)), "a point was evaluated twice"
    assert seen == {point: float(table[point]) for point in calls}


@given(seed=st.integers(0, 10_000), data=st.data())
def test_on_any_table_no_neighbour_is_better(seed: int, data: st.DataObject) -> None:
    table = np.random.default_rng(seed).normal(size=(5, 4))
    start = (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3)))
    (r, c), seen, calls = descend(table, start)
    around = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    inside = [p for p in around if 0 <= p[0] < 5 and 0 <= p[1] < 4]
    assert all(table[r, c] <= table[p] for p in inside)
    assert table[r, c] <= table[start] and set(inside) <= set(seen)
    assert len(calls) == len(set(calls))


def test_a_flat_table_stays_where_it_began() -> None:
    best, seen, _ = descend(np.zeros((4, 4)), (2, 1))
    assert best == (2, 1) and len(seen) == 5


def test_one_point() -> None:
    assert descend(np.ones((1, 1)), (0, 0))[:2] == ((0, 0), {(0, 0): 1.0})


@pytest.mark.parametrize("start", list(itertools.product((0, 7, 14), (0, 2, 4))))
def test_it_looks_at_less_than_half_of_the_grid_of_alpha_and_rho(start: tuple[int, int]) -> None:
    """What the search is for: 15 x 5 pairs, of which a descent from anywhere needs a part."""
    rows, columns = np.arange(15)[:, None], np.arange(5)[None, :]
    table = (rows - 9) ** 2 + 3.0 * (columns - 1) ** 2
    best, seen, _ = descend(table, start)
    assert best == (9, 1) and len(seen) < 75 / 2

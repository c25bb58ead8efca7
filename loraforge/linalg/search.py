"""Search of a grid by steps to the best neighbour."""

from __future__ import annotations

from collections.abc import Callable


def descend_grid(
    objective: Callable[[int, int], float], rows: int, columns: int, start: tuple[int, int]
) -> tuple[tuple[int, int], dict[tuple[int, int], float]]:
    """The grid point that no neighbour along a row or column improves, reached from `start`.

    Each point is evaluated once. On a surface with one basin this is the grid's minimum.

    Args:
        objective: Value at (row, column).
        rows: Number of rows.
        columns: Number of columns.
        start: Where to begin.

    Returns:
        The best point and all values seen.
    """
    seen: dict[tuple[int, int], float] = {}

    def value(point: tuple[int, int]) -> float:
        if point not in seen:
            seen[point] = objective(*point)
        return seen[point]

    best = start
    while True:
        r, c = best
        around = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        inside = [p for p in around if 0 <= p[0] < rows and 0 <= p[1] < columns]
        nearest = min([best, *inside], key=value)
        if nearest == best:
            return best, seen
        best = nearest

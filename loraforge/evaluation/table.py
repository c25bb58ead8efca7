"""The table of rows x tasks: averages, shares of each task's own adapter, differences; all JSON-ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraforge.evaluation.intervals import Interval, percentile_interval
from loraforge.evaluation.metrics import METRICS
from loraforge.evaluation.score import TaskScore

Cells = Mapping[str, TaskScore | str]


def cell_record(cell: TaskScore | str, head: str | None, *, outcomes: bool = False) -> dict[str, Any]:
    """One cell: the score with its interval, or why there is none.

    Args:
        cell: The score, or the reason that there is none.
        head: Where the head came from.
        outcomes: Keep what each row was predicted and scored.
    """
    if isinstance(cell, str):
        return {"value": None, "reason": cell}
    found: dict[str, Any] = {
        "value": cell.value,
        "interval": cell.intervals.get(cell.main),
        "n": cell.n,
        "metrics": cell.metrics,
        "intervals": cell.intervals,
        "head": head,
        "seconds": round(cell.seconds, 3),
    }
    if cell.reasons:
        found |= {"reasons": cell.reasons, "reason": cell.reasons.get(cell.main)}
    if outcomes:
        found |= {"outcomes": cell.outcomes, "predictions": cell.predictions}
    return found


def averages(cells: Cells, own: Cells) -> dict[str, Any]:
    """The mean over the tasks, and the mean of the shares of each task's own adapter; with intervals, or the reason.

    The interval is that of independent tasks: each task's resampled scores, averaged draw by draw.

    Args:
        cells: Task -> score of a row.
        own: Task -> score of the task's own adapter.
    """
    found: dict[str, Any] = dict.fromkeys(("average", "average_interval", "normalised", "normalised_interval"))
    missing = [task for task, cell in cells.items() if _value(cell) is None]
    if missing:
        return found | {"average_reason": f"no score on {', '.join(missing)}"}
    scores = {task: cell for task, cell in cells.items() if isinstance(cell, TaskScore)}
    lower = {METRICS[score.main].lower_is_better for score in scores.values()}
    if len(lower) > 1:
        found["average_reason"] = "perplexities and shares have no common mean"
    else:
        found["average"] = float(np.mean([score.value for score in scores.values()]))
        found["average_interval"] = _interval([score.draws for score in scores.values()])
    without = [task for task in scores if not (_value(own.get(task)) or 0) > 0]
    if without:
        return found | {"normalised_reason": f"no adapter of its own with a score above 0 for {', '.join(without)}"}
    pairs = [(score, own[task]) for task, score in scores.items()]
    found["normalised"] = float(np.mean([_ratio(a.value, b.value, a.main) for a, b in pairs]))  # type: ignore[union-attr]
    found["normalised_interval"] = _interval([_ratio(a.draws, b.draws, a.main) for a, b in pairs])  # type: ignore[union-attr]
    return found


def differences(rows: Mapping[str, Cells], against: str) -> list[dict[str, Any]]:
    """Every row minus one of them, task by task and on average, over the same rows of data.

    Args:
        rows: Row -> task -> score.
        against: The row that the others are compared with.
    """
    found: list[dict[str, Any]] = []
    other = rows[against]
    for name, cells in rows.items():
        if name == against:
            continue
        shared = [task for task in cells if _value(cells[task]) is not None and _value(other[task]) is not None]
        apart = {task: _minus(cells[task], other[task]) for task in shared}
        for task, (difference, drawn) in apart.items():
            found.append(_difference(name, against, task, difference, percentile_interval(drawn)))
        mains = {METRICS[cells[task].main].lower_is_better for task in shared}  # type: ignore[union-attr]
        if len(shared) == len(cells) > 1 and len(mains) == 1:
            mean = float(np.mean([difference for difference, _ in apart.values()]))
            interval = _interval([drawn for _, drawn in apart.values()])
            found.append(_difference(name, against, "average", mean, interval))
    return found


def _difference(row: str, against: str, task: str, value: float, interval: Interval | None) -> dict[str, Any]:
    return {"row": row, "against": against, "task": task, "difference": value, "interval": interval}


def _minus(cell: Any, other: Any) -> tuple[float, NDArray[np.float64]]:
    return cell.value - other.value, cell.draws - other.draws


def _value(cell: TaskScore | str | None) -> float | None:
    return cell.value if isinstance(cell, TaskScore) else None


def _ratio(value: Any, own: Any, metric: str) -> Any:
    """The share of the own adapter's score that is reached; of a perplexity the inverse, so that more is better."""
    above, below = (own, value) if METRICS[metric].lower_is_better else (value, own)
    whole = np.asarray(below, dtype=np.float64)
    return np.divide(above, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _interval(drawn: Sequence[NDArray[np.float64]]) -> Interval | None:
    return percentile_interval(np.mean(np.stack(drawn), axis=0))

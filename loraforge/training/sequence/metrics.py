"""What a score matrix says about a sequence: accuracy, forgetting, transfer. Plain numbers, torch-free.

R[k][i] is the score on task i after training task k (both from 0 here), N tasks, b_i the untrained base's score:

- acc = mean_i R[N-1][i] (last row; also called Last, OP);
- avg = mean over k of mean_{i<=k} R[k][i];
- bwt = mean_{i<N-1} (R[N-1][i] - R[i][i]);
- fwt = mean_{i>0} (R[i-1][i] - b_i);
- forgetting = mean_{i<N-1} (max_{i<=k<N-1} R[k][i] - R[N-1][i]): the best an earlier row had, so a gain is negative;
- learning_acc = mean_i R[i][i];
- intransigence = mean_i (single_i - R[i][i]), where single_i is the score of task i trained alone.

Sources differ in these definitions: some take the last row into the maximum of forgetting (never negative then), some
subtract a constant in fwt. forgetting is not -bwt: a task that gained and then lost has both above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loraforge.errors import LoraforgeError, raise_problems

NAMES = ("acc", "avg", "bwt", "forgetting", "fwt", "learning_acc", "intransigence")
Scores = Sequence[float | None]


def cl_metrics(
    matrix: Sequence[Scores], base: Scores | None = None, single: Scores | None = None
) -> dict[str, float | None]:
    """The metrics of one adapter over a sequence.

    Args:
        matrix: N rows (after each task) of N scores (tasks in training order), higher is better. A score of a task that
            is not trained yet (i > k) may be None.
        base: N scores of the untrained base, for `fwt`.
        single: N scores of tasks trained alone, for `intransigence`.

    Returns:
        NAMES to value; None where a metric is undefined (one task: bwt, forgetting, fwt) or its scores are not there.

    Raises:
        LoraforgeError: The matrix is not square, or lacks a score of a task that was trained by then. A missing score
            is never taken for 0.
    """
    count = len(matrix)
    _check(matrix, base, single)
    seen = [[_number(value) for value in row[: k + 1]] for k, row in enumerate(matrix)]
    last, own = seen[-1], [row[-1] for row in seen]
    found: dict[str, float | None] = dict.fromkeys(NAMES)
    found |= {"acc": _mean(last), "avg": _mean([_mean(row) for row in seen]), "learning_acc": _mean(own)}
    if count > 1:
        found["bwt"] = _mean([last[i] - own[i] for i in range(count - 1)])
        best = [max(seen[k][i] for k in range(i, count - 1)) for i in range(count - 1)]
        found["forgetting"] = _mean([top - now for top, now in zip(best, last, strict=False)])
    ahead = [matrix[i - 1][i] for i in range(1, count)]
    if count > 1 and base is not None and not any(_absent(value) for value in (*ahead, *base[1:])):
        found["fwt"] = _mean([_number(a) - _number(b) for a, b in zip(ahead, base[1:], strict=True)])
    if single is not None and not any(_absent(value) for value in single):
        found["intransigence"] = _mean([_number(alone) - learnt for alone, learnt in zip(single, own, strict=True)])
    return found


def row_metrics(scores: Scores, own: bool = False) -> dict[str, float | None]:
    """The metrics of methods without an order of tasks: their mean score, everything else undefined.

    Args:
        scores: One score a task: of the jointly trained adapter, or of each task's own.
        own: Each score comes from the adapter trained on that task alone, so that the mean is `learning_acc` too.

    Raises:
        LoraforgeError: A score is missing.
    """
    raise_problems([_missing(len(scores) - 1, i) for i, value in enumerate(scores) if _absent(value)])
    mean = _mean([_number(value) for value in scores])
    return dict.fromkeys(NAMES) | {"acc": mean, "learning_acc": mean if own else None}


def _check(matrix: Sequence[Scores], base: Scores | None, single: Scores | None) -> None:
    count = len(matrix)
    if count == 0:
        raise LoraforgeError("the score matrix is empty", expected="a row of scores after each task")
    problems = [
        LoraforgeError(f"row {k} of the score matrix has another length", got=len(row), expected=f"{count} tasks")
        for k, row in enumerate(matrix)
        if len(row) != count
    ]
    for name, row in (("base", base), ("single", single)):
        if row is not None and len(row) != count:
            problems.append(LoraforgeError(f"the {name} scores have another length", got=len(row), expected=count))
    if not problems:
        problems = [_missing(k, i) for k, row in enumerate(matrix) for i in range(k + 1) if _absent(row[i])]
    raise_problems(problems)


def _missing(k: int, i: int) -> LoraforgeError:
    return LoraforgeError(
        f"the score on task {i + 1} after task {k + 1} is missing",
        where="the score matrix",
        expected="a number: a missing score is not counted as 0",
        hint="loraforge cl-eval RUN measures what is missing; a metric may also be undefined on these rows",
    )


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _number(value: float | None) -> float:
    if value is None:
        raise TypeError("an absent score was not caught before")
    return float(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

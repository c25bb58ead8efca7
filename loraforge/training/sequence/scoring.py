"""Scores of a model's adapters on every task of a sequence, dealt out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from loraforge.evaluation.score import TaskScore, score_task
from loraforge.tasks import TaskData
from loraforge.training.ilora.adapters import active
from loraforge.training.ranks import gather, rank, world

Progress = Callable[[str, str, int, int], None]
# Resamplings of the intervals beside a score that is no share of rows.
DRAWS = 1000


def score_adapters(
    model: nn.Module,
    adapters: Iterable[str],
    tasks: Sequence[TaskData],
    *,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    stage: str = "score",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Each adapter's score on each task: {adapter: {task: {score, metric, metrics, interval, n, seconds}}}.

    Args:
        model: A PeftModel with these adapters, or the plain base under the name `base`.
        adapters: Names; the model is left with the adapter that was active.
        tasks: The rows to score on.
        tokenizer: For generated answers.
        settings: The `eval` section of a sequence.
        seed: Of the bootstrap.
        stage: What progress calls it.
        progress: Called after every task.
    """
    options = {key: value for key, value in (settings or {}).items() if key not in ("adapters", "limit") and value}
    jobs = [(adapter, data) for adapter in adapters for data in tasks]
    mine: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (adapter, data) in enumerate(jobs):
        if number % world() != rank():
            continue
        with _with_adapter(model, adapter):
            score = score_task(model, data, tokenizer=tokenizer, seed=seed, draws=DRAWS, **options)
        mine[adapter, data.spec.id] = _record(score)
        if progress is not None:
            progress(stage, f"{adapter}: {data.spec.id}", number + 1, len(jobs))
    found: dict[str, dict[str, Any]] = {adapter: {} for adapter, _ in jobs}
    every = {key: value for part in gather(mine) for key, value in part.items()}
    for adapter, data in jobs:
        found[adapter][data.spec.id] = every[adapter, data.spec.id]
    return found


def _with_adapter(model: nn.Module, adapter: str) -> AbstractContextManager[Any]:
    """The time in which an adapter acts; `default` is the active one, and the plain base has none."""
    return active(model, adapter) if adapter == "ema" else nullcontext()


def _record(score: TaskScore) -> dict[str, Any]:
    """A score as a file keeps it. Without the time, so that equal runs write equal files."""
    interval = score.intervals.get(score.main)
    return {
        "score": score.value,
        "metric": score.main,
        "interval": None if interval is None else list(interval),
        "n": score.n,
        "metrics": score.metrics,
        **({"reasons": score.reasons} if score.reasons else {}),
    }

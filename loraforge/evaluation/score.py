"""Scores one model on one task: predictions, metrics, intervals."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.evaluation.batches import Progress, forward_options, plain_model, run_batches
from loraforge.evaluation.generation import generate
from loraforge.evaluation.intervals import DRAWS, Interval, percentile_interval, resample, wilson
from loraforge.evaluation.likelihood import CHOICE_MODES, choose, row_losses
from loraforge.evaluation.metrics import LABELLED, TEXT, Metric, Undefined, metrics_for
from loraforge.tasks import Collator, TaskData, pad_token_id_of

# Answers may be this much longer than the longest reference before they are cut.
_ROOM, _LEAST_NEW_TOKENS = 2, 16


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What one model reached on one task.

    Attributes:
        task: Id of the task.
        kind: Its kind.
        n: Rows.
        metrics: Metric -> value, None where it is undefined on these rows.
        intervals: Metric -> 95 % interval, of those that have one.
        main: The metric that stands for the task.
        outcomes: Score of each row by the main metric where that is a mean of rows, else empty.
        predictions: Label, text or index of the choice that was predicted, by row.
        seconds: Wall time.
        reasons: Metric -> why it has no value.
        draws: The main metric on resampled rows (the same rows for every model), for differences; empty if undefined.
    """

    task: str
    kind: str
    n: int
    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    main: str
    outcomes: list[float]
    predictions: list[Any]
    seconds: float
    reasons: dict[str, str] = field(default_factory=dict)
    draws: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def value(self) -> float | None:
        """The main metric."""
        return self.metrics[self.main]


def score_task(
    model: nn.Module,
    data: TaskData,
    *,
    metrics: str | Sequence[str] | None = None,
    batch_tokens: int = 4096,
    device: str | torch.device | None = None,
    max_new_tokens: int | None = None,
    choice_mode: str = "answer-mean",
    tokenizer: Any = None,
    progress: Progress | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskScore:
    """Scores a model, with whatever adapter is active in it, on a task.

    Classes are told apart by the largest logit among the task's own positions in the head. Texts are generated
    greedily, choices and perplexities come from token losses.

    Args:
        model: A model of the task's kind; put into evaluation mode for the time, its mode is restored.
        data: The task's rows.
        metrics: Names, the main one first; default the task's own, else its kind's.
        batch_tokens: Tokens a forward pass.
        device: Where to put the model first; default: it stays where it is.
        max_new_tokens: Where answers are cut; default the task's own, else twice the longest reference, at least 16.
        choice_mode: One of likelihood.CHOICE_MODES.
        tokenizer: Needed to generate.
        progress: Called with (stage, task, rows done, rows).
        seed: Of the rows that the bootstrap draws.
        draws: How many times it draws.

    Raises:
        UsageError: An unknown metric, or one that this kind of task does not have; an unknown choice mode.
        LoraforgeError: The model's outputs are not finite or have not the task's classes; it cannot generate.
    """
    if choice_mode not in CHOICE_MODES:
        raise UsageError(f"unknown choice mode '{choice_mode}'", hint=did_you_mean(choice_mode, CHOICE_MODES))
    if not len(data):
        raise LoraforgeError("the task has no rows to score", where=f"{data.spec.id}, {data.split}")
    names = [metrics] if isinstance(metrics, str) else list(metrics or data.spec.metrics)
    wanted = metrics_for(data.kind, names or _default(data), where=data.spec.id)
    started = time.perf_counter()
    run = _Run(model if device is None else model.to(device), data, batch_tokens, progress)
    with _evaluating(model):
        predictions, losses = _predict(run, wanted, choice_mode, tokenizer, max_new_tokens)
    key = [seed, zlib.crc32(data.spec.id.encode())]
    found = _Found()
    for metric in wanted:
        found.add(metric, *_columns(metric, data, predictions, losses), key, draws, main=metric is wanted[0])
    return TaskScore(
        data.spec.id, data.kind, len(data), found.values, found.intervals, wanted[0].name, found.outcomes,
        _readable(data, predictions), time.perf_counter() - started, found.reasons, found.draws,
    )  # fmt: skip


class _Found:
    """The metrics of one model on one task while they are computed."""

    def __init__(self) -> None:
        self.values: dict[str, float | None] = {}
        self.intervals: dict[str, Interval] = {}
        self.reasons: dict[str, str] = {}
        self.outcomes: list[float] = []
        self.draws: NDArray[np.float64] = np.empty(0)

    def add(
        self,
        metric: Metric,
        references: Sequence[Any],
        predictions: Sequence[Any],
        labels: Sequence[Any] | None,
        key: Sequence[int],
        draws: int,
        *,
        main: bool,
    ) -> None:
        name, n = metric.name, len(references)
        try:
            prepared = metric.on(references, predictions, labels)
        except Undefined as undefined:
            self.values[name], self.reasons[name] = None, str(undefined)
            return
        self.values[name] = value = float(prepared.statistic(np.arange(n)[None])[0])
        drawn = np.empty(0) if metric.share and not main else resample(prepared.statistic, n, key, draws)
        # Draws that are all equal (nothing but zeros, say) tell nothing of what other rows would give.
        varied = len(drawn) > 0 and drawn.min() < drawn.max()
        interval = wilson(round(value * n), n) if metric.share else percentile_interval(drawn) if varied else None
        if interval is not None:
            self.intervals[name] = interval
        if main:
            self.draws = drawn
            self.outcomes = [] if prepared.rows is None else prepared.rows.tolist()


@dataclass(frozen=True, slots=True)
class _Run:
    """A model, a task, and how to run one on the other."""

    model: nn.Module
    data: TaskData
    batch_tokens: int
    progress: Progress | None

    def passing(self, total: int) -> dict[str, Any]:
        """What every way of scoring takes."""
        progress, task = self.progress, self.data.spec.id
        tick = None if progress is None else lambda done: progress("scoring", task, done, total)
        return {"batch_tokens": self.batch_tokens, "tick": tick}


def _default(data: TaskData) -> list[str]:
    """Perplexity for plain text, which answers nothing; else the kind's default."""
    return ["perplexity"] if data.kind == "causal" and data.texts == data.references else []


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _predict(
    run: _Run, wanted: Sequence[Metric], choice_mode: str, tokenizer: Any, max_new_tokens: int | None
) -> tuple[list[Any], list[Any]]:
    """The prediction of each row, and its loss where perplexity is wanted."""
    data, where = run.data, f"{run.data.source}"
    if data.kind in LABELLED:
        return _classify(run), []
    if data.kind == "choice":
        choices = data.choices or []
        total = sum(map(len, choices))
        return choose(run.model, choices, choice_mode, where=where, **run.passing(total)), []
    losses: list[Any] = []
    predictions: list[Any] = []
    if any(metric.name == "perplexity" for metric in wanted):
        losses = row_losses(run.model, data.examples, where=where, **run.passing(len(data)))
    if any(metric.name != "perplexity" for metric in wanted):
        if tokenizer is None:
            raise LoraforgeError("answers are generated, and that needs a tokenizer", where=data.spec.id)
        prompts = data.prompts if data.prompts is not None else data.examples
        new = max_new_tokens or data.spec.max_new_tokens or _new_tokens(data)
        predictions = generate(
            run.model, prompts, tokenizer, max_new_tokens=new, where=where, **run.passing(len(prompts))
        )  # fmt: skip
    return predictions, losses


def _new_tokens(data: TaskData) -> int:
    """Room for an answer longer than any reference: a cut answer is then wrong anyway."""
    longest = max(int((example["labels"] != -100).sum()) for example in data.examples)
    return max(_LEAST_NEW_TOKENS, _ROOM * longest)


def _classify(run: _Run) -> list[int]:
    """The position in the head of each row's class."""
    data, options = run.data, forward_options(run.model)
    positions = torch.tensor(data.label_ids, device=next(run.model.parameters()).device)

    def forward(batch: dict[str, Tensor]) -> list[int]:
        batch.pop("labels", None)
        logits = run.model(**batch, **options).logits
        if logits.shape[1] <= int(positions.max()):
            raise LoraforgeError(
                "the model's head has fewer rows than the task's classes need", where=data.spec.id,
                got=f"{logits.shape[1]} rows", expected=f"position {int(positions.max())} and {len(positions)} classes",
            )  # fmt: skip
        scores = logits[:, positions].float()
        if not bool(torch.isfinite(scores).all()):
            raise LoraforgeError("the model's logits are not finite", where=data.spec.id)
        found: list[int] = positions[scores.argmax(dim=1)].tolist()
        return found

    collator = Collator(data.kind, pad_token_id_of(None, plain_model(run.model).config))
    return run_batches(run.model, forward, data.examples, collator, **run.passing(len(data)))


def _columns(
    metric: Metric, data: TaskData, predictions: list[Any], losses: list[Any]
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any] | None]:
    """References, predictions and classes as a metric wants them."""
    if metric.name == "perplexity":
        return [row.answer_tokens for row in losses], [row.answer for row in losses], None
    if data.kind in TEXT:
        return data.references, predictions, None
    if metric.name in ("spearman", "pearson") and data.kind in LABELLED:
        number = _label_numbers(data)
        return [number[i] for i in data.references], [number[i] for i in predictions], None
    return data.references, predictions, data.label_ids or None


def _label_numbers(data: TaskData) -> dict[int, float]:
    """Head position -> the number that its label is, or its place among the labels where they are no numbers."""
    try:
        numbers = [float(name) for name in data.labels]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        numbers = [float(i) for i in range(len(data.label_ids))]
    return dict(zip(data.label_ids, numbers, strict=True))


def _readable(data: TaskData, predictions: list[Any]) -> list[Any]:
    """Labels by name; texts and indices as they are."""
    if data.kind not in LABELLED:
        return predictions
    names = dict(zip(data.label_ids, data.labels, strict=True))
    return [names[i] for i in predictions]

"""Metrics of task predictions. Where one has no value that is said, with the reason: never NaN or a made-up 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from loraforge.errors import UsageError, did_you_mean
from loraforge.evaluation.intervals import Statistic

Floats = NDArray[np.float64]
LABELLED, CHOICE, TEXT = ("classification", "images"), ("choice",), ("causal", "text-to-text")


class Undefined(ValueError):
    """A metric has no value on these rows; the message says why."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A metric on one set of rows.

    Attributes:
        statistic: The metric of any selection of the rows.
        rows: The score of each row (n,), where the metric is their mean; else None.
    """

    statistic: Statistic
    rows: Floats | None = None

    @classmethod
    def mean_of(cls, rows: Floats) -> Prepared:
        """The metric that is the mean of row scores."""
        return cls(lambda index: rows[index].mean(axis=1), rows)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; calling it with references and predictions gives its value.

    Attributes:
        name: Its name in options and results.
        title: Its name for people.
        kinds: Kinds of tasks that have it.
        prepare: (references, predictions, labels) -> the metric on these rows; raises Undefined.
        share: Whether it is a share of rows that are right.
        lower_is_better: True for perplexity.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    prepare: Callable[[Sequence[Any], Sequence[Any], Sequence[Any] | None], Prepared]
    share: bool = False
    lower_is_better: bool = False

    def on(
        self, references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None = None
    ) -> Prepared:
        """The metric on these rows.

        Raises:
            Undefined: It has no value on them.
            ValueError: Different numbers of references and predictions.
        """
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references, {len(predictions)} predictions")
        if not len(references):
            raise Undefined("there are no rows")
        return self.prepare(references, predictions, labels)

    def __call__(
        self, references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None = None
    ) -> float:
        """The value on all rows; raises as `on` does."""
        prepared = self.on(references, predictions, labels)
        return float(prepared.statistic(np.arange(len(references))[None])[0])


def _accuracy(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """Share of rows that are equal; texts up to white space around and between words."""
    pairs = zip(references, predictions, strict=True)
    return Prepared.mean_of(np.array([_plain(a) == _plain(b) for a, b in pairs], dtype=np.float64))


def _plain(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


def _f1_macro(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """Unweighted mean over the classes of 2 TP / (references + predictions)."""
    classes, truth, guess = _codes(references, predictions, labels)
    absent = [str(name) for i, name in enumerate(classes) if not ((truth == i) | (guess == i)).any()]
    if absent:
        raise Undefined(f"no row has the class {', '.join(absent)}, and none was predicted: its F1 is 0/0")

    def statistic(index: NDArray[np.int64]) -> Floats:
        counts = _counts(truth[index], guess[index], len(classes))
        hits, both = counts.hits[:, :-1], (counts.truth + counts.guess)[:, :-1]
        # In a draw that lacks a class the mean is over those that it has.
        scores = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
        found: Floats = scores.sum(axis=1) / (both > 0).sum(axis=1)
        return found

    return Prepared(statistic)


def _mcc(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 for constant predictions, as is usual."""
    classes, truth, guess = _codes(references, predictions, labels)
    if (truth == truth[0]).all():
        raise Undefined(f"every row is of the class {classes[truth[0]]}")

    def statistic(index: NDArray[np.int64]) -> Floats:
        counts, n = _counts(truth[index], guess[index], len(classes)), index.shape[1]
        above = counts.hits.sum(axis=1) * n - (counts.truth * counts.guess).sum(axis=1)
        spread_truth, spread_guess = (n * n - (c * c).sum(axis=1) for c in (counts.truth, counts.guess))
        below = np.sqrt(spread_truth * spread_guess)
        found = np.divide(above, below, out=np.zeros_like(below), where=below > 0)
        found[spread_truth == 0] = np.nan
        return found

    return Prepared(statistic)


def _codes(
    references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None
) -> tuple[list[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The classes, and both columns as numbers of them; a prediction that is none of them gets the last number."""
    truth, guess = [_plain(value) for value in references], [_plain(value) for value in predictions]
    classes = list(dict.fromkeys(labels)) if labels is not None else sorted(set(truth))
    number = {name: i for i, name in enumerate(classes)}
    return (
        classes,
        np.array([number[value] for value in truth], dtype=np.int64),
        np.array([number.get(value, len(classes)) for value in guess], dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    """(draws, classes + 1) rows of each class that are right, that there are, that were predicted."""

    hits: Floats
    truth: Floats
    guess: Floats


def _counts(truth: NDArray[np.int64], guess: NDArray[np.int64], classes: int) -> _Counts:
    width = classes + 1
    start = np.arange(len(truth))[:, None] * width

    def count(codes: NDArray[np.int64], weights: Floats | None = None) -> Floats:
        flat = None if weights is None else weights.ravel()
        found = np.bincount((codes + start).ravel(), flat, minlength=len(truth) * width)
        return found.reshape(len(truth), width).astype(np.float64)

    return _Counts(count(truth, (truth == guess).astype(np.float64)), count(truth), count(guess))


def _pearson(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """Correlation of two columns of numbers."""
    x, y = _numbers(references, "references"), _numbers(predictions, "predictions")
    return Prepared(lambda index: _correlation(x[index], y[index]))


def _spearman(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """Correlation of the ranks, equal values sharing their mean rank."""
    x, y = _numbers(references, "references"), _numbers(predictions, "predictions")
    return Prepared(lambda index: _correlation(rankdata(x[index], axis=1), rankdata(y[index], axis=1)))


def _numbers(values: Sequence[Any], what: str) -> Floats:
    numbers, bad = [], 0
    for value in values:
        try:
            numbers.append(float(value))
        except ValueError:
            bad += 1
    if bad or not np.isfinite(numbers).all():
        raise Undefined(f"{bad or 'some'} of {len(values)} {what} are no numbers")
    if len(set(numbers)) < 2:
        raise Undefined(f"the {what} are constant")
    return np.array(numbers)


def _correlation(x: Floats, y: Floats) -> Floats:
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    below = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), below, out=np.full(len(x), np.nan), where=below > 0)


def _rouge(name: str) -> Callable[[Sequence[Any], Sequence[Any], Sequence[Any] | None], Prepared]:
    def prepare(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
        """Mean F1 of the overlap (Lin 2004), by rouge_score without stemming."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], tokenizer=_Words())
        pairs = zip(references, predictions, strict=True)
        return Prepared.mean_of(np.array([scorer.score(a, b)[name].fmeasure for a, b in pairs]))

    return prepare


class _Words:
    """The words of rouge_score on ASCII text; other letters count too, and every Chinese or Japanese sign is a word."""

    _WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in small letters."""
        return self._WORD.findall(text.lower())


def _perplexity(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None) -> Prepared:
    """exp(loss / tokens), summed over all rows: references are the rows' tokens, predictions their losses (nats)."""
    tokens, losses = np.asarray(references, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if not tokens.sum():
        raise Undefined("no token is predicted")

    def statistic(index: NDArray[np.int64]) -> Floats:
        count = tokens[index].sum(axis=1)
        mean = np.divide(losses[index].sum(axis=1), count, out=np.full(len(index), np.nan), where=count > 0)
        # Beyond float64 there is no perplexity that could be shown; the loss itself would be above 700 nats a token.
        return np.exp(np.minimum(mean, 700.0))

    return Prepared(statistic)


accuracy = Metric("accuracy", "accuracy", LABELLED + CHOICE + TEXT, _accuracy, share=True)
exact_match = Metric("exact_match", "exact match", TEXT, _accuracy, share=True)
f1_macro = Metric("f1_macro", "macro F1", LABELLED + TEXT, _f1_macro)
mcc = Metric("mcc", "Matthews correlation", LABELLED + TEXT, _mcc)
spearman = Metric("spearman", "Spearman correlation", LABELLED + TEXT, _spearman)
pearson = Metric("pearson", "Pearson correlation", LABELLED + TEXT, _pearson)
rouge1 = Metric("rouge1", "ROUGE-1", TEXT, _rouge("rouge1"))
rouge2 = Metric("rouge2", "ROUGE-2", TEXT, _rouge("rouge2"))
rougeL = Metric("rougeL", "ROUGE-L", TEXT, _rouge("rougeL"))
perplexity = Metric("perplexity", "perplexity", TEXT, _perplexity, lower_is_better=True)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (accuracy, f1_macro, mcc, spearman, pearson, exact_match, rouge1, rouge2, rougeL, perplexity)
}


def default_metric(kind: str) -> str:
    """The main metric of a kind of task where none was named: exact match of texts, accuracy of everything else."""
    return "exact_match" if kind in TEXT else "accuracy"


def metrics_for(kind: str, names: Sequence[str], where: object = None) -> list[Metric]:
    """The metrics of these names, the main one first; the kind's default where none is named.

    Raises:
        UsageError: A name that is unknown, or that this kind of task does not have.
    """
    known = [metric.name for metric in METRICS.values() if kind in metric.kinds]
    for name in names:
        if name not in known:
            what = f"a task of kind {kind} has no metric '{name}'" if name in METRICS else f"unknown metric '{name}'"
            raise UsageError(what, where=where, hint=did_you_mean(name, known))
    return [METRICS[name] for name in dict.fromkeys(names or [default_metric(kind)])]

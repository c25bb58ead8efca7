"""Metrics against scikit-learn, scipy and rouge_score; what has no value says why."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from loraforge.errors import UsageError
from loraforge.evaluation import metrics
from loraforge.evaluation.metrics import METRICS, Undefined, default_metric, metrics_for

DRAW = np.random.default_rng(5)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification_metrics_equal_those_of_scikit_learn(classes):
    truth = [*range(classes), *DRAW.integers(0, classes, 60).tolist()]
    guess = [value if DRAW.random() < 0.6 else int(DRAW.integers(0, classes)) for value in truth]
    assert metrics.accuracy(truth, guess) == pytest.approx(accuracy_score(truth, guess), abs=1e-12)
    assert metrics.f1_macro(truth, guess) == pytest.approx(f1_score(truth, guess, average="macro"), abs=1e-12)
    assert metrics.mcc(truth, guess) == pytest.approx(matthews_corrcoef(truth, guess), abs=1e-12)


def test_correlations_equal_those_of_scipy_with_ties():
    x = DRAW.integers(0, 6, 80).astype(float).tolist()
    y = (np.array(x) + DRAW.normal(size=80).round(1)).tolist()
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_correlations_read_numbers_out_of_texts():
    assert metrics.pearson(["1.0", "2.0", "4.0"], [" 2", "4", "8.0"]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_equals_rouge_score_on_english(name):
    truth = ["the cat sat on the mat", "A dog, barking loudly!", "one two_three four"]
    guess = ["the cat on the mat sat", "a dog barks", "four one two three"]
    scorer = RougeScorer([name])
    expected = np.mean([scorer.score(a, b)[name].fmeasure for a, b in zip(truth, guess, strict=True)])
    assert METRICS[name](truth, guess) == pytest.approx(expected, abs=1e-12)


def test_rouge_reads_other_alphabets():
    # rouge_score itself would see no word at all here.
    assert metrics.rouge1(["猫坐在垫子上"], ["猫在垫子上"]) == pytest.approx(2 * 5 / 11)
    assert metrics.rouge1(["für alle"], ["fur alle"]) == pytest.approx(0.5)


def test_exact_match_ignores_white_space_only():
    assert metrics.exact_match(["a b", "c", "D"], [" a   b ", "c\n", "d"]) == pytest.approx(2 / 3)


def test_perplexity_weighs_tokens_not_rows():
    assert metrics.perplexity([1, 3], [2.0, 3.0]) == pytest.approx(math.exp(5 / 4))


def test_f1_counts_answers_outside_of_the_classes_as_wrong():
    truth, guess = ["yes", "yes", "no", "no"], ["yes", "maybe", "no", "no"]
    expected = f1_score(truth, guess, average="macro", labels=["no", "yes"])
    assert metrics.f1_macro(truth, guess) == pytest.approx(expected)


def test_mcc_of_constant_predictions_is_0_as_in_scikit_learn():
    assert metrics.mcc([0, 1, 1, 0], [1, 1, 1, 1]) == 0.0


@pytest.mark.parametrize(
    ("name", "truth", "guess", "labels", "why"),
    [
        ("spearman", [1, 2, 3], [2, 2, 2], None, "predictions are constant"),
        ("pearson", [1, 1, 1], [1, 2, 3], None, "references are constant"),
        ("spearman", ["1", "2"], ["1", "none"], None, "1 of 2 predictions are no numbers"),
        ("pearson", ["1", "2"], ["1", "nan"], None, "no numbers"),
        ("mcc", [1, 1, 1], [0, 1, 1], [0, 1], "every row is of the class 1"),
        ("f1_macro", [0, 1], [0, 1], [0, 1, 2], "no row has the class 2"),
        ("perplexity", [0, 0], [0.0, 0.0], None, "no token"),
        ("accuracy", [], [], None, "no rows"),
    ],
)
def test_what_has_no_value_says_why(name, truth, guess, labels, why):
    with pytest.raises(Undefined, match=why):
        METRICS[name](truth, guess, labels)


def test_different_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="2 references, 1 predictions"):
        metrics.accuracy([1, 2], [1])


def test_every_kind_has_its_default():
    for kind in ("classification", "images", "causal", "text-to-text", "choice"):
        assert [m.name for m in metrics_for(kind, [])] == [default_metric(kind)]


def test_unknown_and_unfit_metrics_are_told_apart():
    with pytest.raises(UsageError, match="unknown metric 'acuracy'") as caught:
        metrics_for("classification", ["acuracy"])
    assert "did you mean 'accuracy'" in str(caught.value)
    with pytest.raises(UsageError, match="a task of kind classification has no metric 'rougeL'"):
        metrics_for("classification", ["accuracy", "rougeL"])

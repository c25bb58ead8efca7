"""Importance, gate gradients and Fisher numbers of a BERT against one that is written in numpy.

Words are numbered by hand here, gates are arrays, gradients central differences, everything float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from loraforge.measure.importance.gradients import gate_gradients, measure_fisher
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject
from tests.measure.oracle_subjects import CLOSE, LABELS, SLOPE, open_tiny, rows
from tests.oracles import heads_model as network
from tests.oracles import heads_stats as oracle
from tests.tasks.tiny import CLS, SEP, SPECIAL, WORDS

# A made-up head is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights")


@dataclass(frozen=True)
class Bert:
    subject: Subject
    model: network.Encoder
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]  # x, mask, labels
    slopes: np.ndarray  # (N, heads)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Bert:
    subject = open_tiny(tmp_path_factory.mktemp("bert"), "bert", "classification", batch_size=4)
    state = {name: tensor.numpy() for name, tensor in subject.model.state_dict().items()}
    made = [rows()[i] for i in subject.indices]
    codes = [[CLS, *(len(SPECIAL) + WORDS.index(word) for word in row["text"].split()), SEP] for row in made]
    ids, mask = np.zeros((2, len(made), max(map(len, codes))), dtype=int)
    for i, code in enumerate(codes):
        ids[i, : len(code)], mask[i, : len(code)] = code, 1
    labels = np.array([LABELS.index(row["label"]) for row in made])
    inputs = network.bert_embedding(state, ids, np.zeros_like(ids)), mask, labels
    model = network.bert_encoder(state, heads=2)
    return Bert(subject, model, inputs, network.gate_gradients(model, *inputs).reshape(len(made), -1))


def check_lines(lines: Sequence[Mapping[str, Any]], rises: np.ndarray, base: np.ndarray | None = None) -> None:
    """Lines in layer-major order against rises (N, L, H): mean, paired standard error, interval, losses."""
    keys = list(np.ndindex(*rises.shape[1:]))
    assert [(line["layer"], line["head"]) for line in lines] == keys
    for line, (layer, head) in zip(lines, keys, strict=True):
        d = rises[:, layer, head]
        se = d.std(ddof=1) / len(d) ** 0.5
        assert line["n"] == len(d)
        np.testing.assert_allclose(line["I"], d.mean(), **CLOSE)
        np.testing.assert_allclose(line["se"], se, **CLOSE)
        low, high = d.mean() - 1.959963985 * se, d.mean() + 1.959963985 * se
        np.testing.assert_allclose([line["ci_lo"], line["ci_hi"]], [low, high], rtol=1e-6, atol=1e-12)
        assert line["significant"] == (low > 0 or high < 0)
        if base is not None:
            np.testing.assert_allclose(line["loss_base"], base.mean(), **CLOSE)
            np.testing.assert_allclose(line["loss_ablate"], base.mean() + d.mean(), **CLOSE)


@pytest.mark.parametrize(("tokens", "cache"), [(None, None), (1, None), (64, 0), (1, 0), (100000, 1000)])
def test_exact_importance_of_a_bert(bert: Bert, tokens: int | None, cache: int | None) -> None:
    rises, base = network.exact(bert.model, *bert.inputs), bert.model.losses(*bert.inputs)
    assert np.abs(rises.mean(0)).max() > 1e-3
    check_lines(measure_importance(bert.subject, tokens_per_pass=tokens, cache_bytes=cache), rises, base)


def test_mean_ablation_of_a_bert(bert: Bert) -> None:
    fill = bert.model.means(*bert.inputs[:2])
    check_lines(measure_importance(bert.subject, ablate="mean"), network.exact(bert.model, *bert.inputs, fill))


def test_integrated_importance_of_a_bert(bert: Bert) -> None:
    lines = measure_importance(bert.subject, method="integrated")
    found = np.array([line["I"] for line in lines])
    np.testing.assert_allclose(found, network.exact(bert.model, *bert.inputs).mean(0).ravel(), rtol=0, atol=1e-9)


def test_gate_gradients_of_a_bert(bert: Bert) -> None:
    found = gate_gradients(bert.subject, make_objective("task", bert.subject))
    np.testing.assert_allclose(np.asarray(found.s), bert.slopes, **SLOPE)
    for method, expected in (("taylor", -bert.slopes.mean(0)), ("michel", np.abs(bert.slopes).mean(0))):
        lines = measure_importance(bert.subject, method=method)
        np.testing.assert_allclose([line["I"] for line in lines], expected, **SLOPE)
        assert all(line["loss_ablate"] is None for line in lines)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("batch", [None, 1, 4, 100])
def test_fisher_numbers_of_a_bert(bert: Bert, batch: int | None, relative: bool) -> None:
    expected = oracle.fisher(bert.slopes, batch=batch, relative=relative, eps=1e-6)
    mode: dict[str, Any] = {"mode": "sample"} if batch is None else {"mode": "batch", "batch_size": batch}
    lines = measure_fisher(bert.subject, order="given", train_mode=False, relative=relative, eps=1e-6, **mode)
    for name in ("G", "F", "S"):
        np.testing.assert_allclose([line[name] for line in lines], expected[name], rtol=1e-6, atol=2e-8)
    # A ratio of small numbers: 2e-8 of s in G of 1e-3 and more.
    np.testing.assert_allclose([line["Ppred"] for line in lines], expected["Ppred"], rtol=1e-3)
    if batch is None:
        np.testing.assert_allclose([line["M"] for line in lines], expected["M"], **SLOPE)
    assert {line["n_batches"] for line in lines} == {expected["n"]}
    assert {line["n_samples"] for line in lines} == {len(bert.slopes)}
    if batch == 100 and relative:  # an absolute eps is larger than a small F
        assert all(line["Ppred"] > 0.9 for line in lines)


def test_the_documents_fisher_and_importance_of_a_bert(bert: Bert) -> None:
    # The base has no dropout: its training mode is its evaluation mode.
    expected = oracle.fisher(bert.slopes, batch=16, relative=False)
    lines = measure_fisher(bert.subject, profile="document")
    assert all(list(line) == ["layer", "head", "G", "F", "Ppred", "n_batches"] for line in lines)
    for name in ("G", "F"):
        np.testing.assert_allclose([line[name] for line in lines], expected[name], rtol=1e-6, atol=2e-8)
    np.testing.assert_allclose([line["Ppred"] for line in lines], expected["Ppred"], rtol=1e-3)
    rises = network.exact(bert.model, *bert.inputs)
    for line in measure_importance(bert.subject, profile="document"):
        assert line["n"] == len(rises)
        np.testing.assert_allclose(line["I"], rises[:, line["layer"], line["head"]].mean(), **CLOSE)


def test_divergence_of_a_bert_from_itself(bert: Bert) -> None:
    def logs(gates: np.ndarray | None = None) -> np.ndarray:
        z = bert.model.logits(*bert.inputs[:2], gates)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    before = logs()
    for line in measure_importance(bert.subject, objective="kl"):
        gates = bert.model.gates
        gates[line["layer"], line["head"]] = 0
        expected = (np.exp(before) * (before - logs(gates))).sum(1).mean()
        np.testing.assert_allclose(line["I"], expected, **CLOSE)


def test_screening_of_a_bert(bert: Bert) -> None:
    exact = network.exact(bert.model, *bert.inputs).mean(0)
    taylor = -bert.slopes.mean(0).reshape(2, 2)
    lines = measure_importance(bert.subject, method="screen", exact_top=2)
    done = [line for line in lines if line["loss_ablate"] is not None]
    assert len(lines) == 4 and len(done) >= 2
    for line in lines:
        expected = exact if line in done else taylor
        np.testing.assert_allclose(line["I"], expected[line["layer"], line["head"]], **SLOPE)
    best = sorted(np.ndindex(2, 2), key=lambda key: -abs(taylor[key]))[:2]
    assert set(best) <= {(line["layer"], line["head"]) for line in done}

"""Choice likelihoods and perplexity against one text at a time; padding and batches change nothing but rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from loraforge.errors import LoraforgeError
from loraforge.evaluation.likelihood import RowLoss, choose, row_losses
from loraforge.evaluation.score import score_task
from loraforge.tasks import TaskSpec, load_model, load_task
from tests.tasks.tiny import tiny_base, write_rows

FAMILIES = ("llama", "qwen3", "gpt2", "t5")
CHOICES = [
    {"goal": "red sun", "a": "moon", "b": "blue cat dog up", "right": 0},
    {"goal": "one two three four one two three", "a": "good bad", "b": "cat", "right": 1},
    {"goal": "up", "a": "fine poor fine poor fine poor", "b": "yes no", "right": 1},
    {"goal": "the the the", "a": "sun", "b": "moon", "right": 0},
    {"goal": "down yes no is", "a": "is the dog", "b": "cat cat cat", "right": 1},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "choices.jsonl", CHOICES)


def choice_task(rows):
    return TaskSpec(id="c", test=str(rows), kind="choice", text="{goal}", choices=["a", "b"], answer="right")


def loaded(bases, family, kind):
    return load_model(bases[family], kind)[0].eval()


def alone(model, example):
    """(answer loss, tokens, full loss, tokens) of one example by the model's own forward on it alone, in float64."""
    ids, labels = example["input_ids"][None], example["labels"][None]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=ids, labels=labels).logits[0].double()
            losses = F.cross_entropy(logits, labels[0], reduction="none")
            return losses.sum().item(), len(losses), losses.sum().item(), len(losses)
        logits = model(input_ids=ids).logits[0, :-1].double()
    losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    answer = labels[0, 1:] != -100
    return losses[answer].sum().item(), int(answer.sum()), losses.sum().item(), len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_each_text_alone(bases, rows, family):
    model = loaded(bases, family, "choice")
    data = load_task(choice_task(rows), "test", base=bases[family])
    flat = [choice for row in data.choices for choice in row]
    together = row_losses(model, flat, batch_tokens=10_000)
    for example, found in zip(flat, together, strict=True):
        answer, tokens, full, all_tokens = alone(model, example)
        assert (found.answer_tokens, found.full_tokens) == (tokens, all_tokens)
        assert found.answer == pytest.approx(answer, rel=2e-6)
        assert found.full == pytest.approx(full, rel=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_shares_a_batch_changes_nothing(bases, rows, family):
    model = loaded(bases, family, "choice")
    data = load_task(choice_task(rows), "test", base=bases[family])
    flat = [choice for row in data.choices for choice in row]
    results = [row_losses(model, flat, batch_tokens=n) for n in (1, 24, 10_000)]
    for one, two, three in zip(*results, strict=True):
        assert two.full == pytest.approx(one.full, rel=1e-6)
        assert three.full == pytest.approx(one.full, rel=1e-6)


@pytest.mark.parametrize("mode", ["answer-mean", "answer-sum", "document"])
def test_the_choice_is_the_likeliest_by_brute_force(bases, rows, mode):
    model = loaded(bases, "qwen3", "choice")
    data = load_task(choice_task(rows), "test", base=bases["qwen3"])
    expected = []
    for row in data.choices:
        scores = []
        for choice in row:
            answer, tokens, full, all_tokens = alone(model, choice)
            scores.append({"answer-mean": answer / tokens, "answer-sum": answer, "document": full / all_tokens}[mode])
        expected.append(scores.index(min(scores)))
    assert choose(model, data.choices, mode, batch_tokens=64) == expected


def test_the_document_mode_is_the_models_own_loss_on_the_whole_text(bases, rows):
    """What the document's evaluation computes: labels = input_ids, one choice at a time."""
    model = loaded(bases, "qwen3", "choice")
    data = load_task(choice_task(rows), "test", base=bases["qwen3"])
    flat = [choice for row in data.choices for choice in row]
    for example, found in zip(flat, row_losses(model, flat, batch_tokens=64), strict=True):
        ids = example["input_ids"][None]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert found.score("document") == pytest.approx(-loss, rel=1e-6)


def test_the_modes_differ_where_lengths_do():
    short, long = RowLoss(2.0, 1, 8.0, 5), RowLoss(3.0, 3, 9.0, 7)
    assert short.score("answer-sum") > long.score("answer-sum")
    assert short.score("answer-mean") < long.score("answer-mean")
    assert short.score("document") < long.score("document")


def test_equal_choices_take_the_first(bases):
    model = loaded(bases, "gpt2", "choice")
    spec = TaskSpec(
        id="same", test=[{"text": "red", "a": "sun", "b": "sun", "answer": 0}], kind="choice", choices=["a", "b"]
    )
    data = load_task(spec, "test", base=bases["gpt2"])
    assert choose(model, data.choices, "answer-mean", batch_tokens=64) == [0]


def test_an_encoder_decoder_has_no_document_mode(bases, rows):
    data = load_task(choice_task(rows), "test", base=bases["t5"])
    with pytest.raises(LoraforgeError, match="an encoder-decoder does not read"):
        choose(loaded(bases, "t5", "choice"), data.choices, "document", batch_tokens=64)


def test_a_choice_without_a_token_is_refused(bases, rows):
    data = load_task(choice_task(rows), "test", base=bases["gpt2"])
    data.choices[3][1]["labels"][:] = -100
    with pytest.raises(LoraforgeError, match="no token to score") as caught:
        choose(loaded(bases, "gpt2", "choice"), data.choices, "answer-mean", where="rows.jsonl", batch_tokens=64)
    assert "rows.jsonl, row 3" in str(caught.value)


def test_a_loss_that_is_not_finite_is_refused(bases, rows):
    model = loaded(bases, "gpt2", "choice")
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")
    data = load_task(choice_task(rows), "test", base=bases["gpt2"])
    with pytest.raises(LoraforgeError, match="loss is not finite"):
        choose(model, data.choices, "answer-mean", batch_tokens=64)


@pytest.mark.parametrize(("family", "kind"), [("llama", "causal"), ("t5", "text-to-text")])
def test_perplexity_is_that_of_all_target_tokens(bases, tmp_path, family, kind):
    items = [{"text": "red blue", "target": "sun"}, {"text": "one", "target": "cat dog up down"}]
    spec = TaskSpec(id="p", test=str(write_rows(tmp_path / "p.jsonl", items)), kind=kind, metric="perplexity")
    data = load_task(spec, "test", base=bases[family])
    model = loaded(bases, family, kind)
    parts = [alone(model, example) for example in data.examples]
    expected = math.exp(sum(part[0] for part in parts) / sum(part[1] for part in parts))
    score = score_task(model, data)
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert score.intervals["perplexity"][0] <= score.value <= score.intervals["perplexity"][1]


def test_plain_text_is_scored_by_perplexity(bases, tmp_path):
    path = write_rows(tmp_path / "plain.jsonl", [{"text": "red blue sun"}, {"text": "one two"}])
    data = load_task(TaskSpec(id="plain", test=str(path), loss_on="all"), "test", base=bases["gpt2"])
    assert score_task(loaded(bases, "gpt2", "causal"), data).main == "perplexity"

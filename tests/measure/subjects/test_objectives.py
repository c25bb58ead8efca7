from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from loraforge.errors import CheckFailed, LoraforgeError, UsageError
from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.subjects.objectives import check_losses, make_objective, repeat_reference
from tests.measure.tiny_subjects import losses_of, opened

KINDS = {"bert": "classification", "llama": "causal", "gpt2": "causal", "qwen3": "causal", "t5": "text-to-text",
         "bart": "text-to-text"}  # fmt: skip
SPEAKERS = [family for family, kind in KINDS.items() if kind != "classification"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


@pytest.fixture(scope="module")
def subjects(folder):
    """A subject of a family, opened once."""
    kept = {}

    def get(family):
        if family not in kept:
            kept[family] = opened(folder, family, kind=KINDS[family], batch_size=5)
        return kept[family]

    return get


@pytest.mark.parametrize("family", KINDS)
def test_task_is_the_models_own_loss_of_each_row(subjects, family):
    """transformers' loss of a row alone, without padding: the mean over its labels."""
    subject = subjects(family)
    losses = losses_of(make_objective("task", subject, warn=False), subject)
    for batch, found in zip(subject.batches(), losses, strict=True):
        for row, loss in zip(batch.indices, found, strict=True):
            inputs = subject.batch(subject.data, [row]).inputs
            with torch.no_grad():
                own = subject.model(**inputs).loss
            # transformers takes some of its losses in float32.
            assert float(loss) == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_kl(subjects, family):
    """0 where nothing is gated; else the sum over the classes of p log(p / q), taken here from the plain logits."""
    subject = subjects(family)
    objective = make_objective("kl", subject)
    assert all(bool((losses == 0).all()) for losses in losses_of(objective, subject))
    batch = subject.batches()[0]
    reference = objective.reference(subject.model, batch)
    labels = batch.inputs["labels"]
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    if family == "t5":
        inputs["decoder_input_ids"] = subject.model.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad(), HeadGates(subject.model, subject.layout) as gates:
        plain = subject.model(**inputs).logits.log_softmax(-1)
        gates.set(0, torch.zeros(subject.layout.attentions[0].n_q))
        losses = objective.losses(subject.model, batch, reference)
        gated = subject.model(**inputs).logits.log_softmax(-1)
    wanted = (plain.exp() * (plain - gated)).sum(-1)
    if family == "llama":
        wanted, labels = wanted[:, :-1], labels[:, 1:]
    if family != "bert":
        kept = labels != -100
        wanted = (wanted * kept).sum(1) / kept.sum(1)
    assert torch.allclose(losses, wanted, rtol=1e-9, atol=0) and bool((losses > 0).all())


def test_kl_needs_no_right_labels(subjects):
    subject = subjects("bert")
    objective = make_objective("kl", subject)
    batch = subject.batches()[0]
    other = replace(batch, inputs={**batch.inputs, "labels": 1 - batch.inputs["labels"]})
    with torch.no_grad(), HeadGates(subject.model, subject.layout) as gates:
        reference = objective.reference(subject.model, batch)
        gates.set(1, torch.zeros(2))
        assert torch.equal(
            objective.losses(subject.model, batch, reference), objective.losses(subject.model, other, reference)
        )
        with pytest.raises(LoraforgeError, match="needs a reference"):
            objective.losses(subject.model, batch)
        with pytest.raises(LoraforgeError, match="of another batch"):
            objective.losses(subject.model, batch, reference[:3])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_repeated_batch_reads_the_reference_in_turn(subjects, family):
    """Each copy has the gate of its own, and the loss that this gate has alone."""
    subject = subjects(family)
    objective = make_objective("kl", subject)
    batch = subject.batches()[0]
    n_q = subject.layout.attentions[0].n_q
    with torch.no_grad(), HeadGates(subject.model, subject.layout) as gates:
        reference = objective.reference(subject.model, batch)
        alone = []
        for head in range(2):
            gates.set(0, 1 - torch.eye(n_q)[head])
            alone.append(objective.losses(subject.model, batch, reference))
        gates.set(0, (1 - torch.eye(n_q)[:2]).repeat_interleave(len(batch), 0))
        both = objective.losses(subject.model, batch.repeat(2), repeat_reference(reference, 2))
    assert torch.allclose(both, torch.cat(alone), rtol=1e-9, atol=1e-15)


def test_lm_is_the_loss_over_all_tokens(subjects):
    subject = subjects("llama")
    objective = make_objective("lm", subject)
    for batch, losses in zip(subject.batches(), losses_of(objective, subject), strict=True):
        for row, loss in zip(batch.indices, losses, strict=True):
            ids = subject.data.examples[row]["input_ids"][None]
            with torch.no_grad():
                own = subject.model(input_ids=ids, labels=ids).loss
            assert float(loss) == pytest.approx(float(own), rel=1e-6)


def test_task_through_a_random_head_is_warned_of(folder):
    subject = opened(folder, "bert")
    with pytest.warns(UserWarning, match="random weights.*probe") as caught:
        make_objective("task", subject)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_objective("kl", subject)
        make_objective("task", replace(subject, fresh=()))
        make_objective("task", opened(folder, "t5", kind="text-to-text"))


@pytest.mark.parametrize(("name", "family"), [("lm", "bert"), ("lm", "t5"), ("probe", "llama"), ("probe", "t5")])
def test_objectives_that_do_not_fit(subjects, name, family):
    with pytest.raises(LoraforgeError, match="is for causal models|is a classification head"):
        make_objective(name, subjects(family))


def test_an_unknown_objective(subjects):
    with pytest.raises(UsageError, match="unknown objective 'probee'"):
        make_objective("probee", subjects("bert"))


def test_a_row_without_a_label_is_refused(subjects):
    subject = subjects("llama")
    examples = [dict(example) for example in subject.data.examples]
    examples[3]["labels"] = torch.full_like(examples[3]["labels"], -100)
    bare = replace(subject, data=replace(subject.data, examples=examples))
    with pytest.raises(LoraforgeError, match="no token to predict") as caught:
        make_objective("task", bare)
    assert "row 3" in str(caught.value)


def test_losses_that_are_not_finite_are_named(subjects):
    batch = subjects("bert").batches()[0]
    losses = torch.zeros(len(batch))
    check_losses(losses, batch, 2)
    losses[1] = float("nan")
    with pytest.raises(CheckFailed) as caught:
        check_losses(losses, batch, 2, HeadKey("enc", "self", 1, 0))
    words = str(caught.value)
    assert "batch 2, enc self layer 1 head 0" in words and f"rows {batch.indices[1]}\n" in words


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16_gives_float32_losses_near_those_of_float64(folder, subjects, family):
    narrow = opened(folder, family, kind=KINDS[family], batch_size=5, dtype="bfloat16")
    found = torch.cat(losses_of(make_objective("task", narrow, warn=False), narrow))
    assert found.dtype == torch.float32
    if family == "llama":
        wide = torch.cat(losses_of(make_objective("task", subjects(family)), subjects(family)))
        # bfloat16 keeps 8 bits; the losses are about 3.5 and the layers two.
        assert float((found - wide).abs().max()) < 0.1

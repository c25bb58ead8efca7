from __future__ import annotations

import pytest
import torch
import transformers as tf

from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.subjects import label_logits
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import open_subject
from tests.measure.tiny_subjects import losses_of, opened, spec_of
from tests.tasks.tiny import tiny_tokenizer

SPEAKERS = {"llama": "causal", "gpt2": "causal", "qwen3": "causal", "t5": "text-to-text", "bart": "text-to-text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("logits")


@pytest.mark.parametrize("family", SPEAKERS)
def test_the_three_ways_to_the_logits_are_one(folder, family):
    subject = opened(folder, family, kind=SPEAKERS[family], batch_size=5)
    objective = make_objective("task", subject)
    assert objective._logits.how == "apart"
    found = {}
    for how in ("apart", "gathered", "plain"):
        objective._logits.how = how
        found[how] = torch.cat(losses_of(objective, subject))
    assert torch.allclose(found["apart"], found["plain"], rtol=1e-12, atol=0)
    assert torch.allclose(found["gathered"], found["plain"], rtol=1e-12, atol=0)


def test_a_model_that_caps_its_logits(folder):
    """Gemma 2 bends its logits after the last layer, which therefore is not run apart."""
    config = tf.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=1.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    place = folder / "gemma2"
    tf.Gemma2ForCausalLM(config).save_pretrained(place)
    tiny_tokenizer(["good", "bad", "no", "yes", "two"], "t5").save_pretrained(place)
    subject = open_subject(place, task=spec_of(folder, kind="causal"), subset=3, dtype="float64", batch_size=2)
    objective = make_objective("task", subject)
    assert objective._logits.how == "gathered"
    for batch, losses in zip(subject.batches(), losses_of(objective, subject), strict=True):
        for row, loss in zip(batch.indices, losses, strict=True):
            own = subject.model(**subject.batch(subject.data, [row]).inputs).loss
            assert float(loss) == pytest.approx(float(own), rel=1e-6)


def test_a_bias_on_the_logits(folder):
    """BART's final_logits_bias: zero in every published file, but part of the model."""
    subject = opened(folder, "bart", kind="text-to-text")
    subject.model.final_logits_bias[0, 3] = 2.0
    objective = make_objective("task", subject)
    assert objective._logits.how == "gathered"
    (batch,) = subject.batches()
    own = subject.model(**{name: tensor[:1] for name, tensor in batch.inputs.items()}).loss
    assert float(losses_of(objective, subject)[0][0]) == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("name", ["task", "kl", "lm"])
def test_logits_in_parts_are_those_in_one(folder, monkeypatch, name):
    subject = opened(folder, "llama", kind="causal", batch_size=5)
    objective = make_objective(name, subject)
    batch = subject.batches()[0]
    reference = objective.reference(subject.model, batch)

    def taken():
        gate = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
        with HeadGates(subject.model, subject.layout) as gates:
            gates.set(0, gate)
            losses = objective.losses(subject.model, batch, reference)
            (gradient,) = torch.autograd.grad(losses.sum(), gate)
        return losses.detach(), gradient

    whole = taken()
    monkeypatch.setattr(label_logits, "_MOST", 3 * 26)
    parts = taken()
    assert torch.allclose(parts[0], whole[0], rtol=1e-12) and torch.allclose(parts[1], whole[1], rtol=1e-10)

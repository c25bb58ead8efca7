"""Which kind a task is."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BlipConfig, GPT2Config, T5Config

from loraforge.errors import LoraforgeError
from loraforge.tasks import TaskSpec, resolve_kind, task_type_of

BERT, GPT2, T5 = BertConfig(architectures=["BertModel"]), GPT2Config(), T5Config()
LABEL, TARGET, BOTH = ({"text": "a", **more} for more in ({"label": 1}, {"target": "b"}, {"label": 1, "target": "b"}))


@pytest.mark.parametrize(
    ("row", "keys", "config", "kind"),
    [
        (LABEL, {}, None, "classification"),
        (LABEL, {}, GPT2, "classification"),
        (LABEL, {}, T5, "classification"),
        (LABEL, {"target": "label"}, T5, "text-to-text"),
        (TARGET, {}, T5, "text-to-text"),
        (TARGET, {}, GPT2, "causal"),
        (BOTH, {}, BERT, "classification"),
        (BOTH, {}, GPT2, "causal"),
        (BOTH, {"label": "label"}, GPT2, "classification"),
        ({"text": "a"}, {"loss_on": "all"}, GPT2, "causal"),
        ({"text": "a", "output": "x"}, {"label": "output"}, None, "classification"),
        ({"q": "a", "choices": ["x", "y"], "answer": 0}, {}, GPT2, "choice"),
        ({"q": "a", "s1": "x", "s2": "y", "label": 0}, {"choices": ["s1", "s2"], "answer": "label"}, GPT2, "choice"),
        ({"image": "a.png", "label": "x"}, {}, None, "images"),
        ({"image": "a.png", "text": "x"}, {}, None, "causal"),
        ({"image": "a.png", "target": "x"}, {}, None, "causal"),
        (LABEL, {"kind": "choice"}, GPT2, "choice"),
    ],
)
def test_kinds(row, keys, config, kind):
    spec = TaskSpec("t", test=[row], **keys)
    assert resolve_kind(spec, config=config) == resolve_kind(spec, config=config, item=row) == kind


def test_rows_that_do_not_say():
    with pytest.raises(LoraforgeError, match="what is to be learnt(.|\n)*fields text(.|\n)*loss_on: all"):
        resolve_kind(TaskSpec("t", train=[{"text": "a"}]), config=GPT2)
    with pytest.raises(LoraforgeError, match="no split at all"):
        resolve_kind(TaskSpec("t"))


@pytest.mark.parametrize(("kind", "config"), [("text-to-text", GPT2), ("causal", T5)])
def test_kinds_that_a_base_cannot_do(kind, config):
    with pytest.raises(LoraforgeError, match=f"cannot do a task of kind '{kind}'"):
        resolve_kind(TaskSpec("t", train=[TARGET], kind=kind), config=config)


def test_an_encoder_decoder_does_not_learn_its_prompt():
    with pytest.raises(LoraforgeError, match="'loss_on: all' is for causal models"):
        resolve_kind(TaskSpec("t", train=[TARGET], loss_on="all"), config=T5)


def test_task_types_are_those_of_peft():
    from peft import TaskType

    names = {task_type_of(kind) for kind in ("classification", "text-to-text", "causal", "choice")}
    assert names == {"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM"} <= {task.value for task in TaskType}
    assert task_type_of("images") is task_type_of("causal", BlipConfig()) is None
    assert task_type_of("causal", GPT2) == "CAUSAL_LM"

"""The model of a kind: its class, its head, the weights that were drawn."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraforge.errors import LoraforgeError
from loraforge.tasks import TaskSpec, load_model, read_task_card, write_task_card
from tests.tasks.tiny import EOS, PAD, tiny_base

FRESH = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "deberta-v2": ("classifier", "pooler"),
    "llama": ("score",),
    "gpt2": ("score",),
    "t5": ("classification_head",),
}


@pytest.mark.parametrize("family", FRESH)
def test_heads_are_drawn_by_the_seed(tmp_path, family):
    base = tiny_base(tmp_path / family, family)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, config, fresh = load_model(base, "classification", head_labels=("no", "yes", "maybe"), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(fresh) == list(FRESH[family])
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"} and config.label2id["maybe"] == 2
    assert config.num_labels == 3 and config.problem_type == "single_label_classification"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    again, _, _ = load_model(base, "classification", head_labels=("no", "yes", "maybe"), seed=3, trainable=True)
    other, _, _ = load_model(base, "classification", head_labels=("no", "yes", "maybe"), seed=4)
    assert all(p.requires_grad for p in again.parameters())
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(same)
    drawn = {n for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)}
    assert drawn and all(name.startswith(fresh) for name in drawn)
    stored = load_file(base / "model.safetensors")
    kept = {n: p for n, p in model.named_parameters() if not n.startswith(fresh)}
    prefix = "" if family in ("llama", "gpt2") else f"{model.base_model_prefix}."
    for name, value in kept.items():
        assert torch.equal(value, stored[name.removeprefix(prefix)]), name


def test_a_head_of_other_classes_is_trained_again(tmp_path):
    base = tiny_base(tmp_path / "bert", "bert")
    model, _, _ = load_model(base, "classification", head_labels=("a", "b"))
    model.save_pretrained(tmp_path / "tuned")
    same, _, fresh = load_model(tmp_path / "tuned", "classification", head_labels=("a", "b"), seed=9)
    assert fresh == () and torch.equal(same.classifier.weight, model.classifier.weight)
    assert load_model(tmp_path / "tuned", "classification", head_labels=("x", "y"))[2] == ("classifier",)
    wider, _, fresh = load_model(tmp_path / "tuned", "classification", head_labels=("a", "b", "c"))
    assert fresh == ("classifier",) and wider.classifier.weight.shape[0] == 3


def test_decoders_know_their_padding(tmp_path):
    _, config, _ = load_model(tiny_base(tmp_path / "llama", "llama"), "causal")
    assert config.pad_token_id == EOS
    _, config, _ = load_model(tiny_base(tmp_path / "qwen3", "qwen3"), "causal")
    assert config.pad_token_id == PAD


def test_shapes_without_weights(tmp_path):
    base = tiny_base(tmp_path / "bert", "bert")
    (base / "model.safetensors").unlink()
    model, _, fresh = load_model(base, "classification", head_labels=("a", "b"), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and fresh == ("classifier",)


def test_a_model_in_memory_is_used_as_it_is(tmp_path):
    model, _, _ = load_model(tiny_base(tmp_path / "gpt2", "gpt2"), "causal", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found, config, fresh = load_model(model, "causal", trainable=True)
    assert found is model and config is model.config and fresh == () and next(model.parameters()).requires_grad


def test_bases_that_lack_weights(tmp_path):
    base = tiny_base(tmp_path / "bert", "bert")
    with pytest.raises(LoraforgeError, match="lacks weights(.|\n)*'causal'"):
        load_model(base, "causal")
    tensors = load_file(base / "model.safetensors")
    left = {k: v for k, v in tensors.items() if "layer.1.attention" not in k}
    save_file(left, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraforgeError, match=r"lacks weights(.|\n)*bert\.encoder\.layer\.1\.attention"):
        load_model(base, "classification", head_labels=("a", "b"))


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("bert", "text-to-text", "cannot do a task of kind 'text-to-text'"),
        ("vit", "causal", "cannot do a task of kind 'causal'"),
        ("bert", "classification", "needs its classes"),
    ],
)
def test_kinds_that_a_base_cannot_do(tmp_path, family, kind, message):
    with pytest.raises(LoraforgeError, match=message):
        load_model(tiny_base(tmp_path / family, family), kind)


def test_no_base(tmp_path):
    with pytest.raises(LoraforgeError, match="does not exist"):
        load_model(tmp_path / "gone", "causal")


def test_task_cards(tmp_path):
    spec = TaskSpec("emo", train="a.jsonl", text="{a} {b}", max_length=48)
    path = write_task_card(tmp_path, spec, "classification", ("no", "yes"), "models/base", "per-task")
    card = read_task_card(tmp_path)
    assert card == json.loads(path.read_text()) == {
        "id": "emo",
        "kind": "classification",
        "labels": ["no", "yes"],
        "label_space": "per-task",
        "text": "{a} {b}",
        "text_pair": None,
        "target": None,
        "max_length": 48,
        "base": "models/base",
    }  # fmt: skip
    assert read_task_card(tmp_path / "none") is None
    for content in ("{", "[]", '{"id": "a"}'):
        path.write_text(content)
        with pytest.raises(LoraforgeError, match=r"task\.json"):
            read_task_card(tmp_path)

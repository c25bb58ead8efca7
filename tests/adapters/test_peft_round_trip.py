"""Merged folders in PEFT: the logits are those of dense merging, and every scale is 1."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraforge.adapters import all_modules, check_compatible, open_adapter, resolve_heads, write_adapter
from loraforge.linalg.factored import stack, truncate_many
from loraforge.linalg.rank import RankRule

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
WEIGHTS = (0.7, -0.4)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(kind: Any = GPT2LMHeadModel) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0)
    return kind(config).eval()


def adapter_of(base: nn.Module, path: Path, seed: int, **fields: Any) -> Path:
    """A PEFT adapter with random (non-zero) factors, saved by PEFT."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(path)
    return path


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(1, 25).reshape(2, 12) % 61
    with torch.no_grad():
        return model(input_ids=tokens).logits


def dense_merge(base: nn.Module, paths: list[Path]) -> nn.Module:
    """Base plus the weighted sum of the deltas that PEFT itself computes."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for weight, path in zip(WEIGHTS, paths, strict=False):
            model = PeftModel.from_pretrained(copy.deepcopy(base), path)
            for name, module in model.base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    delta = module.get_delta_weight("default").double()
                    target = merged.get_submodule(name).weight
                    target.copy_((target.double() + weight * delta).float())
    return merged


def merge(paths: list[Path], out: Path, rule: RankRule | None = None, **options: Any) -> Path:
    adapters = [open_adapter(path) for path in paths]
    check_compatible(adapters)
    names = all_modules(adapters)
    sums = [
        stack([(w, a.load(name)) for w, a in zip(WEIGHTS, adapters, strict=False) if name in a.modules_set])
        for name in names
    ]
    if rule is not None:
        sums = [cut.factors for cut in truncate_many(sums, rule)]
    return write_adapter(out, zip(names, sums, strict=True), adapters, heads=resolve_heads(adapters), **options)


def check(base: nn.Module, out: Path, expected: torch.Tensor) -> None:
    model = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scales and set(scales) == {1.0}
    assert (logits(model) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("rule", [None, RankRule()])
def test_mixed_ranks_and_rslora_on_llama(tmp_path: Path, rule: RankRule | None) -> None:
    base = llama()
    a = adapter_of(
        base,
        tmp_path / "a",
        1,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 10},
    )
    b = adapter_of(
        base, tmp_path / "b", 2, r=6, lora_alpha=8, target_modules=r".*\.(q_proj|up_proj)", rank_pattern={"up_proj": 2}
    )
    expected = logits(dense_merge(base, [a, b]))
    assert (expected - logits(base)).abs().max() > 1e-2, "the adapters do something"
    out = merge([a, b], tmp_path / "out", rule)
    ranks = {open_adapter(out).info(m).rank for m in open_adapter(out).modules}
    assert len(ranks) >= 4
    check(base, out, expected)


def test_conv1d_on_gpt2(tmp_path: Path) -> None:
    base = gpt2()
    a = adapter_of(base, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    b = adapter_of(base, tmp_path / "b", 2, r=3, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = logits(dense_merge(base, [a, b]))
    out = merge([a, b], tmp_path / "out", RankRule())
    assert open_adapter(out).settings.fan_in_fan_out
    check(base, out, expected)


def test_heads_arrive_in_peft(tmp_path: Path) -> None:
    base = gpt2(GPT2ForSequenceClassification)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}
    a = adapter_of(base, tmp_path / "a", 1, **fields)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), a).eval())
    adapter = open_adapter(a)
    assert adapter.heads == ("score.weight",)
    out = write_adapter(
        tmp_path / "out",
        [(m, adapter.load(m)) for m in adapter.modules],
        [adapter],
        heads=resolve_heads([adapter]),
    )
    check(base, out, expected)


def test_classifiers_whose_heads_are_kept_aside_load_in_peft(tmp_path: Path) -> None:
    """With a task type PEFT would look for the head in the file."""
    base = gpt2(GPT2ForSequenceClassification)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}
    adapters = [open_adapter(adapter_of(base, tmp_path / name, seed, **fields)) for seed, name in enumerate("ab")]
    heads = resolve_heads(adapters)
    assert set(heads.aside) == {"a", "b"}
    first = adapters[0]
    out = write_adapter(tmp_path / "out", [(m, first.load(m)) for m in first.modules], adapters, heads=heads)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    expected = PeftModel.from_pretrained(copy.deepcopy(base), first.path).eval()
    expected.base_model.model.score.modules_to_save["default"].load_state_dict(base.score.state_dict())
    torch.testing.assert_close(logits(loaded), logits(expected))


def test_trained_biases_arrive_in_peft(tmp_path: Path) -> None:
    base = gpt2()
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith("bias"):
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    assert any(key.endswith("base_layer.bias") for key in adapter.extras)
    out = write_adapter(
        tmp_path / "out",
        [(m, adapter.load(m)) for m in adapter.modules],
        [adapter],
        heads=resolve_heads([adapter]),
    )
    check(base, out, logits(model.eval()))

"""Updates of adapters that PEFT itself wrote, against the weights that PEFT itself merges, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from loraforge.measure.updates.update import update_from_factors
from tests.measure.oracle_bases import NAMES
from tests.oracles import heads as oracle
from tests.oracles.heads import Matrix, Shape
from tests.tasks.tiny import tiny_base

# Merging in float64 rounds by 1e-16 of weights that are about as large as their change.
CLOSE = 1e-12
SHAPES = {"bert": Shape(2, 2, 8, 8), "gpt2": Shape(2, 2, 8, 8), "llama": Shape(4, 2, 4, 4)}
CLASSES = {"bert": tf.BertModel, "gpt2": tf.GPT2LMHeadModel, "llama": tf.LlamaForCausalLM}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("bert", {
        "target_modules": ["query", "value", "attention.output.dense"], "alpha_pattern": {"value": 3},
        "rank_pattern": {r"encoder\.layer\.1\.attention\.self\.query": 5},
    }),
    "dora": ("bert", {"target_modules": ["query", "value"], "use_dora": True}),
    "one-layer": ("bert", {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "biases": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "all-biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "bias-of-the-factor": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "all-linear": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
}  # fmt: skip


def layer_parts(state: dict[str, torch.Tensor], family: str, layer: int, kind: str) -> dict[str, Matrix]:
    """Part -> weight (out, in), or bias (out, 1), of a layer."""
    found = {}
    for part, template in NAMES[family].items():
        name = template.format(i=layer).removeprefix("bert.") + f".{kind}"
        if name in state:
            x = state[name].numpy()
            found[part] = x[:, None] if x.ndim == 1 else x.T if family == "gpt2" else x
    if "qkv" in found:
        found |= oracle.unfuse(found.pop("qkv"), SHAPES[family], "stacked")
    return found


@pytest.mark.parametrize("name", ADAPTERS)
# PEFT takes the bias of its own B for a broken matrix.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft(tmp_path: Path, name: str) -> None:
    family, options = ADAPTERS[name]
    base, shape = tiny_base(tmp_path / "base", family), SHAPES[family]

    def load() -> torch.nn.Module:
        return CLASSES[family].from_pretrained(base, dtype=torch.float64)

    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "init_lora_weights": False} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = peft.get_peft_model(load(), config)
        for key, x in made.named_parameters():
            if key.endswith("bias") and ("bias" in options or "lora_B" in key):
                x.data += torch.randn_like(x)
    made.save_pretrained(tmp_path / "adapter")
    before = load().state_dict()
    whole = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter", autocast_adapter_dtype=False)
    after = whole.merge_and_unload().state_dict()
    weights, change, biases = [], [], []
    for layer in range(2):
        was, now = (layer_parts(state, family, layer, "weight") for state in (before, after))
        weights.append(was)
        change.append({part: now[part] - was[part] for part in was})
        was, now = (layer_parts(state, family, layer, "bias") for state in (before, after))
        biases.append({part: (now[part] - was[part])[:, 0] if was else np.zeros(64) for part in "qkv"})
    expected = oracle.update_lines(change, weights, shape, biases=biases)
    lines = update_from_factors(tmp_path / "adapter", base=base, bias=True).lines
    assert [(line["layer"], line["head"]) for line in lines] == list(expected)
    for line in lines:
        wanted = expected[line["layer"], line["head"]]
        del wanted["U_with_bias"]
        for key, value in wanted.items():
            assert (line[key] or 0.0) == pytest.approx(value, rel=CLOSE, abs=1e-13), (line["layer"], line["head"], key)

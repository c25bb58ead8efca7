"""Tiny models of many families, built in memory, with random adapters and random calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf

from loraforge.types import LowRank


@dataclass
class Case:
    """A model, its target modules and a maker of model inputs."""

    model: torch.nn.Module
    targets: tuple[str, ...]

    def modules(self):
        return {n: m for n, m in self.model.named_modules() if n.endswith(self.targets)}

    def factors(self, adapters, rank=2, seed=0, scale=0.5):
        """{module: [LowRank per adapter]} in float64."""
        g = torch.Generator().manual_seed(seed)
        found = {}
        for name, module in self.modules().items():
            out, into = module.weight.shape
            if type(module).__name__ == "Conv1D":
                out, into = into, out
            found[name] = [
                LowRank(
                    scale * torch.randn(out, rank, generator=g, dtype=torch.float64) / rank**0.5,
                    scale * torch.randn(rank, into, generator=g, dtype=torch.float64) / into**0.5,
                )
                for _ in range(adapters)
            ]
        return found


def text(g, samples, length, vocab=50, ragged=True):
    ids = torch.randint(3, vocab, (samples, length), generator=g)
    mask = torch.ones_like(ids)
    if ragged:
        for row in range(samples):
            keep = int(torch.randint(2, length + 1, (1,), generator=g))
            mask[row, keep:] = 0
            ids[row, keep:] = 0
    return ids, mask


def bert():
    config = tf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return Case(tf.BertModel(config), ("query", "value", "attention.output.dense", "intermediate.dense"))


def llama():
    config = tf.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return Case(tf.LlamaForCausalLM(config), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))


def gpt2():
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return Case(tf.GPT2LMHeadModel(config), ("attn.c_attn", "mlp.c_proj"))


def t5():
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return Case(tf.T5ForConditionalGeneration(config), (".q", ".v"))


def vit():
    config = tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    model = tf.ViTForImageClassification(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "classifier" not in n]
    return Case(model, tuple(n for n in linear if ".0." in n or ".1." in n))


def blip():
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    words = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "encoder_hidden_size": 16,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = tf.BlipConfig(text_config=words, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    return Case(tf.BlipForConditionalGeneration(config), ("query", "key", "value"))


def deberta():
    config = tf.DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
    )
    return Case(tf.DebertaV2Model(config), ("query_proj", "value_proj", "intermediate.dense"))


def xlnet():
    config = tf.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24)
    return Case(tf.XLNetModel(config), ("layer_1", "layer_2"))


def inputs_of(family, g, samples, length):
    """Batched model inputs of one task."""
    if family == "vit":
        return {"pixel_values": torch.randn(samples, 1, 8, 8, generator=g, dtype=torch.float64)}
    ids, mask = text(g, samples, length)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = text(g, samples, length - 2)
        inputs["decoder_input_ids"][:, 0] = 0
    if family == "blip":
        inputs["pixel_values"] = torch.randn(samples, 3, 8, 8, generator=g, dtype=torch.float64)
    return inputs


# Models that read their inputs in ways of their own: one table of positions for all samples; tokens before samples.
UNUSUAL = {"deberta": deberta, "xlnet": xlnet}
FAMILIES = {"bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5, "vit": vit, "blip": blip}


def make(family, seed=0):
    torch.manual_seed(seed)
    case = (FAMILIES | UNUSUAL)[family]()
    case.model = case.model.double().eval()
    # Random initial weights give nearly linear layers; larger ones make the modules depend on each other.
    with torch.no_grad():
        for name, p in case.model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(6.0)
    return case

"""Tiny models of many architectures, in memory, and what is known of their heads. No network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, HIDDEN, LENGTH = 40, 16, 64
_BODY = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2}
_MHA = {**_BODY, "num_attention_heads": 4, "max_position_embeddings": LENGTH, "pad_token_id": 0}
_GQA = {**_MHA, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_PICTURE = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_PICTURE |= {"image_size": 8, "patch_size": 4}
_SEQ2SEQ = {"vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2}
_SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
_LATENT = {**_GQA, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
_LATENT |= {"qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
_LATENT |= {"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_NEXT = {**_GQA, "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_NEXT |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
_NEXT |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
_JAMBA |= {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}


class Known(NamedTuple):
    """An architecture: classes of transformers, configuration, and what the layout must be.

    `parts` lists the projections of an attention that have rows a head; `last` is the module of the last gate.
    """

    model: str
    config: str
    options: dict[str, Any]
    stacks: tuple[str, ...]
    heads: tuple[int, int, int]  # query heads, key-value heads, columns of o a head; of the last attention
    last: str
    parts: str = "qkv"


_ENC, _DEC = ("enc self 0", "enc self 1"), ("dec self 0", "dec self 1")
_BOTH = (*_ENC, "dec self 0", "dec cross 0", "dec self 1", "dec cross 1")
_BERT = "encoder.layer.1.attention.output.dense"
_LLAMA = "layers.1.self_attn.o_proj"
_FUSED = "h.1.self_attention.dense"
_DEBERTA = {**_MHA, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_DISTIL = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}
_FALCON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
_FALCON |= {"bos_token_id": 1, "eos_token_id": 1}
_OPT = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT |= {"word_embed_proj_dim": HIDDEN, "max_position_embeddings": LENGTH}
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}

ARCHITECTURES = {
    "bert": Known("BertModel", "BertConfig", _MHA, _ENC, (4, 4, 4), _BERT),
    "roberta": Known("RobertaModel", "RobertaConfig", _MHA, _ENC, (4, 4, 4), _BERT),
    "electra": Known("ElectraModel", "ElectraConfig", {**_MHA, "embedding_size": HIDDEN}, _ENC, (4, 4, 4), _BERT),
    "deberta": Known("DebertaModel", "DebertaConfig", _DEBERTA, _ENC, (4, 4, 4), _BERT),
    "deberta-v2": Known(
        "DebertaV2Model", "DebertaV2Config", {**_DEBERTA, "share_att_key": True, "type_vocab_size": 0}, _ENC, (4, 4, 4),
        _BERT,
    ),
    "distilbert": Known(
        "DistilBertModel", "DistilBertConfig", _DISTIL, _ENC, (4, 4, 4), "transformer.layer.1.attention.out_lin"
    ),
    "modernbert": Known(
        "ModernBertModel", "ModernBertConfig", {**_MHA, **_SPECIAL}, _ENC, (4, 4, 4), "layers.1.attn.Wo"
    ),
    "vit": Known("ViTModel", "ViTConfig", _PICTURE, _ENC, (4, 4, 4), "layers.1.attention.o_proj"),
    "clip_vision": Known(
        "CLIPVisionModel", "CLIPVisionConfig", _PICTURE, _ENC, (4, 4, 4), "encoder.layers.1.self_attn.out_proj"
    ),
    "t5": Known("T5Model", "T5Config", _T5, _BOTH, (4, 4, 6), "decoder.block.1.layer.1.EncDecAttention.o"),
    "bart": Known(
        "BartModel", "BartConfig", {**_SEQ2SEQ, "max_position_embeddings": LENGTH}, _BOTH, (2, 2, 8),
        "decoder.layers.1.encoder_attn.out_proj",
    ),
    "whisper": Known(
        "WhisperModel", "WhisperConfig", _WHISPER, _BOTH, (2, 2, 8), "decoder.layers.1.encoder_attn.out_proj"
    ),
    "llama": Known("LlamaModel", "LlamaConfig", _GQA, _DEC, (4, 2, 4), _LLAMA),
    "mistral": Known("MistralModel", "MistralConfig", {**_GQA, "head_dim": 8}, _DEC, (4, 2, 8), _LLAMA),
    "qwen2": Known("Qwen2Model", "Qwen2Config", _GQA, _DEC, (4, 2, 4), _LLAMA),
    "qwen3": Known("Qwen3Model", "Qwen3Config", {**_GQA, "head_dim": 8}, _DEC, (4, 2, 8), _LLAMA),
    "gemma3_text": Known("Gemma3TextModel", "Gemma3TextConfig", {**_GQA, "head_dim": 8}, _DEC, (4, 2, 8), _LLAMA),
    "olmo2": Known("Olmo2Model", "Olmo2Config", _GQA, _DEC, (4, 2, 4), _LLAMA),
    "phi3": Known("Phi3Model", "Phi3Config", _GQA, _DEC, (4, 2, 4), _LLAMA),
    "deepseek_v3": Known("DeepseekV3Model", "DeepseekV3Config", _LATENT, _DEC, (4, 4, 6), _LLAMA, parts=""),
    "opt": Known("OPTModel", "OPTConfig", _OPT, _DEC, (4, 4, 4), "decoder.layers.1.self_attn.out_proj"),
    "gpt2": Known("GPT2Model", "GPT2Config", {**_GPT, "n_positions": LENGTH}, _DEC, (4, 4, 4), "h.1.attn.c_proj"),
    "gpt_bigcode": Known(
        "GPTBigCodeModel", "GPTBigCodeConfig", {**_GPT, "n_positions": LENGTH}, _DEC, (4, 1, 4), "h.1.attn.c_proj"
    ),
    "gptj": Known(
        "GPTJModel", "GPTJConfig", {**_GPT, "rotary_dim": 4, "n_positions": LENGTH}, _DEC, (4, 4, 4),
        "h.1.attn.out_proj",
    ),
    "gpt_neox": Known("GPTNeoXModel", "GPTNeoXConfig", _MHA, _DEC, (4, 4, 4), "layers.1.attention.dense"),
    "bloom": Known(
        "BloomModel", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}, _DEC,
        (4, 4, 4), _FUSED,
    ),
    "falcon": Known("FalconModel", "FalconConfig", _FALCON, _DEC, (4, 1, 4), _FUSED),
    "falcon-new": Known(
        "FalconModel", "FalconConfig", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, _DEC,
        (4, 2, 4), _FUSED, parts="kv",
    ),
    "falcon-alternating": Known(
        "FalconModel", "FalconConfig", {**_FALCON, "multi_query": False, "alibi": True}, _DEC, (4, 4, 4), _FUSED
    ),
    "mpt": Known(
        "MptModel", "MptConfig", {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4}, _DEC, (4, 4, 4),
        "blocks.1.attn.out_proj",
    ),
    "qwen3_next": Known(
        "Qwen3NextModel", "Qwen3NextConfig", _NEXT, ("dec self 3",), (4, 2, 8), "layers.3.self_attn.o_proj"
    ),
    "bamba": Known("BambaModel", "BambaConfig", {**_GQA, **_BAMBA}, ("dec self 1",), (4, 2, 4), _LLAMA),
    "jamba": Known("JambaModel", "JambaConfig", {**_GQA, **_JAMBA}, ("dec self 1",), (4, 2, 4), _LLAMA),
}  # fmt: skip
# Built from two configurations.
COMPOSED = ("clip", "llava", "bert-gpt2")


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of an architecture, in evaluation mode, its matrices large enough that every head matters.

    Args:
        name: Key of ARCHITECTURES.
        seed: Of the weights.
        **changes: Of the configuration.
    """
    known = ARCHITECTURES[name]
    config = getattr(tf, known.config)(**{**known.options, **changes})
    return lively(getattr(tf, known.model), config, seed)


def composed(name: str) -> nn.Module:
    """A model of two: text and picture towers, a picture model before a language model, or encoder and decoder."""
    text, picture = tf.LlamaConfig(**_GQA), tf.CLIPVisionConfig(**_PICTURE)
    if name == "clip":
        words = {**_MHA, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        return lively(tf.CLIPModel, tf.CLIPConfig(text_config=words, vision_config=_PICTURE, projection_dim=HIDDEN))
    if name == "llava":
        config = tf.LlavaConfig(vision_config=picture, text_config=text, image_token_id=VOCAB - 1, image_seq_length=4)
        return lively(tf.LlavaForConditionalGeneration, config)
    decoder = tf.GPT2Config(**_GPT, n_positions=LENGTH, add_cross_attention=True)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**_MHA), decoder)
    return lively(lambda config: tf.EncoderDecoderModel(config=config), config)


def lively(make: Any, config: Any, seed: int = 0) -> nn.Module:
    """The model with matrices of standard deviation 0.3: those of the initialiser leave heads next to nothing to do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = make(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The last hidden state (B, T, d) of a pass: of the decoder, where there are two."""
    return model(**inputs)[0]

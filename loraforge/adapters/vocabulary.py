"""Dots for names that a format has flattened: `down_blocks_0_attn1_to_out_0` -> `down_blocks.0.attn1.to_out.0`.

Flattening writes dots and underscores alike, so the way back needs to know which words contain an underscore. The words
below are those of diffusion models (UNet, DiT, CLIP and T5 text encoders) and of common transformers. A name is put
together again from the fewest words; a name with a part that no word explains, or with two equally short readings, is
refused: nothing is guessed.
"""

from __future__ import annotations

from loraforge.errors import LoraforgeError

_UNET = """
down_blocks up_blocks mid_block attentions transformer_blocks single_transformer_blocks resnets downsamplers upsamplers
conv conv1 conv2 conv_in conv_out conv_shortcut conv_norm_out time_embedding time_emb_proj time_embed add_embedding
class_embedding linear_1 linear_2 attn1 attn2 to_q to_k to_v to_out to_qkv ff net proj proj_in proj_out norm norm1
norm2 norm3 group_norm motion_modules input_blocks middle_block output_blocks in_layers out_layers emb_layers
skip_connection op
"""
_DIT = """
double_blocks single_blocks joint_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in vector_in
time_in guidance_in in_layer out_layer qkv lin linear linear1 linear2 modulation final_layer adaLN_modulation x_block
context_block x_embedder context_embedder y_embedder t_embedder time_text_embed timestep_embedder guidance_embedder
text_embedder add_q_proj add_k_proj add_v_proj to_add_out to_added_qkv ff_context norm1_context proj_mlp norm_out
attn blocks cross_attn self_attn ffn head patch_embedding text_embedding time_projection caption_projection
"""
_TEXT = """
text_model text_encoder vision_model encoder decoder layers layer embeddings token_embedding position_embedding
text_projection visual_projection q_proj k_proj v_proj out_proj o_proj mlp fc1 fc2 final_layer_norm layer_norm1
layer_norm2 shared block SelfAttention EncDecAttention DenseReluDense q k v o wi wi_0 wi_1 wo
"""
_TRANSFORMERS = """
model base_model language_model transformer h wte wpe c_attn c_proj c_fc attention attn_output self query key value
output dense intermediate pooler bert roberta distilbert electra deberta vit q_lin k_lin v_lin out_lin lin1 lin2
gate_proj up_proj down_proj gate_up_proj qkv_proj Wqkv out_proj W_pack query_key_value dense_h_to_4h dense_4h_to_h
encoder_attn project_in project_out embed_tokens embed_positions word_embeddings position_embeddings lm_head score
classifier pre_classifier gpt_neox in_proj w1 w2 w3 gate experts block_sparse_moe shared_expert shared_experts
key_proj query_proj value_proj pos_key_proj pos_query_proj x_proj dt_proj mixer backbone patch_embeddings projection
"""
WORDS = frozenset(f"{_UNET} {_DIT} {_TEXT} {_TRANSFORMERS}".split())
_LONGEST = max(word.count("_") + 1 for word in WORDS)


def restored(name: str) -> str:
    """The dotted name of a flattened one; a name that has dots is one already.

    Args:
        name: Without the prefix of its format (`lora_unet_`).

    Raises:
        LoraforgeError: The words do not explain it, or explain it in two ways.
    """
    if "." in name:
        return name
    parts = name.split("_")
    # best[i]: the readings of parts[:i] with the fewest words; two are enough to know that there is not only one.
    best: list[list[list[str]]] = [[[]]]
    for end in range(1, len(parts) + 1):
        readings: list[list[str]] = []
        for start in range(max(0, end - _LONGEST), end):
            word = "_".join(parts[start:end])
            if word in WORDS or word.isdecimal():
                readings += [[*reading, word] for reading in best[start]]
        fewest = min((len(reading) for reading in readings), default=0)
        best.append([reading for reading in readings if len(reading) == fewest][:2])
    if len(best[-1]) == 1:
        return ".".join(best[-1][0])
    raise LoraforgeError(
        "The dots of a module name cannot be restored",
        where=name,
        got=" or ".join(".".join(reading) for reading in best[-1]) or f"an unknown word: {_first_unknown(parts, best)}",
        expected="words of known models; the format has replaced dots by underscores",
        hint="keep this adapter in its format (--to kohya, --format kohya)",
    )


def _first_unknown(parts: list[str], best: list[list[list[str]]]) -> str:
    """What stands behind the longest beginning that can be read."""
    readable = max(i for i, readings in enumerate(best) if readings)
    return "_".join(parts[readable:])

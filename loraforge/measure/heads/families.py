"""Names of attention projections across the architectures of transformers, and the layout that shapes give. Torch-free.

A projection is told by the last words of its name (`self_attn.q_proj`, `attention.output.dense`), its layer by the
number behind `layers`, `h`, `block`. Heads come from the configuration; their sizes from the shapes alone, because
heads x size is not the hidden size in many families.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.cutting import Cutter, Shape
from loraforge.measure.heads.layout import KINDS, STACKS, Attention, HeadLayout
from loraforge.measure.heads.sections import heads_of, mixes_without_heads, section_of

# Families whose linear layers are Conv1D: their files hold (in, out).
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_ENCODERS = frozenset({"eurobert", "modernbert", "nomic_bert", "neobert", "ijepa", "dinov3_vit"})
_SELF = {"self_attn", "attn", "attention", "self_attention", "SelfAttention", "longformer_self_attn", "temporal_block"}
_CROSS = {"EncDecAttention", "encoder_attn", "cross_attn", "crossattention", "cross_attention"}
_PARTS = {
    "q": ("q_proj", "q_lin", "q", "query", "query_proj", "q_attn"),
    "k": ("k_proj", "k_lin", "k", "key", "key_proj"),
    "v": ("v_proj", "v_lin", "v", "value", "value_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "o", "dense", "Wo", "c_proj", "proj", "projection", "output"),
    "qkv": ("query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv", "in_proj"),
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}
_LAYER = re.compile(r"(?:^|\.)(layers?|h|blocks?|resblocks|albert_layers)\.(\d+)(?=\.)")
_NO_SOFTMAX = re.compile(r"\.(linear_attn|mamba|mixer|ssm|short_conv|recurrent\w*)\.")
NO_HEADS, NO_ATTENTION = "linear attention or a state space: no softmax heads", "no attention that is known"
SHOWN = 12
_LIKE = re.compile(r"attn|attention|proj|query|key|value|qkv|q_head", re.IGNORECASE)
_Blocks = dict[tuple[str, str, int], tuple[str, dict[str, str]]]


class Place(NamedTuple):
    """Where a projection belongs.

    Attributes:
        stack: `enc` or `dec`.
        kind: `self` or `cross`.
        layer: Number within its stack.
        part: `q`, `k`, `v`, `o`, or `qkv` where several share a module.
        block: Dotted name of its transformer layer.
    """

    stack: str
    kind: str
    layer: int
    part: str
    block: str = ""


def locate(name: str, family: str = "") -> Place | None:
    """The place of a module in its model by its name; None where it is no attention projection that is known.

    Args:
        name: Dotted, with any prefix.
        family: `model_type` of the configuration, which tells encoders apart whose names do not.
    """
    found = _LAYER.search(name)
    if found is None or _NO_SOFTMAX.search(name):
        return None
    if found[1] != "block" and _LAYER.search(name, found.end()):
        return None  # layers in stages (Swin): a number alone does not name one
    words = name[found.end() + 1 :].split(".")
    part = _PART_OF.get(words[-1])
    inner = words[:-1]
    if words[-2:-1] in (["self"], ["output"]):  # attention.self.query, attention.output.dense
        inner = words[:-2]
        part = part if (part == "o") == (words[-2] == "output") else None
    if part is None or not inner or inner[-1] not in _SELF | _CROSS:
        return None
    kind = "cross" if _CROSS & set(inner) else "self"
    stack = _stack(name[: found.start()].split("."), found[1], inner[-1], words[-1], family)
    return Place(stack, kind, int(found[2]), part, name[: found.end()])


def _stack(prefix: list[str], container: str, attention: str, word: str, family: str) -> str:
    """The first word of the prefix that says it; without one, what models with such names are."""
    for part in prefix:
        if "decoder" in part:
            return "dec"
        if "encoder" in part or part.startswith(("vision", "visual", "image", "audio")):
            return "enc"
    like_vit = container != "h" and attention == "attention" and word.endswith(("_proj", "_lin"))
    like_modernbert = word in ("Wqkv", "Wo") and container == "layers"
    return "enc" if family in _ENCODERS or like_vit or like_modernbert else "dec"


def layout_from_shapes(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    where: object = None,
    *,
    transposed: Iterable[str] | None = None,
    skipped: Mapping[str, str] | None = None,
    partial: bool = False,
) -> HeadLayout:
    """The layout of a model by names, shapes and configuration; the doctor confirms it by running the model.

    Args:
        shapes: (out, in) of every module with a matrix, by dotted name.
        config: Content of config.json.
        where: For messages.
        transposed: Modules whose weight is stored as (in, out); None for what the family has.
        skipped: Modules that the caller left out, and why.
        partial: Some modules may be absent, as in an adapter: an attention without output projection is kept, with an
            `o` that has no name.

    Raises:
        LoraforgeError: No attention is known (lists what looks like one), heads and shapes contradict, or several
            attentions would have the same name, as in models of two towers.
    """
    family = str(config.get("model_type") or "")
    places, passed_over = _places(shapes, config)
    left_out = {**dict(skipped or {}), **passed_over}
    blocks = _blocks(places, where)
    if transposed is None:
        transposed = shapes if family in TRANSPOSED else ()
    stored = frozenset(transposed)
    attentions = []
    for (stack, kind, layer), (block, modules) in blocks.items():
        section = section_of(config, next(iter(modules.values())))
        if mixes_without_heads(section, layer):
            left_out[block] = NO_HEADS
        elif "o" not in modules and not partial:
            left_out[block] = f"no output projection is known beside {', '.join(sorted(modules.values()))}"
        else:
            cutter = Cutter(modules, shapes, heads_of(section, stack, layer), section, stored, where)
            attentions.append(Attention(stack, kind, layer, block=block, **cutter.attention()))
    if not attentions:
        raise _unknown(shapes, family, where, left_out)
    attentions.sort(key=order_of)
    return HeadLayout(family, tuple(attentions), left_out | _bare(shapes, {a.block for a in attentions}, left_out))


def layout_from_heads(
    names: Iterable[str],
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    shapes: Mapping[str, Shape],
    family: str = "",
) -> HeadLayout:
    """The layout of an adapter alone, its heads given by the user; an `o` that it does not change has no name.

    Args:
        names: Modules of the adapter.
        heads: Query heads of every attention.
        kv_heads: Key-value heads; None for what the value projection's rows say, else as many as `heads`.
        head_dim: Rows a head, where the adapter has neither query nor output projection.
        shapes: (out, in) of each module.
        family: `model_type`, where it is known: it says how q, k and v share a module.

    Raises:
        LoraforgeError: None of the modules is an attention projection, or the counts do not divide the shapes.
    """
    known = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "model_type": family}
    return layout_from_shapes({name: shapes[name] for name in names}, known, partial=True)


def _places(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> tuple[dict[str, Place], dict[str, str]]:
    """The places of the projections that are known, and the modules that mix tokens without softmax heads."""
    places: dict[str, Place] = {}
    left_out: dict[str, str] = {}
    for name in shapes:
        if found := _NO_SOFTMAX.search(name):
            left_out[name[: found.end() - 1]] = NO_HEADS
        elif place := locate(name, str(section_of(config, name).get("model_type") or "")):
            places[name] = place
    return places, left_out


def _blocks(places: Mapping[str, Place], where: object) -> _Blocks:
    """(stack, kind, layer) -> its block, and its modules by part.

    Raises:
        LoraforgeError: Two blocks have the same key, or a part comes twice.
    """
    found: _Blocks = {}
    for name, place in places.items():
        block, modules = found.setdefault(place[:3], (place.block, {}))
        if block != place.block or place.part in modules:
            other = modules.get(place.part, block)
            raise LoraforgeError(
                "two attentions of the model would have the same name",
                where=where,
                got=f"{other} and {name}",
                expected="one encoder and one decoder at most",
                hint="measure one tower by itself: its own model folder, or model.text_model in Python",
            )
        modules[place.part] = name
    return found


def _bare(shapes: Iterable[str], blocks: set[str], left_out: Iterable[str]) -> dict[str, str]:
    """Layers beside those with attention that have none."""
    known = tuple(f"{name}." for name in left_out)
    beside = {block.rpartition(".")[0] for block in blocks}
    found: dict[str, str] = {}
    for name in shapes:
        place = _LAYER.search(name)
        block = name[: place.end()] if place else ""
        told = block in blocks or any(name.startswith(f"{block}.") for name in known)
        if block.rpartition(".")[0] in beside - {""} and not told:
            found[block] = NO_ATTENTION
    return found


def order_of(attention: Attention) -> tuple[int, int, int]:
    """Sorts attentions as layouts have them: encoder before decoder, layer by layer, self before cross."""
    return STACKS.index(attention.stack), attention.layer, KINDS.index(attention.kind)


def _unknown(shapes: Mapping[str, Shape], family: str, where: object, left_out: Mapping[str, str]) -> LoraforgeError:
    """What to say of a model without an attention that is known: its modules that look like one."""
    alike = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in shapes if _LIKE.search(name))
    seen = ", ".join([*alike][:SHOWN]) or ", ".join([*shapes][:SHOWN]) or "no module with a matrix"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in [*left_out.items()][:3])
    return LoraforgeError(
        f"no attention is known in this model{f' ({family})' if family else ''}",
        where=where,
        got=f"{seen}{f' ({reasons})' if reasons else ''}",
        expected="an output projection such as self_attn.o_proj or attention.output.dense in every layer",
    )

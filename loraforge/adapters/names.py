"""Module names across formats.

Formats write one module in several ways: `unet.down_blocks.0.attn1.to_k` (diffusers),
`lora_unet_down_blocks_0_attn1_to_k` (kohya), and the latter with a doubled prefix where a tool flattened a name that
had one already. `flat` makes them equal; it cannot be inverted, because dots and underscores fall together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraforge.errors import LoraforgeError

if TYPE_CHECKING:
    from loraforge.adapters.reader import Adapter

# Prefix of a flattened name -> what it means. The first text encoder of two is the only one of one.
_COMPONENTS = (
    ("lora_unet_", "unet_"), ("lora_te1_", "te_"), ("lora_te2_", "te2_"), ("lora_te3_", "te3_"), ("lora_te_", "te_"),
    ("lora_transformer_", "transformer_"), ("lycoris_", ""), ("unet_", "unet_"), ("diffusion_model_", "unet_"),
    ("text_encoder_2_", "te2_"), ("text_encoder_3_", "te3_"), ("text_encoder_", "te_"),
    ("transformer_", "transformer_"),
)  # fmt: skip
_DOTTED_COMPONENTS = re.compile(r"(unet|transformer|text_encoder(_[23])?|diffusion_model)\.")
_FLAT_PREFIX = re.compile(r"(lora_(unet|te[123]?|transformer)|lycoris)_")
# Attention processors of old diffusers files name a projection by its role, not by the module it belongs to.
_TEXT_ROLES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def flat(name: str) -> str:
    """A name that is the same however a format spells the module: dots to underscores, prefixes normalised.

    `unet.down_blocks.0.to_k`, `lora_unet_down_blocks_0_to_k` and `lora_unet_unet_down_blocks_0_to_k` all give
    `unet_down_blocks_0_to_k`; `lora_te_`, `lora_te1_` and `text_encoder.` give `te_`.
    """
    plain = name.replace(".", "_")
    for prefix, component in _COMPONENTS:
        if plain.startswith(prefix):
            rest = plain.removeprefix(prefix)
            # A name that carried its component already was flattened with a second one in front.
            doubled = next((p for p, c in _COMPONENTS if c == component and c and rest.startswith(p)), "")
            return component + (rest.removeprefix(doubled) if prefix.startswith("lora_") else rest)
    return plain


def is_flat_name(name: str) -> bool:
    """True for names of the kohya kind, `lora_unet_...`, `lora_te_...`, `lycoris_...`."""
    return _FLAT_PREFIX.match(name) is not None


def has_component(name: str) -> bool:
    """True for dotted names that start with a part of a diffusion pipeline, such as `unet.` or `text_encoder.`."""
    return _DOTTED_COMPONENTS.match(name) is not None


def plain_module(stem: str) -> str:
    """The module that an attention processor's name stands for; any other name as it is.

    `X.attn1.processor.to_q` is `X.attn1.to_q`, `X.processor.to_out` is `X.to_out.0`; in a text encoder
    `X.self_attn.to_q` is `X.self_attn.q_proj`.
    """
    head, _, last = stem.rpartition(".")
    if head.endswith(".processor"):
        return head.removesuffix(".processor") + "." + ("to_out.0" if last == "to_out" else last)
    if last in _TEXT_ROLES and stem.startswith("text_encoder") and head.endswith(".self_attn"):
        return f"{head}.{_TEXT_ROLES[last]}"
    return stem


def with_common_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under one naming: modules whose flat names agree get the name that the first of them uses.

    Adapters that are all PEFT's are returned as they are. A PEFT adapter of one part of a pipeline, whose names lack
    `unet.`, is matched by the rest of the name where no whole name fits.

    Raises:
        LoraforgeError: Two modules of one adapter have one flat name, so which is meant cannot be told.
    """
    if len({adapter.format for adapter in adapters} | {"peft"}) == 1:
        return list(adapters)
    canonical: dict[str, str] = {}
    renamed: list[Adapter] = []
    for adapter in adapters:
        flats = _flats(adapter)
        if canonical and not flats.keys() & canonical.keys():
            flats = _without_component(flats, canonical)
        renamed.append(adapter.renamed({name: canonical.get(f, name) for f, name in flats.items()}))
        for f, name in flats.items():
            canonical.setdefault(f, name)
    return renamed


def _flats(adapter: Adapter) -> dict[str, str]:
    """Flat name -> name.

    Raises:
        LoraforgeError: Two names have one flat name.
    """
    found: dict[str, str] = {}
    for name in adapter.modules:
        other = found.setdefault(flat(name), name)
        if other != name:
            raise LoraforgeError(
                "Two modules of an adapter have one name in other formats",
                where=adapter.path,
                got=f"{other}, {name}",
                expected="names that differ in more than dots and underscores",
            )
    return found


def _without_component(flats: dict[str, str], canonical: dict[str, str]) -> dict[str, str]:
    """The flat names with a component in front or without, whichever meets `canonical`; unchanged where none does."""
    for component in ("unet_", "transformer_", "te_"):
        for changed in (
            {component + f: name for f, name in flats.items()},
            {f.removeprefix(component): name for f, name in flats.items()},
        ):
            if changed.keys() & canonical.keys() and len(changed) == len(flats):
                return changed
    return flats

"""How many heads a configuration says: which part of it describes a module, and under which key. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_QUERY = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
_KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Keys by which configurations tell that layers are of several sorts.
_MIXED = ("attn_layer", "attn_idxs", "block_type", "hybrid", "mamba", "ssm")
# Parts of a composed model, as the keys of its configuration name them.
_TOWERS = ("text", "language", "llm", "vision", "audio", "speech", "qformer", "encoder", "decoder")
_SIDES = {"enc": "encoder", "dec": "decoder"}


class Heads(NamedTuple):
    """Query heads, and key-value heads; None where the configuration does not say."""

    n_q: int | None
    n_kv: int | None


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part of a configuration that describes a module of a composed model; the whole one of any other model.

    Args:
        config: Content of config.json: `text_config`, `vision_config`, ..., or `encoder` and `decoder`, are its parts.
        name: Dotted name of the module.
    """
    parts = {key.removesuffix("_config"): value for key, value in config.items() if isinstance(value, Mapping)}
    parts = {key: value for key, value in parts.items() if key in _TOWERS}
    for word in name.split("."):
        for key, value in parts.items():
            if key in word or (key == "vision" and word.startswith("visual")):
                return section_of(value, name)
    if "text" in parts and _first(config, _QUERY) is None:
        return section_of(parts["text"], name)
    return config


def heads_of(section: Mapping[str, Any], stack: str, layer: int) -> Heads:
    """Heads of an attention by its section of the configuration.

    Args:
        section: What `section_of` gave.
        stack: `enc` or `dec`; some families count the two apart.
        layer: Number within the stack; some families have a list of counts.
    """
    side = _SIDES[stack]
    own = (f"{side}_attention_heads", f"{side}_num_attention_heads", f"num_{side}_attention_heads")
    n_q = _at(_first(section, (*own, *_QUERY)), layer)
    n_kv = _at(_first(section, (f"{side}_num_key_value_heads", *_KEY_VALUE)), layer)
    if section.get("model_type") in ("falcon", "gpt_bigcode") and not section.get("new_decoder_architecture"):
        n_kv = 1 if section.get("multi_query", True) else n_q
    return Heads(n_q, n_kv)


def layers_of(section: Mapping[str, Any], stack: str) -> int | None:
    """Layers of a stack by its section of the configuration; None where it does not say that all of them attend.

    Args:
        section: What `section_of` gave.
        stack: `enc` or `dec`; some families count the two apart.
    """
    if any(word in key for key in section for word in _MIXED):
        return None
    side = _SIDES[stack]
    return _at(_first(section, (f"{side}_layers", f"num_{side}_layers", *_LAYERS)), 0)


def lacks_heads(config: Mapping[str, Any]) -> bool:
    """Whether a part of a composed model does not say its heads: transformers leaves defaults out of such parts."""
    parts = [config[key] for tower in _TOWERS for key in (tower, f"{tower}_config") if key in config]
    return any(isinstance(part, Mapping) and heads_of(part, "enc", 0).n_q is None for part in parts)


def mixes_without_heads(section: Mapping[str, Any], layer: int) -> bool:
    """Whether the configuration says that a layer is no softmax attention, whatever its modules are called."""
    kinds = section.get("layer_types")
    kind = kinds[layer] if isinstance(kinds, list | tuple) and layer < len(kinds) else ""
    return any(word in str(kind) for word in ("linear", "mamba", "conv", "recurrent"))


def _first(section: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of the keys that is there, also in `attn_config`."""
    nested = section.get("attn_config")
    places = (section, nested) if isinstance(nested, Mapping) else (section,)
    return next((place[key] for key in keys for place in places if place.get(key) is not None), None)


def _at(value: Any, layer: int) -> int | None:
    """A count, or the layer's of a list of counts; None for anything else."""
    if isinstance(value, list | tuple):
        value = value[layer] if layer < len(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

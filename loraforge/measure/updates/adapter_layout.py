"""Where the heads of an adapter alone are: by its base's weights, by a config.json, or by counts from the user."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraforge.adapters import Adapter
from loraforge.errors import LoraforgeError
from loraforge.measure.heads.families import NO_ATTENTION, layout_from_heads, layout_from_shapes, locate, order_of
from loraforge.measure.heads.layout import PARTS, Attention, HeadLayout, Projection
from loraforge.measure.heads.sections import heads_of, layers_of, mixes_without_heads, section_of

CONFIG = "config.json"
# Head by head in some families, one behind the other in others.
_UNCLEAR = (".query_key_value", ".in_proj")


def adapter_layout(
    adapter: Adapter,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> HeadLayout:
    """The layout of an adapter's base; no weights of the base are looked at.

    With a configuration, layers that the adapter leaves alone are there too, their projections without names, so that
    their heads get lines. Counts from the user say nothing of such layers.

    Args:
        adapter: The adapter.
        config: config.json of the base: its content, the file, or the folder it is in. None: that of the base which
            adapter_config.json names, where it is on this machine.
        heads: Query heads of every attention; no configuration is then looked for.
        kv_heads: Key-value heads.
        head_dim: Rows a head.

    Raises:
        LoraforgeError: Nothing says how many heads there are; names the options that would.
    """
    shapes = {name: (info.m, info.n) for name in adapter.modules if (info := adapter.info(name)).kind == "linear"}
    for key in adapter.heads:
        # An attention projection that is trained in full has heads as well.
        name = key.removesuffix(".weight")
        if name != key and locate(name) is not None:
            m, n = adapter.load_head(key).shape
            shapes[name] = m, n
    if heads is not None:
        _refuse_unknown_order(shapes, adapter)
        return layout_from_heads(list(shapes), heads=heads, kv_heads=kv_heads, head_dim=head_dim, shapes=shapes)
    content = _content(config) if config is not None else _config_of_base(adapter.base)
    if content is None:
        raise LoraforgeError(
            "nothing says how many heads the base has", where=adapter.path,
            got=f"base {adapter.base}, which is not on this machine" if adapter.base else "no name of a base",
            expected="the base's config.json, or the number of heads",
            hint="add --base MODEL, --config FILE, or --heads N [--kv-heads K] [--head-dim D]",
        )  # fmt: skip
    if head_dim is not None:
        content = {**content, "head_dim": head_dim}
    return _with_untouched(layout_from_shapes(shapes, content, adapter.path, partial=True), content)


def _with_untouched(layout: HeadLayout, config: Mapping[str, Any]) -> HeadLayout:
    """The layout with the attentions that the configuration says beside those of the adapter."""
    known = {(a.stack, a.kind, a.layer): a for a in layout.attentions}
    sample = {(a.stack, a.kind): a for a in layout.attentions}
    pairs: list[tuple[str, str]] = [*sample]
    if config.get("is_encoder_decoder"):
        pairs = [("enc", "self"), ("dec", "self"), ("dec", "cross")]
    for stack, kind in pairs:
        like = sample.get((stack, kind))
        side = "encoder" if stack == "enc" else "decoder"
        section = section_of(config, side if like is None else _name(like))
        for layer in range(layers_of(section, stack) or 0):
            n_q, n_kv = heads_of(section, stack, layer)
            if n_q is None or (stack, kind, layer) in known or mixes_without_heads(section, layer):
                continue
            groups = n_kv or (like.n_kv if like is not None and like.n_q == n_q else n_q)
            size = like.o.size if like is not None else 1
            known[stack, kind, layer] = Attention(stack, kind, layer, n_q, groups, o=Projection("", n_q, size))
    attentions = sorted(known.values(), key=order_of)
    skipped = {name: why for name, why in layout.skipped.items() if why != NO_ATTENTION}
    return replace(layout, attentions=tuple(attentions), skipped=skipped)


def _name(attention: Attention) -> str:
    """A module of an attention."""
    places = (attention.part(part) for part in PARTS)
    return next(place.module for place in places if place is not None and place.module)


def _refuse_unknown_order(shapes: Mapping[str, Any], adapter: Adapter) -> None:
    """Refuses fused projections of which families differ in where q, k and v of a head are.

    Raises:
        LoraforgeError: Naming one, and the option.
    """
    unclear = [name for name in shapes if name.endswith(_UNCLEAR) and locate(name) is not None]
    if unclear:
        raise LoraforgeError(
            "the order of q, k and v in a fused projection is not known by its name", where=adapter.path,
            got=unclear[0], expected="the model_type in the base's config.json",
            hint="--config FILE in place of --heads",
        )  # fmt: skip


def _content(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """Content of a configuration that the user named.

    Raises:
        LoraforgeError: It is not there or no JSON object.
    """
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    path = path / CONFIG if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraforgeError("the configuration cannot be read", where=path, got=str(error)[:120]) from error
    if not isinstance(content, dict):
        raise LoraforgeError("the configuration is no JSON object", where=path, got=type(content).__name__)
    return content


def _config_of_base(base: str | None) -> Mapping[str, Any] | None:
    """config.json of a base by the name that an adapter gives: a folder, or an id in the cache. Nothing is fetched."""
    if base is None:
        return None
    if Path(base).is_dir():
        return _content(base) if (Path(base) / CONFIG).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, CONFIG)
    except HFValidationError:  # a path of another machine
        return None
    return _content(found) if isinstance(found, str) else None

"""Names of tensors: what is safe, what is a head or an extra of a PEFT file, and how names are listed and sorted.

A head is a module saved in full (modules_to_save). Extras are biases, trained token rows and base weights that some
adapters carry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loraforge.adapters.config import PeftSettings
from loraforge.errors import LoraforgeError

PREFIX = "base_model.model."
_SAFE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]+")
_EMBEDDINGS = ("embed_tokens", "lm_head")


def head_module(name: str, settings: PeftSettings) -> str | None:
    """The module saved in full that a key belongs to, or None.

    As in PEFT, a module counts when its dotted name ends with an entry of modules_to_save ("classifier" takes
    "pre_classifier" too); the outermost such module is the one that was wrapped.
    """
    if ".base_layer." in name or not settings.head_names:
        return None
    parts = name.split(".")[:-1]
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((prefix for prefix in prefixes if prefix.endswith(tuple(settings.head_names))), None)


def is_extra(name: str, settings: PeftSettings) -> bool:
    """True for biases (with bias=all or lora_only), trained token rows and base or embedding weights."""
    if name.endswith((".token_adapter.trainable_tokens_delta", ".base_layer.weight", ".base_layer.bias")):
        return True
    if name.endswith(".bias"):
        return settings.bias != "none"
    parts = name.split(".")
    return parts[-1] == "weight" and len(parts) > 1 and parts[-2] in _EMBEDDINGS


def is_safe_name(name: str) -> bool:
    """True for dotted names whose parts are not empty and hold no separator or control character."""
    return _SAFE_NAME.fullmatch(name) is not None and all(part for part in name.split("."))


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a list and how many more there are."""
    listed = [repr(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def join_alike(problems: Sequence[LoraforgeError], limit: int = 5) -> list[LoraforgeError]:
    """At most `limit` problems of one kind, and one more that says how many were left out."""
    kept: list[LoraforgeError] = []
    counts: dict[str, int] = {}
    for problem in problems:
        kind = problem.what.partition("'")[0]
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= limit:
            kept.append(problem)
    more = {kind: count - limit for kind, count in counts.items() if count > limit}
    return kept + [LoraforgeError(f"{count} more like: {kind.strip()}") for kind, count in more.items()]

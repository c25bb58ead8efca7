"""Names of tensors in a PEFT LoRA file, sorted into factors, heads and extras.

A factor is `base_model.model.<module>.lora_A.weight` or `.lora_B.weight`. A head is a module saved in full
(modules_to_save). Extras are biases, trained token rows and base weights that some adapters carry. Everything else is
an error that lists the keys: nothing is read by halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loraforge.adapters.config import PeftSettings
from loraforge.errors import LoraforgeError

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SAFE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]+")
_EMBEDDINGS = ("embed_tokens", "lm_head")
# Keys of features that are refused by name, in the order of looking.
_FOREIGN = (
    (re.compile(r"lora_magnitude_vector|dora_scale"), "DoRA magnitudes"),
    (re.compile(r"\.lora_embedding_[AB]"), "LoRA on an embedding (lora_embedding_A/B)"),
    (re.compile(r"\.lora_[AB]\.bias$"), "a bias on lora_B (lora_bias)"),
    (re.compile(r"\.lora_(diag|E|ranknum)\b"), "KaSA or AdaLoRA tensors"),
    (re.compile(r"^w_[ab]_\d+$"), "Sam_LoRA tensors (w_a_000, w_b_000)"),
    (re.compile(r"^lora_(unet|te\d?|transformer)_|lora_(up|down|mid)\.weight$"), "kohya tensors (lora_up, lora_down)"),
    (re.compile(r"\.lora\.(up|down)\.weight$|lora_linear_layer"), "diffusers tensors (lora.up, lora.down)"),
    (re.compile(r"\.(hada|lokr|oft|boft|ia3|vera)_"), "LyCORIS, OFT, IA3 or VeRA tensors"),
)


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Where everything is in a file.

    Attributes:
        factors: module -> (key of A, key of B), both present.
        heads: name without prefix -> key in the file.
        extras: name without prefix -> key in the file.
    """

    factors: dict[str, tuple[str, str]]
    heads: dict[str, str]
    extras: dict[str, str]


def foreign_format(keys: Iterable[str]) -> str | None:
    """What kind of unsupported tensors `keys` holds, in words, or None."""
    listed = list(keys)
    return next((name for pattern, name in _FOREIGN if any(pattern.search(key) for key in listed)), None)


def sort_keys(keys: Iterable[str], settings: PeftSettings, path: Path) -> tuple[KeyTable, list[LoraforgeError]]:
    """Sorts the keys of a PEFT file.

    Args:
        keys: Every key of the file.
        settings: The adapter's configuration.
        path: The file, for messages.

    Returns:
        The table of what is well-formed, and the problems.
    """
    factors: dict[str, dict[str, str]] = {}
    table = KeyTable({}, {}, {})
    refused: dict[str, list[str]] = {}
    for key in sorted(keys):
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        foreign = foreign_format([key])
        if not is_safe_name(name):
            refused.setdefault("has names that are not dotted module names", []).append(key)
        elif match is not None and name != key:
            factors.setdefault(match["module"], {})[match["side"]] = key
        elif foreign is not None:
            refused.setdefault(f"holds {foreign}, which are not supported", []).append(key)
        elif name == key:
            refused.setdefault(f"has keys that do not start with '{PREFIX}'", []).append(key)
        elif head_module(name, settings) is not None:
            table.heads[name] = key
        elif is_extra(name, settings):
            table.extras[name] = key
        else:
            refused.setdefault("has keys that are no part of a LoRA adapter", []).append(key)
    problems = [
        LoraforgeError(f"The adapter {what}", where=path, got=shorten(names), expected="PEFT LoRA keys")
        for what, names in refused.items()
    ]
    for module, pair in factors.items():
        if len(pair) == 2:
            table.factors[module] = (pair["A"], pair["B"])
            continue
        have = next(iter(pair))
        problems.append(
            LoraforgeError(
                f"Module '{module}' has lora_{have} but no lora_{'B' if have == 'A' else 'A'}",
                where=f"{path}: {pair[have]}",
                expected="both factors",
                hint="the file is incomplete; save or copy the adapter again",
            )
        )
    return table, problems


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


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]

"""How the keys of LoRA tensors are spelled: a key is the name of a module and a suffix that says what the tensor is.

| spelling | met in |
|---|---|
| X.lora_A.weight, X.lora_A.default.weight, X.lora_A | PEFT, newer diffusers |
| X.lora_down.weight, X_lora_down.weight | kohya |
| X.lora.down.weight, X_lora.down.weight | diffusers, its attention processors |
| X.lora_linear_layer.down.weight | diffusers text encoders |
| X.alpha, X.dora_scale, X.lora_mid.weight | kohya, beside any of them |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = r"(?:\.default(?:_\d+)?)?"
_PEFT = (
    (re.compile(rf"(?P<stem>.+)\.lora_(?P<slot>[AB]){_NAME}\.weight"), "{slot}"),
    (re.compile(rf"(?P<stem>.+)\.lora_(?P<slot>embedding_[AB]){_NAME}"), "{slot}"),
    (re.compile(rf"(?P<stem>.+)\.lora_B{_NAME}\.bias"), "bias"),
    (re.compile(rf"(?P<stem>.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?"), "magnitude"),
    (re.compile(rf"(?P<stem>.+)\.(?P<slot>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)){_NAME}"), "{slot}"),
)
_OTHERS = (
    (re.compile(r"(?P<stem>.+)[._]lora(?:[._]linear_layer)?[._](?P<slot>down|up)\.weight"), "{slot}"),
    (re.compile(r"(?P<stem>.+)\.lora_(?P<slot>[AB])"), "{slot}"),
    (re.compile(r"(?P<stem>.+)[._]lora_mid\.weight"), "mid"),
    (re.compile(r"(?P<stem>.+)\.dora_scale"), "magnitude"),
    (re.compile(r"(?P<stem>.+)\.alpha"), "alpha"),
)
_SLOTS = {"down": "A", "up": "B"}
_PEFT_FACTOR = re.compile(r".+\.lora_(?:embedding_)?[AB]\b.*")

# Tensors that are no product added to the weight, or need the base to be read: refused by name.
_FOREIGN = (
    (
        re.compile(r"^w_[ab]_\d+$"),
        "Sam_LoRA tensors (w_a_000, w_b_000; a key map, key_map.json beside the file, makes them readable)",
    ),
    (re.compile(r"\.lora_(diag|E|ranknum)\b"), "KaSA or AdaLoRA tensors"),
    (re.compile(r"\.oft_|\.boft_|\.vera_|\.ia3_|\.on_input$"), "OFT, BOFT, IA3 or VeRA tensors"),
    (re.compile(r"\.[ab][12]\.weight$|\.bm$"), "GLoRA tensors (a1, a2, b1, b2)"),
    (re.compile(r"\.diff(_b)?$"), "whole weight differences (diff, diff_b)"),
    (re.compile(r"\.[wb]_norm$"), "trained normalisation layers (w_norm, b_norm)"),
    (re.compile(r"\.reshape_weight$"), "updates that reshape the weight (reshape_weight)"),
    (re.compile(r"\.set_weight$"), "replaced weights (set_weight)"),
)
_NOT_PEFT = (
    (re.compile(r"dora_scale"), "DoRA magnitudes of another format (dora_scale)"),
    (re.compile(r"[._]lora_(up|down|mid)\.weight$"), "kohya tensors (lora_up, lora_down)"),
    (re.compile(r"[._]lora\.(up|down)\.weight$|lora_linear_layer"), "diffusers tensors (lora.up, lora.down)"),
    (re.compile(r"\.(hada|lokr)_"), "LyCORIS tensors (hada, lokr)"),
)


class Spelled(NamedTuple):
    """A key taken apart: the module's name as written, and the slot of the tensor."""

    stem: str
    slot: str


def split_key(key: str, peft_only: bool = False) -> Spelled | None:
    """Module and slot of a key, or None where no known suffix fits.

    Args:
        key: The key, without "base_model.model.".
        peft_only: Accept PEFT's own suffixes alone.
    """
    for pattern, slot in _PEFT if peft_only else _PEFT + _OTHERS:
        match = pattern.fullmatch(key)
        if match is not None:
            found = slot.format(**match.groupdict())
            return Spelled(match["stem"], _SLOTS.get(found, found))
    return None


def is_peft_spelling(keys: Iterable[str]) -> bool:
    """True where all factors are spelled lora_A and lora_B."""
    factors = [key for key in keys if (found := split_key(key)) is not None and found.slot in ("A", "B")]
    return all(_PEFT_FACTOR.fullmatch(key) for key in factors)


def foreign_format(keys: Iterable[str], in_peft: bool = False) -> str | None:
    """What kind of unsupported tensors `keys` holds, in words, or None.

    Args:
        keys: Keys of a file.
        in_peft: Look for tensors of other formats too, which have no place in a PEFT file.
    """
    listed = list(keys)
    patterns = _FOREIGN + _NOT_PEFT if in_peft else _FOREIGN
    return next((name for pattern, name in patterns if any(pattern.search(key) for key in listed)), None)

"""Rows of text into samples, by the base's own tokenizer and in the way its kind of model reads them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraforge.calibrate.checks import DECODER, MASKS, Sample, text_config, usable_positions
from loraforge.calibrate.rows import Row, local_only
from loraforge.calibrate.tensors import shift_right
from loraforge.errors import LoraforgeError

DEFAULT_LENGTH = 512
_TASK_KINDS = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "encoder-decoder"}
# Without one of these transformers makes a tokenizer up, to which every word is unknown.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.codes",
    "tekken.json",
)  # fmt: skip
_UNKNOWN_SHARE = 0.9
_NO_TOKENIZER = (
    "give the calibration data as .safetensors model inputs (input_ids, attention_mask), which needs no tokenizer"
)
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def model_kind(config: Any, task_type: str | None = None) -> str:
    """How a model reads a target: 'encoder-decoder', 'causal' or 'encoder' (not at all).

    Args:
        config: The model's configuration, or None.
        task_type: The adapters' task type (PEFT's word), or None.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if task_type is not None:
        return _TASK_KINDS.get(task_type, "encoder")
    if config is None:
        return "encoder"
    names = getattr(config, "architectures", None)
    if names:
        return "causal" if names[0].endswith(_CAUSAL_ENDINGS) else "encoder"
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    # Encoders are in both tables; a family that has no masked form reads from left to right.
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return "causal" if causal else "encoder"


def length_limit(max_length: int | None, tokenizer: Any, config: Any) -> int:
    """Tokens a sample is cut to: `max_length` or what the model has positions for, if less.

    By default it is 512 or what model and tokenizer allow.
    """
    positions = usable_positions(config)
    if max_length is not None:
        return max_length if positions is None else min(max_length, positions)
    limits = [DEFAULT_LENGTH, getattr(tokenizer, "model_max_length", None), positions]
    return min(int(limit) for limit in limits if isinstance(limit, int | float) and limit > 0)


def warn_cut(samples: Sequence[Sample], limit: int, max_length: int | None, where: object) -> None:
    """Warns (UserWarning) where the model, not `max_length`, bounds the samples and some are as long as that."""
    full = sum(sample["input_ids"].shape[0] >= limit for sample in samples)
    if max_length is not None and limit < max_length and full:
        warnings.warn(
            f"{where}: texts are cut to the {limit} tokens that the base has positions for (max_length {max_length}); "
            f"{full} of {len(samples)} samples are that long",
            stacklevel=2,
        )


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, config: Any, kind: str, max_length: int, where: object
) -> list[Sample]:
    """Tokenises rows that all have text.

    Encoder-decoder: the target is forced on the decoder (labels shifted right). Causal: text and target are one
    sequence, with a space between them where neither side has one. Other models read the text alone.

    Returns:
        One sample a row: input_ids (L,), attention_mask (L,), token_type_ids where the model has types, and for
        targets decoder_input_ids (Ld,), decoder_attention_mask (Ld,).

    Raises:
        LoraforgeError: A text without tokens; words that the tokenizer does not know; a base without a start token.
    """
    texts = [_joined(row) if kind == "causal" else str(row.text) for row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    names = ["input_ids", MASKS[0]]
    # Some tokenizers make token types for models that have none, or that would read them as words.
    if text_config(config, "type_vocab_size") or config is None:
        names.append("token_type_ids")
    samples = [
        {name: torch.tensor(encoded[name][i], dtype=torch.int64) for name in names if name in encoded}
        for i in range(len(rows))
    ]
    if kind == "encoder-decoder" and rows[0].target is not None:
        targets = tokenizer(text_target=[row.target for row in rows], truncation=True, max_length=max_length)[
            "input_ids"
        ]
        for sample, row, ids in zip(samples, rows, targets, strict=True):
            labels = torch.tensor(ids, dtype=torch.int64)
            sample[DECODER[0]], sample[DECODER[1]] = shift_right(labels, config, f"{where}, {row.where}, target")
    for sample, row in zip(samples, rows, strict=True):
        if sample["input_ids"].numel() == 0:
            raise LoraforgeError("the text has no tokens", where=f"{where}, {row.where}", got=repr(row.text))
    check_known(samples, tokenizer, where)
    return samples


def load_tokenizer(base: object, where: object, hint: str = _NO_TOKENIZER) -> Any:
    """The tokenizer in a base model's folder or cached repository; fetched if LORAFORGE_ALLOW_DOWNLOAD=1 alone.

    Args:
        base: Folder or id of the base; None where none is known.
        where: What needs it, for messages.
        hint: What to do where there is none.

    Raises:
        LoraforgeError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if base is None:
        raise LoraforgeError("text needs the base's tokenizer, and no base folder is known", where=where, hint=hint)
    folder, what = Path(str(base)), "text needs a tokenizer, and the base has none that can be loaded"
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise LoraforgeError(
            what,
            where=base,
            got="no tokenizer files",
            expected="tokenizer.json, vocab.txt, spiece.model, ...",
            hint=hint,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=local_only())
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise LoraforgeError(what, where=base, got=str(error).strip().split("\n")[0], hint=hint) from error
    if not len(tokenizer):
        raise LoraforgeError("the base's tokenizer is empty", where=base, got="0 tokens", hint=hint)
    return tokenizer


def own_folder(config: Any) -> str | None:
    """The local folder that a configuration was loaded from, if it still is there."""
    origin = getattr(config, "_name_or_path", None)
    return origin if isinstance(origin, str) and origin and Path(origin).is_dir() else None


def check_known(samples: Sequence[Sample], tokenizer: Any, where: object) -> None:
    """Refuses texts of which next to nothing is left but unknown words (special tokens are not counted).

    Raises:
        LoraforgeError: More than nine tenths of the tokens are unknown.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    ids = torch.cat([sample["input_ids"] for sample in samples])
    special = [token for token in tokenizer.all_special_ids if token != unknown]
    counted = ids[~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))]
    missed = int((counted == unknown).sum())
    if missed > _UNKNOWN_SHARE * counted.numel():
        raise LoraforgeError(
            "the tokenizer does not know the words of this file",
            where=where,
            got=f"{missed} of {counted.numel()} tokens are unknown ({tokenizer.unk_token})",
            expected=f"at most {_UNKNOWN_SHARE:.0%}",
            hint=f"use a base with the tokenizer of these texts, or {_NO_TOKENIZER}",
        )


def _joined(row: Row) -> str:
    """Text and target as one sequence."""
    text, target = str(row.text), row.target
    if target is None:
        return text
    return text + target if text[-1:].isspace() or target[:1].isspace() else f"{text} {target}"

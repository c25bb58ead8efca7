"""Texts of a task into tensors, in the way its kind of model is trained.

A prompt and its answer are tokenised apart and joined: what a model reads in training is then, token for token, what
it reads when it generates. (A tokenizer that puts a space before every text puts one before the answer too, also behind
a line end.) Where a prompt is too long its beginning is cut; an answer is cut only where it alone exceeds the limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraforge.calibrate.checks import check_samples, text_config
from loraforge.calibrate.encode import check_known, length_limit
from loraforge.errors import LoraforgeError
from loraforge.tasks.collator import IGNORED

Example = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """How texts become tokens.

    Attributes:
        tokenizer: The base's.
        config: The base's configuration, or None.
        max_length: Tokens of an input (of prompt and answer together for causal models); None for the default.
        max_target_length: Tokens of an answer; None for no limit of its own.
        where: The source, for messages.
    """

    tokenizer: Any
    config: Any
    max_length: int | None
    max_target_length: int | None
    where: str

    @property
    def limit(self) -> int:
        """Tokens that an input is cut to."""
        return length_limit(self.max_length, self.tokenizer, self.config)


def encode_texts(
    texts: Sequence[str], pairs: Sequence[str] | None, reading: Reading, names: Sequence[str]
) -> list[Example]:
    """Inputs of encoders: one text or two, with the tokenizer's own special tokens, cut on the right.

    Args:
        texts: One a row.
        pairs: The second texts, or None.
        reading: How to read them.
        names: What to call each row.

    Returns:
        input_ids (L,), attention_mask (L,), and token_type_ids (L,) where the model has types.

    Raises:
        LoraforgeError: A text without tokens, tokens outside the vocabulary, words that the tokenizer does not know.
    """
    tokenizer, limit = reading.tokenizer, reading.limit
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    _check_limit(limit, special + (1 if pairs is None else 2), reading)
    both = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoded = tokenizer(*both, truncation=True, max_length=limit, return_overflowing_tokens=False)
    # Some tokenizers make token types for models that have none, or that would read them as words.
    types = ["token_type_ids"] if reading.config is None or text_config(reading.config, "type_vocab_size") else []
    keys = [key for key in ("input_ids", "attention_mask", *types) if key in encoded]
    examples = [{key: torch.tensor(encoded[key][i]) for key in keys} for i in range(len(texts))]
    full = [i for i, example in enumerate(examples) if example["input_ids"].shape[0] >= limit]
    if full:
        longer = tokenizer(*([part[i] for i in full] for part in both), verbose=False)["input_ids"]
        _warn_cut(sum(len(ids) > limit for ids in longer), len(texts), limit, reading)
    _check(examples, reading, names)
    return examples


def encode_answers(
    prompts: Sequence[str], answers: Sequence[str], reading: Reading, names: Sequence[str]
) -> list[Example]:
    """Inputs of encoder-decoders: the prompt is read, the answer is what the decoder gives (with its end token).

    Returns:
        input_ids, attention_mask (L,), labels (Lt,) each.

    Raises:
        LoraforgeError: As `encode_texts`.
    """
    examples = encode_texts(prompts, None, reading, names)
    limit = reading.max_target_length or reading.limit
    end = _end_token(reading)
    cut = 0
    targets = reading.tokenizer(text_target=list(answers), verbose=False)["input_ids"]
    for example, ids in zip(examples, targets, strict=True):
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        cut += len(ids) > limit
        # The end token stays: the decoder must learn to stop there.
        example["labels"] = torch.tensor(ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]])
    _warn_cut(cut, len(answers), limit, reading, "answers")
    return examples


def encode_continuations(
    prompts: Sequence[str],
    answers: Sequence[str],
    reading: Reading,
    names: Sequence[str],
    loss_on: str = "target",
    *,
    start: int | None = None,
    end: bool = True,
) -> tuple[list[Example], list[Example]]:
    """Inputs of causal models: start token, prompt, answer, end token.

    Args:
        prompts: One a row; empty for text without a prompt.
        answers: What is to be learnt. A space is put between prompt and answer where neither side has white space;
            spaces at the end of a prompt are moved to the answer, where the tokenizer's words begin.
        reading: How to read them.
        names: What to call each row.
        loss_on: `target`: labels of the prompt are -100; `all`: the prompt is learnt as well.
        start: A start token instead of the tokenizer's own.
        end: Whether the end token is appended.

    Returns:
        The examples: input_ids, attention_mask, labels (L,); and the prompts alone: input_ids, attention_mask (Lp,).

    Raises:
        LoraforgeError: As `encode_texts`.
    """
    tokenizer, limit = reading.tokenizer, reading.limit
    joined = [_joint(prompt, answer, _adds_space(tokenizer)) for prompt, answer in zip(prompts, answers, strict=True)]
    front = _front(tokenizer) if start is None else [start]
    tail = _end_token(reading) if end else None
    # The start, a token of the prompt, a token of the answer and its end.
    _check_limit(limit, len(front) + 2 + (tail is not None), reading)
    heads = tokenizer([head for head, _ in joined], add_special_tokens=False, verbose=False)["input_ids"]
    bodies = tokenizer([body for _, body in joined], add_special_tokens=False, verbose=False)["input_ids"]
    examples, asked, cut_prompts, cut_answers = [], [], 0, 0
    for head, body in zip(heads, bodies, strict=True):
        room = min(limit - len(front) - (1 if head else 0), reading.max_target_length or limit)
        answer = body if tail is None else [*body, tail]
        cut_answers += len(answer) > room
        answer = answer[:room]
        keep = limit - len(front) - len(answer)
        cut_prompts += len(head) > keep
        prompt = [*front, *head[max(0, len(head) - keep) :]]
        ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
        labels = ids.clone()
        if loss_on == "target":
            labels[: len(prompt)] = IGNORED
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        alone = torch.tensor(prompt, dtype=torch.int64)
        asked.append({"input_ids": alone, "attention_mask": torch.ones_like(alone)})
    _warn_cut(cut_prompts, len(examples), limit, reading, "prompts", "left")
    _warn_cut(cut_answers, len(examples), reading.max_target_length or limit, reading, "answers")
    _check([{key: e[key] for key in ("input_ids", "attention_mask")} for e in examples], reading, names)
    return examples, asked


def _joint(prompt: str, answer: str, adds_space: bool) -> tuple[str, str]:
    """The two texts as they are tokenised: the space between them belongs to the answer."""
    head = prompt.rstrip(" ")
    spaced = head != prompt or (head and not head[-1].isspace() and not answer[:1].isspace())
    body = f" {answer}" if spaced and not answer.startswith(" ") else answer
    # A tokenizer that puts a space before every text would make it two.
    return head, body.removeprefix(" ") if adds_space else body


def _adds_space(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a space before a text by itself, as SentencePiece does."""
    tokens = tokenizer.tokenize("a")
    return bool(tokens) and tokens[0].startswith("\u2581")


def _front(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []


def _end_token(reading: Reading) -> int | None:
    """The token that ends an answer: the tokenizer's end, or its separator where it has no end (BERT's, for BLIP)."""
    for name in ("eos_token_id", "sep_token_id"):
        token = getattr(reading.tokenizer, name, None)
        if token is not None:
            return int(token)
    return None


def pad_token_id_of(tokenizer: Any, config: Any) -> int | None:
    """The token that fills batches: the configuration's, the tokenizer's, or the end token where neither has one."""
    pads = (text_config(config, "pad_token_id"), getattr(tokenizer, "pad_token_id", None))
    ends = (text_config(config, "eos_token_id"), getattr(tokenizer, "eos_token_id", None))
    for token in (*pads, *ends):
        first = token[0] if isinstance(token, list) and token else token
        if isinstance(first, int) and first >= 0:
            return first
    return None


def _check(examples: Sequence[Example], reading: Reading, names: Sequence[str]) -> None:
    for example, name in zip(examples, names, strict=True):
        if example["input_ids"].numel() == 0:
            raise LoraforgeError("the text has no tokens", where=f"{reading.where}, {name}")
    check_samples(examples, reading.where, reading.config, names)
    check_known(examples, reading.tokenizer, reading.where)


def _check_limit(limit: int, needed: int, reading: Reading) -> None:
    """Refuses a limit that would leave no word of a text, or no answer."""
    if limit < needed:
        raise LoraforgeError(
            "the limit of tokens leaves no room for the text",
            where=reading.where,
            got=f"max_length {limit}",
            expected=f"{needed} or more with the special tokens of this base",
        )


def _warn_cut(count: int, rows: int, limit: int, reading: Reading, what: str = "texts", side: str = "right") -> None:
    if count:
        warnings.warn(
            f"{reading.where}: {count} of {rows} {what} are cut on the {side} to {limit} tokens",
            stacklevel=3,
        )

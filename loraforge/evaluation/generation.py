"""Greedy answers: the same on every run, whatever the model's own generation settings and whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from loraforge.calibrate.checks import usable_positions
from loraforge.errors import LoraforgeError
from loraforge.evaluation.batches import Example, plain_model, run_batches
from loraforge.tasks import Collator, pad_token_id_of

# Settings of a model's own generation that say what its tokens are, not how to choose among them.
_TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def generate(
    model: nn.Module,
    prompts: Sequence[Example],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    where: object = None,
    tick: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, without the prompt and without special tokens.

    Decoder-only models are padded on the left, so that every answer starts right behind its prompt.

    Args:
        model: In evaluation mode; a PEFT model generates with its active adapter.
        prompts: input_ids and attention_mask; pixel_values, with or without these, for a captioning model.
        tokenizer: Turns tokens into text and names the end of a text.
        max_new_tokens: Answers are cut there.
        batch_tokens: Tokens of prompts a batch.
        where: Named in errors.
        tick: Told how many rows are done.

    Raises:
        LoraforgeError: The model cannot generate, or prompt and answer exceed its positions.
    """
    plain = plain_model(model)
    captions = "pixel_values" in prompts[0]
    # A captioning model is a picture's encoder with a language model inside.
    writer = getattr(plain, "text_decoder", plain) if captions else plain
    if not hasattr(writer, "generate") or not writer.can_generate():
        raise LoraforgeError(
            "the model cannot generate", where=where, got=type(plain).__name__, expected="a language-model head"
        )
    encoder_decoder = bool(getattr(plain.config, "is_encoder_decoder", False))
    ends, pad = _ends(writer, tokenizer), pad_token_id_of(tokenizer, plain.config) or 0
    _check_positions(plain, prompts, 0 if encoder_decoder else max_new_tokens, where)

    def forward(batch: dict[str, Tensor]) -> list[str]:
        length = 0 if encoder_decoder or "input_ids" not in batch else batch["input_ids"].shape[1]
        if captions and length:
            batch = _as_captions(batch, pad)
        found = plain.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        # The start token of a decoder may be the end token too.
        answers = [_cut(row[length:].tolist(), ends, int(encoder_decoder)) for row in found]
        return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    side = "right" if encoder_decoder else "left"
    collator = Collator("text-to-text" if encoder_decoder else "causal", pad, padding_side=side)
    rows = [{key: value for key, value in prompt.items() if key != "labels"} for prompt in prompts]
    with _greedy(writer, ends, pad):
        return run_batches(
            model,
            forward,
            rows,
            collator,
            batch_tokens=batch_tokens,
            tick=tick,
            # Captioning models count positions from the padding on.
            equal_lengths=captions,
        )


def _as_captions(batch: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """The batch as a captioning model's `generate` takes it, which drops the last token of every prompt."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": F.pad(ids, (0, 1), value=pad),
        "attention_mask": F.pad(mask, (0, 1), value=1),
    }


def _ends(plain: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's settings and by the tokenizer."""
    found: list[int] = []
    for owner in (getattr(plain, "generation_config", None), plain.config, tokenizer):
        tokens = getattr(owner, "eos_token_id", None)
        found += tokens if isinstance(tokens, list | tuple) else [] if tokens is None else [tokens]
    return list(dict.fromkeys(found))


def _cut(tokens: list[int], ends: Sequence[int], first: int) -> list[int]:
    """Tokens up to the first end from place `first` on."""
    stop = next((i for i, token in enumerate(tokens) if i >= first and token in ends), len(tokens))
    return tokens[:stop]


@contextmanager
def _greedy(plain: Any, ends: Sequence[int], pad: int) -> Iterator[None]:
    """The time in which the model's own settings (sampling, beams, penalties, lengths) do not count."""
    from transformers import GenerationConfig

    own = getattr(plain, "generation_config", None)
    known = {name: getattr(own, name, None) for name in _TOKENS}
    if known["decoder_start_token_id"] is None:
        known["decoder_start_token_id"] = getattr(plain.config, "decoder_start_token_id", None)
    plain.generation_config = GenerationConfig(**known, eos_token_id=list(ends) or None, pad_token_id=pad)
    try:
        yield
    finally:
        plain.generation_config = own


def _check_positions(plain: Any, prompts: Sequence[Example], more: int, where: object) -> None:
    """Refuses prompts that leave no room for the answer: some models would write noise there, others crash."""
    most = usable_positions(plain.config)
    longest = max((prompt["input_ids"].numel() for prompt in prompts if "input_ids" in prompt), default=0)
    if most is not None and longest + more > most:
        raise LoraforgeError(
            "prompt and answer are longer than the model's positions",
            where=where,
            got=f"{longest} tokens and {more} new ones",
            expected=f"at most {most}",
            hint="set a smaller max_length or max_new_tokens for the task",
        )

"""Rows dealt out into batches of like length, bounded by tokens; answers come back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from loraforge.calibrate.base import prefer_kwargs
from loraforge.calibrate.checks import text_config
from loraforge.tasks import Collator

Example = Mapping[str, Tensor]
Answer = TypeVar("Answer")
# (stage, detail, done, total)
Progress = Callable[[str, str, int, int], None]
# What an image costs beside text: a token for every patch of 16 x 16.
_PATCH = 256
# Logits of a batch, in numbers: 1 GiB of float32.
_MOST_LOGITS = 1 << 28


def run_batches(
    model: nn.Module,
    forward: Callable[[dict[str, Tensor]], Sequence[Answer]],
    examples: Sequence[Example],
    collator: Collator,
    *,
    batch_tokens: int,
    tick: Callable[[int], None] | None = None,
    equal_lengths: bool = False,
) -> list[Answer]:
    """`forward` on every example, one answer a row of the batch; long rows first, so that memory is known at once.

    Args:
        model: Batches go where it is, images in its dtype.
        forward: Takes a batch.
        examples: Unpadded, on the CPU.
        collator: Pads them.
        batch_tokens: Largest rows x longest row; a single longer row is a batch.
        tick: Told how many rows are done.
        equal_lengths: Only rows of one length share a batch, for models that padding would change.
    """
    answers: dict[int, Answer] = {}
    first = next(model.parameters())
    for batch in deal(examples, batch_tokens, equal_lengths):
        padded = collator([dict(examples[i]) for i in batch])
        padded.pop("task", None)
        near = {k: v.to(first.device, first.dtype if v.is_floating_point() else None) for k, v in padded.items()}
        found = forward(near)
        answers.update(zip(batch, found, strict=True))
        if tick is not None:
            tick(len(answers))
    return [answers[i] for i in range(len(examples))]


def deal(examples: Sequence[Example], batch_tokens: int, equal_lengths: bool = False) -> list[list[int]]:
    """Row numbers by batch, longest first."""
    order = sorted(range(len(examples)), key=lambda i: (-_length(examples[i]), i))
    batches: list[list[int]] = []
    for i in order:
        # The first row of a batch is its longest.
        longest = _length(examples[batches[-1][0]]) if batches else 0
        full = not batches or (len(batches[-1]) + 1) * longest > batch_tokens
        if not full and not (equal_lengths and _length(examples[i]) != longest):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _length(example: Example) -> int:
    length = example["input_ids"].numel() if "input_ids" in example else 0
    if "pixel_values" in example:
        length += -(-example["pixel_values"][0].numel() // _PATCH)
    return max(1, length, example["labels"].numel() if "labels" in example else 0)


def tokens_within_memory(batch_tokens: int, model: nn.Module) -> int:
    """`batch_tokens`, less where the logits over the vocabulary would not fit."""
    vocabulary = text_config(plain_model(model).config, "vocab_size") or 1
    return max(1, min(batch_tokens, _MOST_LOGITS // vocabulary))


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper (with the adapter's layers in it), or the model itself."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def forward_options(model: nn.Module) -> dict[str, bool]:
    """Options of a scoring forward: no cache, named outputs, where the model takes them."""
    return prefer_kwargs(plain_model(model))

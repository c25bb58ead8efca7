"""Token losses of texts under a model, and the choices and perplexities that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraforge.errors import LoraforgeError
from loraforge.evaluation.batches import (
    Example,
    forward_options,
    plain_model,
    run_batches,
    tokens_within_memory,
)
from loraforge.tasks import Collator, pad_token_id_of

# answer-mean: mean loss of the answer's tokens; answer-sum: their sum; document: mean loss of the whole text, question
# included (what the rSVD document's evaluation does).
CHOICE_MODES = ("answer-mean", "answer-sum", "document")


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed losses (nats) and tokens of one text.

    Attributes:
        answer: Loss of the tokens that are labelled (not -100).
        answer_tokens: How many these are.
        full: Loss of all tokens but the first, which nothing predicts.
        full_tokens: How many these are.
    """

    answer: float
    answer_tokens: int
    full: float
    full_tokens: int

    def score(self, mode: str) -> float:
        """The log-likelihood of a choice by one of CHOICE_MODES."""
        if mode == "document":
            return -self.full / self.full_tokens
        return -self.answer / (self.answer_tokens if mode == "answer-mean" else 1)


def row_losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    where: object = None,
    tick: Callable[[int], None] | None = None,
) -> list[RowLoss]:
    """The losses of each example: float32 by token, summed in float64.

    Rows are padded on the right and every loss is taken at its own position, so neither padding nor the other rows of
    a batch change a value beyond rounding.

    Args:
        model: A causal language model, or an encoder-decoder whose labels are the target; in evaluation mode.
        examples: input_ids, attention_mask, labels (-100: not part of the answer).
        batch_tokens: Tokens a forward pass.
        where: Named in errors.
        tick: Told how many rows are done.

    Raises:
        LoraforgeError: A loss is not finite.
    """
    encoder_decoder = bool(getattr(plain_model(model).config, "is_encoder_decoder", False))
    options = forward_options(model)

    def forward(batch: dict[str, Tensor]) -> list[RowLoss]:
        labels = batch["labels"] if encoder_decoder else batch.pop("labels")
        logits = model(**batch, **options).logits
        if encoder_decoder:
            return [
                _loss(row, target, target != -100, target != -100) for row, target in zip(logits, labels, strict=True)
            ]
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        return [
            _loss(logits[i, :-1], ids[i, 1:], mask[i, 1:], (labels[i, 1:] != -100) & mask[i, 1:])
            for i in range(len(ids))
        ]

    found = run_batches(
        model,
        forward,
        examples,
        Collator("text-to-text" if encoder_decoder else "causal", pad_token_id_of(None, plain_model(model).config)),
        batch_tokens=tokens_within_memory(batch_tokens, model),
        tick=tick,
    )
    broken = next((i for i, row in enumerate(found) if not torch.isfinite(torch.tensor(row.full))), None)
    if broken is not None:
        raise LoraforgeError("the model's loss is not finite", where=f"{where}, row {broken}", got=found[broken].full)
    return found


def _loss(logits: Tensor, targets: Tensor, counted: Tensor, answer: Tensor) -> RowLoss:
    """Losses of one row: logits (T, V), targets (T,), which positions count, which of these are the answer."""
    losses = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none").double()
    chosen = answer[counted]
    return RowLoss(float(losses[chosen].sum()), int(chosen.sum()), float(losses.sum()), int(counted.sum()))


def choose(
    model: nn.Module, choices: Sequence[Sequence[Example]], mode: str, *, where: object = None, **passing: Any
) -> list[int]:
    """The most likely choice of each row, the first of equal ones.

    Args:
        model: As for `row_losses`.
        choices: The examples of each row's choices.
        mode: One of CHOICE_MODES.
        where: Named in errors.
        **passing: batch_tokens, tick of `row_losses`; a row of its own for every choice.

    Raises:
        LoraforgeError: A choice without a token to score; `document` with an encoder-decoder.
    """
    if mode == "document" and getattr(plain_model(model).config, "is_encoder_decoder", False):
        raise LoraforgeError(
            "the document mode scores question and answer as one text, which an encoder-decoder does not read",
            where=where,
            expected="--choice-mode answer-mean or answer-sum",
        )
    losses = iter(row_losses(model, [choice for row in choices for choice in row], where=where, **passing))
    found = []
    for number, row in enumerate(choices):
        scored = [next(losses) for _ in row]
        if any(not loss.answer_tokens for loss in scored):
            raise LoraforgeError(
                "a choice has no token to score", where=f"{where}, row {number}",
                hint="its text is empty, or max_length cut it off",
            )  # fmt: skip
        scores = [loss.score(mode) for loss in scored]
        found.append(scores.index(max(scores)))
    return found

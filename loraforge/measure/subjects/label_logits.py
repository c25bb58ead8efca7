"""Logits where a label is, and nowhere else: the vocabulary times all positions of a batch never lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraforge.calibrate.checks import text_config
from loraforge.evaluation.batches import forward_options, plain_model

# Logits at a time, in numbers: 64 MiB of float32.
_MOST = 1 << 24
# How far logits may be off that are taken at other places of a matrix product, relative to the largest.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Forward = Callable[..., Any]


class LabelLogits:
    """The logits of a model at its labels.

    A language model's body runs whole; its output embeddings run on the labelled positions alone, a part at a time.
    `settle` tries out whether that gives what the plain forward gives; for models that do more with their
    logits (a soft cap, a bias) the forward is left whole, with the labelled positions alone as the last layer's input,
    and where that does not fit either, the plain forward is taken.

    Args:
        model: Any transformers model, in a PEFT wrapper or not.
        kind: Of the task.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        plain: Any = plain_model(model)
        self.model = model
        self.options = forward_options(model)
        self.headed = kind in ("classification", "images")
        both = bool(getattr(plain.config, "is_encoder_decoder", False))
        self.shifted = not self.headed and not both
        self.prepare = plain.prepare_decoder_input_ids_from_labels if both and not self.headed else None
        self.head: nn.Module | None = None if self.headed else plain.get_output_embeddings()
        # A cap bends small logits by less than low precision rounds them: trying it out would not show it.
        capped = text_config(plain.config, "final_logit_softcapping") is not None
        bias = getattr(plain, "final_logits_bias", None)
        self.ways = ("gathered",) if capped or (bias is not None and bool(bias.any())) else ("apart", "gathered")
        self.how = "plain"

    def where(self, labels: Tensor) -> Tensor:
        """Which positions have something to predict: (B, T) of the logits, or (B, 1) for classes."""
        if self.headed:
            return torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        if not self.shifted:
            return labels != -100
        wanted = torch.zeros_like(labels, dtype=torch.bool)
        wanted[:, :-1] = labels[:, 1:] != -100
        return wanted

    def targets(self, labels: Tensor) -> Tensor:
        """The label of each such position, (P,), row by row."""
        if self.headed:
            return labels
        return labels[:, 1:][labels[:, 1:] != -100] if self.shifted else labels[labels != -100]

    def states(self, forward: Forward, inputs: dict[str, Tensor]) -> Tensor:
        """What the logits of each such position are made of, (P, ...); `parts` makes them.

        Args:
            forward: The model.
            inputs: Of a batch, with `labels`.
        """
        return self._states(forward, inputs, self.how)

    def parts(self, states: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """`loss(logits, positions)` of all positions, a part of them at a time; (P,).

        Logits are float32 at least. With gradients, the logits of a part are made anew in the backward pass.
        """
        found = []
        step = max(1, _MOST // self._width(states))
        for start in range(0, len(states), step):
            span = slice(start, start + step)

            def run(part: Tensor, span: slice = span) -> Tensor:
                return loss(self.logits(part), span)

            whole = len(states) <= step or not torch.is_grad_enabled()
            found.append(run(states[span]) if whole else checkpoint(run, states[span], use_reentrant=False))
        return torch.cat(found) if found else states.new_zeros(0)

    def logits(self, states: Tensor) -> Tensor:
        """The logits of some states, (P, V), float32 at least."""
        if self.how == "apart" and self.head is not None:
            states = self.head(states[None])[0]
        return states if states.dtype == torch.float64 else states.float()

    def _width(self, states: Tensor) -> int:
        weight = getattr(self.head, "weight", None)
        return int(weight.shape[0]) if self.how == "apart" and weight is not None else max(1, states.shape[-1])

    def _states(self, forward: Forward, inputs: dict[str, Tensor], how: str) -> Tensor:
        given: dict[str, Any] = {**self.options, **{k: v for k, v in inputs.items() if k != "labels"}}
        labels = inputs["labels"]
        if self.prepare is not None and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self.prepare(labels=labels)
        if self.headed:
            logits: Tensor = forward(**given).logits
            return logits
        where = self.where(labels)
        with self._gathering(where, how) as kept:
            logits = forward(**given).logits
        if how == "plain" or not kept:
            return logits[where.to(logits.device)]
        return kept[0] if how == "apart" else logits[0]

    @contextmanager
    def _gathering(self, where: Tensor, how: str) -> Iterator[list[Tensor]]:
        """The time in which the output embeddings see labelled positions alone; what they would have seen is kept."""
        kept: list[Tensor] = []

        def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = inputs[0]
            if states.ndim != 3 or states.shape[:2] != where.shape:
                return inputs
            kept.append(states[where.to(states.device)])
            return (kept[0][:1][None] if how == "apart" else kept[0][None], *inputs[1:])

        if how == "plain" or self.head is None:
            yield kept
            return
        hook = self.head.register_forward_pre_hook(gather)
        try:
            yield kept
        finally:
            hook.remove()

    @torch.no_grad()
    def settle(self, inputs: dict[str, Tensor]) -> None:
        """Takes the cheapest way that gives the plain forward's logits of a batch's last row.

        Before any gate or cached layer is in place: they are made for whole batches.
        """
        if self.headed or self.head is None:
            return
        row = {name: tensor[-1:] for name, tensor in inputs.items()}
        training = self.model.training
        self.model.eval()
        try:
            plain = self._states(self.model, row, "plain").float()
            near = _ROUNDING[next(self.head.parameters()).dtype] * plain.abs().max() if len(plain) else 0
            for how in self.ways:
                self.how = how
                found = self.logits(self._states(self.model, row, self.how))
                if found.shape == plain.shape and bool(((found.float() - plain).abs() <= near).all()):
                    return
            self.how = "plain"
        finally:
            self.model.train(training)

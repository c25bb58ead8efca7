"""What a head's effect is measured in: losses of rows, one number a row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from loraforge.errors import CheckFailed, LoraforgeError, UsageError, did_you_mean
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.subjects.batch import Batch
from loraforge.measure.subjects.label_logits import LabelLogits
from loraforge.measure.subjects.probe import train_probe
from loraforge.measure.subjects.subject import Subject
from loraforge.measure.subjects.task_rows import HEADED

OBJECTIVES = ("task", "probe", "kl", "lm")


class Objective(Protocol):
    """A loss a row.

    Attributes:
        name: One of OBJECTIVES.
        record: What it was made with, JSON-ready.
    """

    name: str
    record: dict[str, Any]

    def reference(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What the losses of a batch are compared with, of the model as it is: taken once, before any gate."""
        ...

    def losses(self, model: nn.Module, batch: Batch, reference: Tensor | None = None) -> Tensor:
        """Runs the model on a batch.

        Args:
            model: The subject's.
            batch: Of the subject, possibly repeated.
            reference: Of the batch before it was repeated.

        Returns:
            (B,) float32 (float64 for a float64 model).
        """
        ...


class _Losses:
    """Losses of the label positions, averaged over those of a row."""

    def __init__(self, name: str, subject: Subject, record: dict[str, Any], probe: dict[str, Tensor]) -> None:
        self.name = name
        self.record = {"objective": name, **record}
        self._logits = LabelLogits(subject.model, subject.kind)
        self._probe = probe

    def reference(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """None but for `kl`: what the logits are made of."""
        if self.name != "kl":
            return None
        with torch.no_grad():
            return self._logits.states(self._forward(model), batch.inputs)

    def losses(self, model: nn.Module, batch: Batch, reference: Tensor | None = None) -> Tensor:
        """One loss a row."""
        inputs = self.inputs(batch)
        states = self._logits.states(self._forward(model), inputs)
        where = self._logits.where(inputs["labels"]).to(states.device)
        loss = self._cross_entropy(inputs) if self.name != "kl" else self._divergence(reference)
        if reference is not None and len(states) % len(reference):
            got, expected = f"{len(reference)} positions", f"those of the batch, one of {len(states)} or a part of it"
            raise LoraforgeError("the reference is of another batch", got=got, expected=expected)
        values = self._logits.parts(states, loss)
        table = values.new_zeros(where.shape).masked_scatter(where, values)
        return table.sum(1) / where.sum(1).clamp(min=1)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's, with every token but padding as a label for `lm`."""
        if self.name != "lm":
            return batch.inputs
        labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
        return {**batch.inputs, "labels": labels}

    def settle(self, subject: Subject) -> None:
        """Finds the cheapest way to the logits.

        Raises:
            LoraforgeError: Rows without anything to predict.
        """
        bare: list[int] = []
        for batch in subject.batches():
            counts = self._logits.where(self.inputs(batch)["labels"]).sum(1)
            bare += [row for row, count in zip(batch.indices, counts.tolist(), strict=True) if not count]
        if bare:
            got = f"row {bare[0]}" + (f" and {len(bare) - 1} more" if len(bare) > 1 else "")
            hint = "a larger max_length, or another subset"
            raise LoraforgeError("a row has no token to predict", where=subject.data.source, got=got, hint=hint)
        self._logits.settle(self.inputs(subject.batches()[-1]))

    def _forward(self, model: nn.Module) -> Callable[..., Any]:
        if not self._probe:
            return model
        return lambda **inputs: functional_call(model, self._probe, (), inputs)

    def _cross_entropy(self, inputs: dict[str, Tensor]) -> Callable[[Tensor, slice], Tensor]:
        targets = self._logits.targets(inputs["labels"])
        return lambda logits, span: F.cross_entropy(logits, targets[span].to(logits.device), reduction="none")

    def _divergence(self, reference: Tensor | None) -> Callable[[Tensor, slice], Tensor]:
        """KL of the gated model's output from the reference's, in float64: it is small, and never below 0."""
        if reference is None:
            raise LoraforgeError("the objective kl needs a reference", expected="reference(model, batch)")

        def loss(logits: Tensor, span: slice) -> Tensor:
            rows = torch.arange(span.start, span.start + len(logits), device=reference.device) % len(reference)
            with torch.no_grad():
                wanted = self._logits.logits(reference[rows]).double().log_softmax(-1)
            found = logits.double().log_softmax(-1)
            values = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).clamp(min=0)
            return values.to(logits.dtype)

        return loss


def make_objective(
    name: str,
    subject: Subject,
    *,
    probe_steps: int = 200,
    probe_lr: float = 1e-3,
    probe_batch: int = 16,
    seed: int = 0,
    warn: bool = True,
) -> Objective:
    """The loss that heads are measured by.

    `task`: cross-entropy, of a row the mean over its label tokens. `probe`: the same with a classification head that is
    trained first, on the task's training rows alone; the subject's model stays as it is. `kl`: the divergence of the
    output from that of the ungated model, no labels needed; 0 without a gate, and so is its gradient. `lm`: the loss of
    a causal model over all tokens of a text.

    Args:
        name: One of OBJECTIVES.
        subject: What is measured; no gates in its model yet.
        probe_steps: AdamW steps of the head.
        probe_lr: Their learning rate.
        probe_batch: Rows a step.
        seed: Of the order of the training rows.
        warn: Whether to say that a head of random weights decides the numbers.

    Raises:
        UsageError: An unknown name.
        LoraforgeError: One that does not fit the task; no training rows for a probe.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"unknown objective '{name}'", hint=did_you_mean(name, OBJECTIVES))
    headed, both = subject.kind in HEADED, bool(getattr(subject.config, "is_encoder_decoder", False))
    where, got = f"task '{subject.data.spec.id}'", f"a task of kind {subject.kind}"
    if name == "lm" and (headed or both):
        raise LoraforgeError("the objective lm is for causal models", where=where, got=got, expected="task or kl")
    if name == "probe" and not headed:
        raise LoraforgeError("a probe is a classification head", where=where, got=got, expected="task, kl or lm")
    if name == "task" and headed and subject.fresh and warn:
        warnings.warn(
            f"the head ({', '.join(subject.fresh)}) has random weights: the task's loss measures them as much as the "
            "model; --objective probe trains a head first, --objective kl needs none",
            stacklevel=2,
        )
    probe: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    if name == "probe":
        probe, record = train_probe(subject, steps=probe_steps, lr=probe_lr, batch_size=probe_batch, seed=seed)
    objective = _Losses(name, subject, record, probe)
    objective.settle(subject)
    return objective


def repeat_reference(reference: Tensor | None, n: int) -> Tensor | None:
    """The reference of a batch that is repeated n times: the same, as `losses` reads it in turn."""
    return reference


def check_losses(losses: Tensor, batch: Batch, number: int, head: HeadKey | None = None) -> None:
    """Refuses losses that are not finite.

    Args:
        losses: (B,) of a batch.
        batch: The batch.
        number: Its place among the batches, from 0.
        head: Whose gate is shut, where one is.

    Raises:
        CheckFailed: Names batch, rows and head.
    """
    finite = torch.isfinite(losses).tolist()
    if all(finite):
        return
    rows = [row for row, good in zip(batch.indices, finite, strict=True) if not good]
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    at = "" if head is None else f", {head.stack} {head.kind} layer {head.layer} head {head.head}"
    raise CheckFailed(
        "the loss is not finite", where=f"batch {number}{at}", got=f"rows {shown}", expected="numbers",
        hint="--dtype float32; a model whose training broke down gives no measurement",
    )  # fmt: skip

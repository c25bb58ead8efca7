"""A classification head trained on frozen features, so that heads are not measured through random weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from loraforge.errors import CheckFailed, LoraforgeError
from loraforge.evaluation.batches import forward_options, plain_model
from loraforge.measure.subjects.subject import Subject

_TAIL = 20


def train_probe(
    subject: Subject, *, steps: int, lr: float, batch_size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains a copy of the head by AdamW on the task's training rows; the model's own weights stay.

    Args:
        subject: A classifier.
        steps: AdamW steps.
        lr: Learning rate.
        batch_size: Rows a step.
        seed: Of the order of the rows.

    Returns:
        The trained tensors by parameter name, for `torch.func.functional_call`; and what was done, with the loss of the
        first step and the mean of the last ones.

    Raises:
        LoraforgeError: The task has no training rows beside the measured ones.
        CheckFailed: The loss is not finite.
    """
    spec = subject.data.spec
    if spec.train is None:
        raise LoraforgeError(
            "a probe is trained on the task's training rows, never on the measured ones, and the task has none",
            where=f"task '{spec.id}'", expected="train: FILE", hint="or --objective kl, which needs no head",
        )  # fmt: skip
    data = subject.split("train")
    # The same file under two names, or the training rows themselves measured.
    measured = set(subject.indices) if data.sha256 == subject.data.sha256 else set()
    if measured and len(data) != len(subject.data):
        raise LoraforgeError(
            "training and measured rows are of the same file, and cannot be told apart", where=data.source,
            got=f"{len(data)} and {len(subject.data)} rows of it", hint="leave the task's 'rows' out",
        )  # fmt: skip
    rows = [row for row in range(len(data)) if row not in measured]
    if not rows:
        raise LoraforgeError("all training rows are measured: none is left for a probe", where=data.source,
                             hint="a smaller --subset")  # fmt: skip
    names = head_parameters(subject.model, subject.fresh)
    own = dict(subject.model.named_parameters())
    # In float32 at least: small steps are lost in lower precision.
    wide = {name: torch.promote_types(own[name].dtype, torch.float32) for name in names}
    masters = {name: own[name].detach().to(wide[name], copy=True).requires_grad_() for name in names}
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, weight_decay=0.0)
    options = forward_options(subject.model)
    losses: list[float] = []
    order: list[int] = []
    draw = random.Random(seed)
    for step in range(steps):
        while len(order) < batch_size:
            order += draw.sample(rows, len(rows))
        chosen, order = order[:batch_size], order[batch_size:]
        inputs = subject.batch(data, chosen).inputs
        labels = inputs.pop("labels")
        near = {name: tensor.to(own[name].dtype) for name, tensor in masters.items()}
        logits = functional_call(subject.model, near, (), {**inputs, **options}).logits
        loss = F.cross_entropy(logits.float(), labels)
        if not torch.isfinite(loss):
            raise CheckFailed("the loss of the probe is not finite", where=f"step {step}", hint="a smaller step size")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    found = {name: tensor.detach().to(own[name].dtype) for name, tensor in masters.items()}
    last = losses[-_TAIL:]
    record = {
        "probe_steps": steps, "probe_lr": lr, "probe_batch": batch_size, "probe_seed": seed, "probe_rows": len(rows),
        "probe_data_sha256": data.sha256, "probe_parameters": sum(t.numel() for t in found.values()),
        "probe_loss_first": losses[0] if losses else None, "probe_loss_last": sum(last) / len(last) if last else None,
    }  # fmt: skip
    return found, record


def head_parameters(model: nn.Module, fresh: Sequence[str] = ()) -> list[str]:
    """Names of the parameters of a classifier's head: those beside the base model, and fresh ones in it (a pooler).

    Args:
        model: A transformers model, or PEFT's wrapper around one.
        fresh: Modules of the transformers model without weights of their own.

    Raises:
        LoraforgeError: There are none.
    """
    plain: Any = plain_model(model)
    body = f"{getattr(plain, 'base_model_prefix', '')}."
    tops = tuple(f"{name}." for name in fresh)
    head = {id(p) for name, p in plain.named_parameters() if not name.startswith(body) or name.startswith(tops)}
    # PEFT keeps the base's head beside the adapter's copy of it.
    aside = ("original_module", "lora_")
    found = [name for name, p in model.named_parameters() if id(p) in head and not any(part in name for part in aside)]
    if not found:
        raise LoraforgeError("the model has no head beside its base model", got=type(plain).__name__)
    return found

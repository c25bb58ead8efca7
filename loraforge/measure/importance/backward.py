"""Gradients of a loss by the heads' gates, a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from loraforge.errors import CheckFailed, LoraforgeError
from loraforge.linalg.device import named_when_full
from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.estimates import Array, GateGradients
from loraforge.measure.subjects.batch import Batch
from loraforge.measure.subjects.objectives import Objective, check_losses
from loraforge.measure.subjects.subject import Subject

Progress = Callable[[str, str, int, int], None]


def gate_gradients(
    subject: Subject,
    objective: Objective,
    *,
    per_sample: bool = True,
    batch_size: int | None = None,
    order: str | None = None,
    train_mode: bool = False,
    seed: int = 0,
    keys: Iterable[HeadKey] | None = None,
    progress: Progress | None = None,
) -> GateGradients:
    """d loss / d gate of every head, with one backward pass a batch.

    By rows, every row has gates of its own (B, n_q) and the losses are summed: the gradient by row i's gate is that of
    its loss alone. Gates are float32 (float64 for a float64 model); the parameters stay frozen.

    Args:
        subject: Model and rows.
        objective: Of `make_objective`.
        per_sample: A gradient a row; else one of each batch's mean loss, whose squares depend on the batch's size:
            E[g^2] = (mean s)^2 + var(s) / B.
        batch_size: Rows a batch; default the subject's.
        order: Of the rows; default the subject's.
        train_mode: Dropout on, drawn by `seed`.
        seed: Of the dropout.
        keys: Heads wanted; default all.
        progress: Called with (stage, detail, done, total).

    Raises:
        LoraforgeError: The objective has no gradient here; unknown heads; heads that the loss does not depend on.
        CheckFailed: A loss or gradient that is not finite; names batch and head.
    """
    if objective.name == "kl":
        raise LoraforgeError(
            "the gradient of kl is 0 for every head: without a gate the divergence is at its minimum",
            expected="the objective task, probe or lm", hint="kl goes with exact importance",
        )  # fmt: skip
    columns, wanted = _columns(subject, keys)
    batches = subject.batches(batch_size, order)
    found: dict[int, Array] = {}
    losses: dict[int, float] = {}
    hint = "a smaller --batch-size"
    gates = HeadGates(subject.model, subject.layout)
    with _mode(subject.model, train_mode, seed, subject.device), gates:
        for number, batch in enumerate(batches):
            with named_when_full(subject.device, "taking gradients", f"batch {number}", hint):
                values, grads = _one_batch(subject, objective, gates, batch, number, wanted, per_sample)
            rows = batch.indices if per_sample else (number,)
            losses |= dict(zip(rows, values, strict=True))
            found |= dict(zip(rows, grads[:, columns], strict=True))
            if progress is not None:
                progress("gradients", f"batch {number + 1}", number + 1, len(batches))
    rows = subject.indices if per_sample else tuple(range(len(batches)))
    heads = tuple(subject.layout.heads[column] for column in columns)
    s = np.stack([found[row] for row in rows])
    mode = "sample" if per_sample else "batch"
    return GateGradients(heads, s, np.array([losses[row] for row in rows]), mode, len(subject.indices))


def _columns(subject: Subject, keys: Iterable[HeadKey] | None) -> tuple[list[int], list[int]]:
    """Which columns are wanted, and which attentions have them."""
    heads = subject.layout.heads
    places = {key: column for column, key in enumerate(heads)}
    wanted = list(heads if keys is None else keys)
    unknown = [key for key in wanted if key not in places]
    if unknown or not wanted:
        got = ", ".join(map(str, unknown[:3])) or "none"
        raise LoraforgeError("the model has no such heads", got=got, expected=f"{len(heads)} heads, as {heads[0]}")
    columns = sorted(places[key] for key in wanted)
    starts = np.array(subject.layout.starts)
    owners = np.searchsorted(starts, np.array(columns), side="right") - 1
    return columns, sorted(set(owners.tolist()))


def _one_batch(
    subject: Subject,
    objective: Objective,
    gates: HeadGates,
    batch: Batch,
    number: int,
    wanted: list[int],
    per_sample: bool,
) -> tuple[list[float], Array]:
    """Losses and gradients of a batch: (B,) and (B, H), or one of both for the mean; 0 where not wanted."""
    layout, model = subject.layout, subject.model
    rows = len(batch) if per_sample else 1
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    masters: list[Tensor] = []
    gates.clear()
    reference = objective.reference(model, batch)
    for index in wanted:
        shape = (rows, layout.attentions[index].n_q) if per_sample else (layout.attentions[index].n_q,)
        gate = torch.ones(shape, dtype=dtype, device=subject.device, requires_grad=True)
        gates.set(index, gate)
        masters.append(gate)
    losses = objective.losses(model, batch, reference)
    check_losses(losses.detach(), batch, number)
    total = losses.sum() if per_sample else losses.mean()
    grads = torch.autograd.grad(total, masters, allow_unused=True) if total.requires_grad else [None] * len(masters)
    table = np.zeros((rows, len(layout.heads)))
    for index, grad in zip(wanted, grads, strict=True):
        if grad is None:
            module = layout.attentions[index].o.module
            raise LoraforgeError("the loss does not depend on the heads of an attention", where=module)
        start = layout.starts[index]
        table[:, start : start + layout.attentions[index].n_q] = grad.double().reshape(rows, -1).cpu().numpy()
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        key = layout.heads[column]
        at = f"row {batch.indices[row]}" if per_sample else f"rows {batch.indices[0]}, ..."
        where = f"batch {number}, {at}, {key.stack} {key.kind} layer {key.layer} head {key.head}"
        raise CheckFailed("a gradient is not finite", where=where, expected="numbers", hint="--dtype float32")
    values = losses.detach().double()
    return (values if per_sample else values.mean()[None]).tolist(), table


@contextmanager
def _mode(model: nn.Module, train: bool, seed: int, device: torch.device) -> Iterator[None]:
    """The time in which dropout is on, with random numbers of its own; or off."""
    training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=train):
        if train:
            torch.manual_seed(seed)
        model.train(train)
        try:
            yield
        finally:
            model.train(training)

"""What is measured on what: a model with its heads, and the batches that every pass goes over."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from loraforge.checkpoints import open_checkpoint
from loraforge.errors import UsageError
from loraforge.evaluation.batches import plain_model
from loraforge.evaluation.subjects import Subject as Tuned
from loraforge.evaluation.subjects import adapted, open_subjects
from loraforge.linalg.device import choose_device
from loraforge.measure.heads.doctor import confirmed_layout
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.subjects.batch import ORDERS, Batch, deal_rows
from loraforge.measure.subjects.subset import SEED
from loraforge.measure.subjects.task_rows import HEADED, choose_rows, read_rows_of
from loraforge.tasks import Collator, TaskData, TaskSpec, load_model, load_task, pad_token_id_of


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, frozen and in evaluation mode, and the rows that it is measured on. A context manager.

    Attributes:
        model: Transformers model, or PEFT's wrapper around one.
        layout: Its heads.
        data: The split that the rows are of.
        indices: Rows of the split that are measured, in the subset's order.
        kind: Of the task.
        config: Of the model.
        tokenizer: The base's; None for images.
        device: Where it is.
        record: model, adapter, sha256s, theta0_sha256, task, split, data_sha256, subset, n, inputs_sha256, dtype,
            device, head: JSON-ready. theta0_sha256 is of the base's tensors with the made-up head, before any adapter.
        batch_size: Rows a batch.
        order: `length`: batches of like lengths, the longest first; `given`: the subset's order.
        fresh: Modules whose weights are neither the base's nor the adapter's but drawn by the seed.
        seed: Of these.
        head_labels: Classes in the head's order; None without a head.
        label_space: How the head names them.
    """

    model: nn.Module
    layout: HeadLayout
    data: TaskData
    indices: tuple[int, ...]
    kind: str
    config: Any
    tokenizer: Any
    device: torch.device
    record: dict[str, Any]
    batch_size: int = 16
    order: str = "length"
    fresh: tuple[str, ...] = ()
    seed: int = 0
    head_labels: tuple[str, ...] | None = None
    label_space: str = "shared"
    _held: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Takes an adapter out of the model again."""
        self._held.close()

    def batches(self, batch_size: int | None = None, order: str | None = None) -> list[Batch]:
        """The batches, the same at every call.

        Args:
            batch_size: Rows a batch; default the subject's.
            order: Default the subject's.
        """
        own = batch_size in (None, self.batch_size) and order in (None, self.order)
        return list(self._batches) if own else self._deal(batch_size or self.batch_size, order or self.order)

    def batch(self, data: TaskData, rows: Sequence[int]) -> Batch:
        """Rows of a split, padded, where the model is."""
        pad = None if self.kind == "images" else pad_token_id_of(self.tokenizer, self.config)
        kind = "text-to-text" if getattr(self.config, "is_encoder_decoder", False) else self.kind
        inputs = Collator(kind, pad)([data.examples[row] for row in rows])
        inputs.pop("task", None)
        dtype = next(self.model.parameters()).dtype
        near = {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        return Batch(tuple(rows), near)

    def split(self, name: str) -> TaskData:
        """Another split of the task, read as the measured one was; its own training rows for a probe.

        Raises:
            LoraforgeError: The task has no such split, or it cannot be read.
        """
        return load_task(
            self.data.spec, name, tokenizer=self.tokenizer, config=self.config, base=self.record["model"],
            head_labels=self.head_labels, label_space=self.label_space, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def _batches(self) -> list[Batch]:
        return self._deal(self.batch_size, self.order)

    def _deal(self, size: int, order: str) -> list[Batch]:
        rows = deal_rows(self.data.examples, self.indices, size, order)
        return [self.batch(self.data, part) for part in rows]


def state_sha256(model: nn.Module) -> str:
    """Digest of all tensors of a model: names, dtypes, shapes and bytes; of its placement or wrapper nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_model(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def inputs_sha256(data: TaskData, indices: Sequence[int]) -> str | None:
    """Digest of what a model reads of some rows: other fields, prompts, lengths or tokens of the same file are others.

    None for images, which are not all decoded for it.
    """
    digest = hashlib.sha256()
    for row in indices:
        example = data.examples[row]
        if "pixel_values" in example:
            return None
        for name, tensor in sorted(example.items()):
            digest.update(f"{name} {tensor.tolist()}\n".encode())
    return digest.hexdigest()


def open_subject(
    model: str | Path | nn.Module,
    *,
    adapter: str | Path | None = None,
    task: TaskSpec,
    split: str = "test",
    subset: int | Sequence[int] | str | Path | None = None,
    subset_seed: int = SEED,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    labels: Sequence[str] | None = None,
    batch_size: int = 16,
    order: str = "length",
    tokenizer: Any = None,
) -> Subject:
    """A model made ready to be measured.

    A classifier whose file has no head gets the one that training with the same base, seed and dtype starts from.

    Args:
        model: Folder, id in the local cache, or a model in memory, which keeps its dtype, and its place for `auto`;
            its parameters are frozen.
        adapter: PEFT folder, loaded unmerged.
        task: What it is measured on.
        split: Rows of the task: `train`, `eval` or `test`.
        subset: How many rows, which ones, or a file of `write_subset`; None for all.
        subset_seed: Of the choice.
        dtype: Of the weights.
        device: `auto`, `cpu`, `cuda`, `cuda:0`.
        seed: Of weights that no file has.
        labels: Classes in the head's order; default: what the adapter's or the model's task.json says, then the model's
            own configuration, then the task.
        batch_size: Rows a batch.
        order: `length` or `given`.
        tokenizer: The base's; default: looked up there.

    Raises:
        UsageError: An unknown order or device.
        LoraforgeError: Model, adapter, task or subset cannot be used; heads that cannot be told apart.
    """
    if order not in ORDERS or batch_size < 1:
        raise UsageError("batches cannot be made so", got=f"order {order}, {batch_size} rows", expected="length, given")
    place = _place(model, device)
    tuned = Tuned("model", "model") if adapter is None else open_subjects([adapter], ())[0]
    rows = read_rows_of(model, tuned.card, task, split, labels, seed, tokenizer)
    indices, drawn = choose_rows(subset, rows.data, subset_seed)
    heads = rows.named or rows.data.labels
    loaded, config, fresh = load_model(model, rows.data.kind, head_labels=heads, dtype=dtype, device=place, seed=seed)
    loaded = loaded.to(place).eval()
    theta0 = state_sha256(loaded)
    held = ExitStack()
    if adapter is not None:
        loaded = held.enter_context(adapted(loaded, tuned)).requires_grad_(False)
        fresh = tuple(name for name in fresh if not any(key.startswith(f"{name}.") for key in tuned.heads))
    headed = rows.data.kind in HEADED
    record = {
        "model": None if rows.folder is None else str(rows.folder),
        "adapter": None if adapter is None else str(adapter),
        "model_sha256": theta0 if isinstance(model, nn.Module) else open_checkpoint(model).sha256,
        "adapter_sha256": None if tuned.adapter is None else tuned.adapter.sha256,
        "theta0_sha256": theta0,
        "task": rows.data.spec.id, "kind": rows.data.kind, "split": split, "labels": list(heads),
        "data": rows.data.source, "data_sha256": rows.data.sha256, "subset": drawn, "n": len(indices),
        "inputs_sha256": inputs_sha256(rows.data, indices),
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."), "device": str(place), "seed": seed,
        "head": None if not headed else "fresh" if fresh else "trained",
    }  # fmt: skip
    found = Subject(
        loaded, HeadLayout("", (), {}), rows.data, tuple(indices), rows.data.kind, config, rows.tokenizer, place,
        record, batch_size, order, fresh, seed, rows.named, rows.space, held,
    )  # fmt: skip
    inputs = found.batch(rows.data, indices[:2]).inputs
    # Text alone would not reach the heads of a model's vision part.
    both = {"pixel_values", "input_ids"} <= inputs.keys()
    asked = {name: tensor for name, tensor in inputs.items() if name != "labels"} if both else None
    return replace(found, layout=confirmed_layout(loaded, inputs=asked))


def _place(model: str | Path | nn.Module, device: str) -> torch.device:
    """Where to compute: a model in memory stays where it is, unless it is told otherwise."""
    if isinstance(model, nn.Module) and device == "auto":
        return next(model.parameters()).device
    return choose_device(device)

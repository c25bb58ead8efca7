"""A model folder made of a base and changed tensors: weights, configuration, heads kept aside, run.json, README."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.checkpoints import (
    Checkpoint,
    ModelReport,
    ModelWriter,
    copy_config,
    dtype_change,
    full_model_card,
)
from loraforge.checkpoints.checkpoint import CONFIG
from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import new_folder
from loraforge.types import Merged

ROW_ENTRIES = 2**22  # entries of an update that are formed at a time

Account = Callable[[ModelReport, float], dict[str, Any]]


class Rounding(enum.Enum):
    """Whether the cast of a tensor to the written dtype counts in the report."""

    COUNTED = enum.auto()
    COPIED = enum.auto()


class ModelFolder:
    """The output of a merge into a model; appears whole or not at all."""

    def __init__(
        self,
        out: str | os.PathLike[str],
        base: Checkpoint,
        dtype: torch.dtype | None,
        shard_bytes: int,
        *,
        overwrite: bool,
        inputs: Sequence[Path],
    ) -> None:
        """Checks the place.

        Args:
            out: Folder to make.
            base: The model whose tensors and configuration it starts from.
            dtype: Dtype of floating point tensors, None for the base's own.
            shard_bytes: Largest size of one file.
            overwrite: Replace an earlier output.
            inputs: Folders and files that are read while it is made.

        Raises:
            LoraforgeError: The output is one of the inputs, or around or inside of one.
        """
        target = Path(out).resolve()
        for path in inputs:
            place = path.resolve()
            if target == place or target in place.parents or (place in target.parents and place.is_dir()):
                raise LoraforgeError(
                    "The output is one of the inputs", where=out, got=path, hint="choose another folder"
                )
        self.out, self.base, self.dtype, self.shard_bytes, self.overwrite = out, base, dtype, shard_bytes, overwrite

    def layout(self, extra: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
        """Shape and dtype of every tensor to write."""
        own = {name: (self.base.shape(name), self.base.dtype(name)) for name in self.base.names} | dict(extra)
        return {
            name: (shape, self.dtype if self.dtype is not None and dtype.is_floating_point else dtype)
            for name, (shape, dtype) in own.items()
        }

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor, Rounding]],
        aside: Callable[[Path], None],
        account: Account,
        *,
        extra: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes everything.

        Args:
            tensors: Name, tensor and whether its rounding counts; all of the layout, in any order.
            aside: Puts what is kept beside the model (heads) into its folder.
            account: Makes the report from what was written and the relative rounding error.
            extra: Shape and dtype of tensors beside (or in place of) the base's.
            changes: Keys of config.json to set.

        Returns:
            The report.

        Raises:
            LoraforgeError: The output exists, or the disk refuses.
        """
        lost = size = 0.0
        with new_folder(self.out, self.overwrite) as folder:
            layout = self.layout(extra or {})
            with ModelWriter(folder, layout, self.shard_bytes) as writer:
                for name, tensor, rounding in tensors:
                    written = tensor.to(layout[name][1])
                    if rounding is Rounding.COUNTED or written.dtype != tensor.dtype:
                        check_range(name, tensor, written)
                    if rounding is Rounding.COUNTED and written.dtype != tensor.dtype:
                        lost += float((written.to(tensor.dtype) - tensor).norm(dtype=torch.float64)) ** 2
                    if rounding is Rounding.COUNTED:
                        size += float(tensor.norm(dtype=torch.float64)) ** 2
                    writer.write(name, written)
                report = writer.finish()
            copy_config(self.base, folder, dtype_change(self.base, self.dtype) | dict(changes or {}))
            aside(folder)
            found = account(report, (lost / size) ** 0.5 if size > 0 else 0.0)
            text = json.dumps(found, indent=1, allow_nan=False, default=str) + "\n"
            (folder / "run.json").write_text(text, encoding="utf-8")
            (folder / "README.md").write_text(full_model_card(found), encoding="utf-8")
        return found


def add_rows(weight: Tensor, update: Merged) -> None:
    """weight += update, a block of rows at a time, in weight's dtype.

    Args:
        weight: (m, n), changed in place.
        update: (m, n).
    """
    m, n = update.shape
    step = max(1, ROW_ENTRIES // max(1, n))
    for start in range(0, m, step):
        stop = min(start + step, m)
        weight[start:stop] += update.rows(start, stop, weight.dtype).to(weight.device)


def keep_aside(folder: Path, model: Checkpoint, names: Sequence[str]) -> None:
    """Copies tensors of a model, and its configuration, into a folder of their own."""
    layout = {name: (model.shape(name), model.dtype(name)) for name in names}
    with ModelWriter(folder, layout) as writer:
        for name in names:
            writer.write(name, model.read(name))
        writer.finish()
    if model.config:
        (folder / CONFIG).write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_range(name: str, tensor: Tensor, written: Tensor) -> None:
    """Refuses what the cast to the written dtype, or the merge itself, made infinite.

    Raises:
        LoraforgeError: The merged tensor holds NaN or Inf, or does after the cast where it did not before.
    """
    finite = torch.isfinite(written)
    if bool(finite.all()):
        return
    if written.dtype == tensor.dtype:
        raise LoraforgeError(
            "A merged tensor holds NaN or Inf", where=name, got=f"{int((~finite).sum())} of {finite.numel()} entries",
            expected="finite numbers", hint="smaller --weights, or another method",
        )  # fmt: skip
    # A base may hold -inf on purpose (masks); what is copied stays what it was.
    if bool((torch.isfinite(tensor) & ~finite).any()):
        raise LoraforgeError(
            "A tensor does not fit into the output's dtype", where=name, got=written.dtype,
            hint="write with --dtype bfloat16 or float32",
        )  # fmt: skip

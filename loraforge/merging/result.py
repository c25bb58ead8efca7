"""What a merge gives: the merged modules, the report, and the way to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.adapters import Adapter, AdapterWriter, HeadsPlan, WriteReport, model_card, open_adapter
from loraforge.errors import LoraforgeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraforge.types import LowRank


class WrittenModules(Mapping[str, "LowRank"]):
    """The modules of a merged adapter on disk, read when asked for."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Keeps the names; the file is opened at the first read."""
        self._path, self._names = path, tuple(names)
        self._adapter: Adapter | None = None

    def __getitem__(self, name: str) -> LowRank:
        """The factors of a module in the written dtype."""
        if self._adapter is None:
            self._adapter = open_adapter(self._path)
        return self._adapter.load(name)

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the merge."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of modules."""
        return len(self._names)


@dataclass(slots=True, eq=False)
class MergeResult:
    """A merged adapter, in memory or (with `out`) on disk.

    Attributes:
        modules: The merged update of every module, scaling 1.
        report: JSON-ready account of the run; the keys are those of `loraforge merge --json`.
        adapters: The adapters it was made from, in the user's order.
        heads: What becomes of task heads.
        dtype: Dtype of the written factors.
        biases: Merged lora_bias of the modules that have one.
        written: What was written, once it was.
    """

    modules: Mapping[str, LowRank]
    report: dict[str, Any]
    adapters: Sequence[Adapter]
    heads: HeadsPlan
    dtype: torch.dtype
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    written: WriteReport | None = field(default=None)

    def save(self, out: str | os.PathLike[str], overwrite: bool = False, format: str | None = None) -> Path:  # noqa: A002
        """Writes an adapter with run.json and a model card; appears whole or not at all.

        Args:
            out: Folder to make.
            overwrite: Replace an earlier output.
            format: "peft", "kohya" or "diffusers"; None for that of the merge.

        Raises:
            LoraforgeError: The folder exists, is one of the inputs, or the disk refuses; or the result is on disk.
            UsageError: Another format.
        """
        if not self.modules:
            raise LoraforgeError(
                "This merge wrote a model and holds no adapter", where=self.report.get("out"), expected="the folder"
            )
        if isinstance(self.modules, WrittenModules):
            raise LoraforgeError("This merge is on disk already", where=self.report.get("out"), hint="copy the folder")
        self.report["format"] = format or self.report.get("format") or "peft"
        writer = AdapterWriter(
            out,
            self.adapters,
            self.dtype,
            self.heads,
            side_files(lambda: self.report, out),
            overwrite,
            format=self.report["format"],
        )
        rows = {layer["module"]: layer for layer in self.report["layers"]}
        with writer.session(list(self.modules)) as session:
            for name, pair in self.modules.items():
                session.add(name, pair, rows[name], self.biases.get(name))
        self.written = session.report
        return self.written.path


def side_files(
    report: Callable[[], dict[str, Any]], out: str | os.PathLike[str]
) -> dict[str, Callable[[WriteReport], bytes | str]]:
    """run.json and the model card, made when the factors are written; the report then says what was written."""

    def account(written: WriteReport) -> dict[str, Any]:
        found = report()
        found |= {
            "out": os.fspath(out), "dtype": written.dtype, "rounding": written.rounding, "bytes": written.bytes,
        }  # fmt: skip
        return found

    return {
        "run.json": lambda written: json.dumps(account(written), indent=1, allow_nan=False, default=str) + "\n",
        "README.md": lambda written: model_card(account(written)),
    }

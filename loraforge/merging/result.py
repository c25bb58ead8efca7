"""What a merge gives: the merged modules, the report, and the way to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.adapters import Adapter, AdapterWriter, HeadsPlan, WriteReport, model_card
from loraforge.errors import UsageError

if TYPE_CHECKING:
    import torch

    from loraforge.types import LowRank


@dataclass(slots=True, eq=False)
class MergeResult:
    """A merged adapter in memory.

    Attributes:
        modules: The merged update of every module, scaling 1.
        report: JSON-ready account of the run; the keys are those of `loraforge merge --json`.
        adapters: The adapters it was made from, in the user's order.
        heads: What becomes of task heads.
        dtype: Dtype of the written factors.
    """

    modules: Mapping[str, LowRank]
    report: dict[str, Any]
    adapters: Sequence[Adapter]
    heads: HeadsPlan
    dtype: torch.dtype
    written: WriteReport | None = field(default=None)

    def save(self, out: str | os.PathLike[str], overwrite: bool = False, format: str = "peft") -> Path:  # noqa: A002
        """Writes a PEFT adapter with run.json and a model card; appears whole or not at all.

        Args:
            out: Folder to make.
            overwrite: Replace an earlier output.
            format: "peft".

        Raises:
            LoraforgeError: The folder exists, is one of the inputs, or the disk refuses.
            UsageError: Another format.
        """
        if format != "peft":
            raise UsageError("unknown output format", got=format, expected="peft")

        def account(written: WriteReport) -> dict[str, Any]:
            self.report |= {
                "out": os.fspath(out),
                "dtype": written.dtype,
                "rounding": written.rounding,
                "bytes": written.bytes,
            }
            return self.report

        writer = AdapterWriter(
            out,
            self.adapters,
            self.dtype,
            self.heads,
            {
                "run.json": lambda written: json.dumps(account(written), indent=1, allow_nan=False, default=str) + "\n",
                "README.md": lambda written: model_card(account(written)),
            },
            overwrite,
        )
        self.written = writer.write(self.modules.items())
        return self.written.path

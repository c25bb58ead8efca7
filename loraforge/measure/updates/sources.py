"""Opens what an update is measured on: an adapter, alone or with its base, or two full models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.adapters import Adapter, open_adapter
from loraforge.checkpoints import Checkpoint, open_checkpoint
from loraforge.errors import UsageError
from loraforge.measure.heads.find import layout_of_checkpoint
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.updates.adapter_changes import AdapterChanges
from loraforge.measure.updates.adapter_layout import adapter_layout
from loraforge.measure.updates.changes import Changes, DenseChanges
from loraforge.measure.updates.norms import BaseWeights

Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Source:
    """An opened pair of base and fine-tuned model.

    Attributes:
        changes: The updates.
        layout: Where the heads are.
        meta: What was opened, JSON-ready.
        alone: The layout is of an adapter alone: a part that it lacks is one that the adapter does not change.
    """

    changes: Changes
    layout: HeadLayout
    meta: dict[str, Any]
    alone: bool


def open_changes(
    base: Place | Checkpoint | None = None,
    *,
    adapter: Place | Adapter | None = None,
    final: Place | Checkpoint | None = None,
    layout: HeadLayout | None = None,
    config: Mapping[str, Any] | Place | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> Source:
    """Opens base and fine-tuned model, and finds their heads.

    Args:
        base: The start. With an adapter it may be absent: what is relative to its weights is then unknown.
        adapter: Folder or file of an adapter, of any supported format, or an opened one; or
        final: a fine-tuned copy of the base; the base may be the bare model where this one has a head.
        layout: Where the heads are; default from the base's headers, else `adapter_layout`.
        config: config.json of the base, where there is no base.
        heads: Query heads, where there is neither base nor configuration.
        kv_heads: Key-value heads, likewise.
        head_dim: Rows a head, likewise.

    Raises:
        UsageError: Not one of adapter and final, or final without base.
        LoraforgeError: One cannot be read, they do not fit each other, or nothing says where the heads are.
    """
    if (adapter is None) == (final is None):
        raise UsageError(
            "one fine-tuned model is needed", got="none" if adapter is None else "two",
            expected="--adapter DIR, or --base DIR --final DIR",
        )  # fmt: skip
    if final is not None and base is None:
        raise UsageError("--final needs the base that it was fine-tuned from", expected="--base DIR --final DIR")
    start = base if isinstance(base, Checkpoint) or base is None else open_checkpoint(base)
    about: dict[str, Any] = {"base": None if start is None else str(start.path)}
    if final is not None and start is not None:
        end = final if isinstance(final, Checkpoint) else open_checkpoint(final)
        layout = layout or layout_of_checkpoint(start)
        dense = DenseChanges(start, end, layout)
        dense.warnings += other_base(start, end.path)
        notes = list(dense.alignment.notes)
        return Source(dense, layout, about | {"final": str(end.path), "source": "dense", "notes": notes}, False)
    assert adapter is not None
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    alone = layout is None and start is None
    if layout is None and start is not None:
        layout = layout_of_checkpoint(start)
    elif layout is None:
        layout = adapter_layout(opened, config=config, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    changes = AdapterChanges(opened, layout, None if start is None else BaseWeights(start, layout))
    if start is not None:
        changes.warnings += other_base(start, opened.path)
    about |= {"adapter": str(opened.path), "source": "factors", "format": opened.format}
    return Source(changes, layout, about | {"notes": list(opened.notes)}, alone)


def other_base(base: Checkpoint, trained: Path) -> list[str]:
    """A warning if a training's record names other weights of its base than these."""
    path = trained / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = base.changed(record.get("base_sha256") or {})
    return [f"{base.path} is not the base that {path} names: another {', '.join(changed)}"] if changed else []

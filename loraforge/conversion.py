"""An adapter in another format: the same factors under other names.

The bits of the factors stay wherever the format can hold them: PEFT and kohya state each module's alpha, diffusers
files have none, so there a scale other than 1 is multiplied into `lora.up`. What a format cannot hold is refused by
name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loraforge
from loraforge.adapters import Adapter, AdapterWriter, WriteReport, open_adapter, resolve_heads
from loraforge.adapters.keys import shorten
from loraforge.adapters.layouts import layout_of
from loraforge.errors import LoraforgeError

Progress = Callable[[str, str, int, int], None]


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    overwrite: bool = False,
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes an adapter in another format (or its own, in standard spelling).

    Args:
        src: Adapter of any format that `open_adapter` reads.
        out: Folder to make: a PEFT folder, or one with a single .safetensors file; run.json beside it.
        to: "peft", "kohya" or "diffusers".
        overwrite: Replace an earlier output.
        ignore_unknown: Leave out keys of the source that belong to nothing.
        progress: Called with (stage, module, done, total).

    Returns:
        JSON-ready: out, file, source (path, format, sha256), to, modules, rank_max, parameters, bytes, exact (every
        factor has the bits of the source), rounding, notes.

    Raises:
        LoraforgeError: The source cannot be read, or holds what the format cannot: DoRA; for kohya and diffusers
            embeddings, experts, biases, whole weights; for PEFT modules of several models; names whose dots cannot be
            restored.
        UsageError: An unknown format.
    """
    layout = layout_of(to)
    adapter = open_adapter(src, ignore_unknown=ignore_unknown)
    if adapter.has_dora:
        raise LoraforgeError(
            "A DoRA adapter cannot be converted",
            where=adapter.weights_path,
            got=shorten(module for module in adapter.modules if adapter.info(module).has_magnitude),
            expected="LoRA factors alone; a magnitude acts on the base weight too",
            hint="`loraforge merge` with --base turns it into plain factors",
        )
    built = [module for module in adapter.modules if _is_built(adapter, module)]
    scaled = [] if layout.scales else [module for module in adapter.modules if adapter.info(module).scaling != 1.0]
    report: dict[str, Any] = {
        "out": os.fspath(out),
        "file": layout.file_name(Path(out).resolve().name),
        "source": {"path": os.fspath(src), "format": adapter.format, "sha256": adapter.sha256},
        "to": to,
        "modules": len(adapter.modules),
        "exact": not built and not scaled,
        "notes": [*adapter.notes, *_notes(built, scaled)],
    }

    def account(written: WriteReport) -> dict[str, Any]:
        return report | {
            "rank_max": max(written.ranks.values()),
            "parameters": written.parameters,
            "rounding": written.rounding,
            "bytes": written.bytes,
        }

    writer = AdapterWriter(
        out,
        [adapter],
        None,
        resolve_heads([adapter]),
        {
            "run.json": lambda written: (
                json.dumps({"command": "convert", "loraforge": loraforge.__version__, **account(written)}, indent=1)
                + "\n"
            ),
            "README.md": lambda written: _card(account(written), adapter),
        },
        overwrite,
        format=to,
        keep_scales=True,
    )
    with writer.session(adapter.modules) as session:
        for done, module in enumerate(adapter.modules, 1):
            session.add(module, adapter.load(module), bias=adapter.bias(module))
            if progress is not None:
                progress("convert", module, done, len(adapter.modules))
    return account(session.report)


def _is_built(adapter: Adapter, module: str) -> bool:
    """Whether the factors are products of stored tensors (LoHa, LoKr, Tucker convolutions)."""
    info = adapter.info(module)
    return len(adapter.keys_of(module)) - info.has_bias - info.has_magnitude > 2


def _notes(built: list[str], scaled: list[str]) -> list[str]:
    notes = []
    if built:
        notes.append(
            f"{len(built)} modules (LoHa, LoKr, Tucker) were multiplied out to two factors: {shorten(built, 3)}"
        )
    if scaled:
        notes.append(f"{len(scaled)} modules have a scale other than 1, which was multiplied into lora.up")
    return notes


def _card(report: dict[str, Any], adapter: Adapter) -> str:
    """The README.md of a converted adapter."""
    front = ["---", *(["library_name: peft"] if report["to"] == "peft" else []), "tags:", "- lora", "- loraforge"]
    front += [f"base_model: {json.dumps(adapter.base, ensure_ascii=False)}"] if adapter.base else []
    facts = {
        "file": f"`{report['file']}`" if report["to"] != "peft" else "`adapter_model.safetensors`",
        "converted from": f"{adapter.name} ({adapter.format}), sha256 `{adapter.sha256[:16]}`",
        "modules": report["modules"],
        "largest rank": report["rank_max"],
    }
    rows = [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in facts.items()]
    notes = ["", *(f"- {note}" for note in report["notes"])] if report["notes"] else []
    return "\n".join([*front, "---", "", "# LoRA adapter", "", "| | |", "|---|---|", *rows, *notes, ""])

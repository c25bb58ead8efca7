"""How much each head was changed: from an adapter's factors or from two full models, without a model in memory.

The definitions are in `update_lines`. An adapter is enough, with the number of heads; with its base beside it the
update also gets its relative size and the change of each head's circuits.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.adapters import Adapter
from loraforge.checkpoints import Checkpoint
from loraforge.measure.files import UPDATE, write_json, write_lines
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.updates.files import checked_word, document_lines, output_files
from loraforge.measure.updates.lines import Progress, Settings, head_lines, totals, zero_warnings
from loraforge.measure.updates.sources import Source, open_changes
from loraforge.provenance import versions

Place = str | os.PathLike[str]
NORMS = ("document", "l2")
SCOPES = ("heads", "all")
PROFILES = ("default", "document")
QK_NOTE = "QK compares W_q^T W_k; with rotary positions, or norms on q and k, the scores are no such form exactly"
# Keyword arguments that say where the heads are; the others are `Settings`.
_PLACES = ("layout", "config", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What was changed.

    Attributes:
        lines: One mapping a head, in the layout's order.
        other_updates: What is outside the heads: {name, U, Urel, r, what} a tensor or module; None where unknown.
        totals: Norms over all heads (`heads`), by part (`parts`), of the rest (`other`) and of everything (`all`).
        meta: Settings, sources, warnings.
        layout: Where the heads are.
    """

    lines: list[dict[str, Any]]
    other_updates: list[dict[str, Any]]
    totals: dict[str, Any]
    meta: dict[str, Any]
    layout: HeadLayout


def update_from_factors(
    adapter: Place | Adapter, *, base: Place | Checkpoint | None = None, **options: Any
) -> UpdateResult:
    """The update of every head that an adapter makes, from its factors by QR in float64.

    Args:
        adapter: Its folder or file, of any supported format, or an opened one.
        base: The base, for what is relative to its weights (Urel, n, OV, QK) or needs them (DoRA, whole modules).
        **options: Where the heads are if no base says it (layout, config, heads, kv_heads, head_dim, see
            `sources.open_changes`), and fields of `update_lines.Settings` (kv_share, bias, circuits, scope, ...).

    Raises:
        LoraforgeError: Adapter and base do not fit, or nothing says where the heads are.
    """
    places = {name: options.pop(name) for name in _PLACES if name in options}
    return _measured(open_changes(base, adapter=adapter, **places), options)


def update_from_dense(base: Place | Checkpoint, final: Place | Checkpoint, **options: Any) -> UpdateResult:
    """The update of every head between two full models, streamed tensor by tensor and subtracted in float64.

    Args:
        base: The start; may be the bare model where `final` has a head.
        final: The fine-tuned model.
        **options: layout (default the base's), and fields of `update_lines.Settings`.

    Raises:
        LoraforgeError: The two are not of one architecture and size.
    """
    places = {name: options.pop(name) for name in _PLACES if name in options}
    return _measured(open_changes(base, final=final, **places), options)


def _measured(source: Source, options: dict[str, Any]) -> UpdateResult:
    """Lines, totals and their account."""
    settings = Settings(**options, absent=0.0 if source.alone else None)
    changes, layout = source.changes, source.layout
    lines, squares = head_lines(changes, layout, settings)
    every = settings.scope == "all"
    # Factors outside the heads cost next to nothing, so the totals always count them.
    whole = every or changes.source == "factors"
    everything = list(changes.others(every=whole))
    others = everything if every else [row for row in everything if row["r"] is None]
    meta = source.meta | {
        "kv_share": settings.kv_share, "bias": settings.bias, "scope": settings.scope, "family": layout.family,
        "layout_sha256": layout.sha256, "heads": len(lines), "skipped": dict(layout.skipped),
        "warnings": [*changes.warnings, *zero_warnings(lines)],
    }  # fmt: skip
    if changes.weights is not None and settings.circuits:
        meta["notes"] = [*meta["notes"], QK_NOTE]
    return UpdateResult(lines, others, totals(squares, everything, whole=whole), meta, layout)


def measure_update(
    base: Place | Checkpoint | None = None,
    *,
    adapter: Place | Adapter | None = None,
    final: Place | Checkpoint | None = None,
    norm: str = "document",
    scope: str = "heads",
    spectrum: bool = False,
    out: Place | None = None,
    overwrite: bool = False,
    profile: str = "default",
    cache: Place | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measures the update of every head, and writes it.

    Args:
        base: The start; needed with `final`.
        adapter: An adapter of it; or
        final: a fine-tuned copy of it.
        norm: Which relative update a report shows: `document` (alias `seed`) or `l2`; the lines have both.
        scope: `heads`, or `all` for a row of every module besides.
        spectrum: Also `measure_spectrum`, into files beside.
        out: File of lines (NAME.jsonl), or the folder for update.jsonl; NAME.meta.json comes beside it.
        overwrite: Replace them.
        profile: `document` writes exactly the document's columns.
        cache: File that keeps the base's norms by hash.
        progress: Called with (stage, detail, done, total).
        **options: kv_share, bias, circuits, base_sha256 (see `update_lines.Settings`); layout, config, heads, kv_heads,
            head_dim (see `sources.open_changes`).

    Returns:
        {lines, other_updates, totals, meta, files} and, if asked for, {spectrum}.

    Raises:
        UsageError: Not one of adapter and final, or an unknown word.
        LoraforgeError: The inputs do not fit each other, or an output exists.
    """
    started = time.perf_counter()
    norm, scope = checked_word("--norm", norm, NORMS), checked_word("--scope", scope, SCOPES)
    profile = checked_word("--profile", profile, PROFILES)
    files = output_files(out, UPDATE, overwrite=overwrite)
    places = {name: options.pop(name) for name in _PLACES if name in options}
    source = open_changes(base, adapter=adapter, final=final, **places)
    options |= {"scope": scope, "progress": progress, "cache": None if cache is None else Path(cache)}
    result = _measured(source, options)
    lines = document_lines(result.lines, result.layout) if profile == "document" else result.lines
    found: dict[str, Any] = {"lines": lines, "other_updates": result.other_updates, "totals": result.totals}
    if spectrum:
        # Decompositions bring most of the package with them, which doubles the time of a plain update.
        from loraforge.measure.updates.spectra import measure_spectrum

        place = files[0].parent if files else None
        found["spectrum"] = measure_spectrum(
            base, adapter=adapter, final=final, out=place, overwrite=overwrite, progress=progress, **places
        )
    found["meta"] = result.meta | {
        "norm": norm, "profile": profile, "seconds": round(time.perf_counter() - started, 3),
        "versions": versions("torch"),
    }  # fmt: skip
    if files:
        write_lines(files[0], lines)
        write_json(files[1], found["meta"] | {key: found[key] for key in ("totals", "other_updates")})
    found["files"] = [str(path) for path in files] + (found["spectrum"]["files"] if spectrum else [])
    return found

"""The way that the update of each head took through training, from the snapshots of a run.

    path_h = sum_t ||dW_t,h - dW_t-1,h||_F,    net_h = ||dW_T,h||_F,    net / path in [0, 1]

A ratio near 1 is a straight way, near 0 one that turned back or wandered. `half_step` is where ||dW_t,h||_F first
reaches half of net_h, linear between snapshots. All are lower bounds of what more snapshots would show (path) or as
coarse as these are (half_step). The difference of two adapters' updates is one of rank 2 r and is never formed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.checkpoints import Checkpoint, looks_like_checkpoint, open_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.linalg.pool import one_thread
from loraforge.measure.analysis.statistics import spearman
from loraforge.measure.files import write_json, write_lines
from loraforge.measure.heads.layout import PARTS, Attention, HeadLayout
from loraforge.measure.updates.files import output_files
from loraforge.measure.updates.lines import Progress, by_query_head
from loraforge.measure.updates.norms import one_a_module, part_norms
from loraforge.measure.updates.slices import Change, difference
from loraforge.measure.updates.sources import Source, open_changes

PATH, PATH_HEADS = "path.json", "path.jsonl"
Place = str | os.PathLike[str]


def snapshots_of(folder: Place) -> list[tuple[int, Path]]:
    """(step, folder) of the snapshots `step-N` of a run, in order.

    Raises:
        LoraforgeError: There are none.
    """
    place = Path(folder)
    found = [(path.name.removeprefix("step-"), path) for path in place.glob("step-*") if path.is_dir()]
    steps = sorted((int(number), path) for number, path in found if number.isdecimal())
    if not steps:
        raise LoraforgeError(
            "there are no snapshots", where=place, expected="folders step-N", hint="train with --snapshots K"
        )
    return steps


def measure_path(
    folder: Place,
    *,
    base: Place | Checkpoint | None = None,
    kv_share: bool = True,
    out: Place | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **places: Any,
) -> dict[str, Any]:
    """Measures the way of every head through the snapshots of a run, and writes it.

    Args:
        folder: `snapshots` of a run: folders step-N with adapters or full models.
        base: Where the run started. Adapters start at the update 0 and need none (see `sources.open_changes` for what
            then says where the heads are); full models start at the base, or at the snapshot step-0.
        kv_share: Share the norms of key-value heads among their query heads; else the total counts them repeatedly.
        out: The JSON file, or the folder for path.json; path.jsonl with a line a head comes beside it.
        overwrite: Replace them.
        progress: Called with (stage, detail, done, total).
        **places: layout, config, heads, kv_heads, head_dim.

    Returns:
        {steps, source, total: {path, net, net_over_path, half_step, U, length}, rank_correlation, heads, files}: U is
        the norm of the update of all heads at each step, length that of each stretch, rank_correlation Spearman's rho
        of the heads' U_t with their last U.

    Raises:
        LoraforgeError: There are no snapshots, or they do not belong together.
    """
    started = time.perf_counter()
    files = output_files(out, PATH, overwrite=overwrite, more=(PATH_HEADS,))
    steps = snapshots_of(folder)
    sources = _open(steps, base, places)
    layout = sources[0].layout
    points = [step for step, _ in steps[-len(sources) :]]
    zero_first = points[0] != 0
    norms: list[Tensor] = []
    lengths: list[Tensor] = []
    for index, attention in enumerate(layout.attentions):
        if progress is not None:
            progress("path", f"{attention.stack} {attention.kind} {attention.layer}", index, len(layout.attentions))
        with one_thread():  # as for a single update: sums do not depend on the number of cores
            own, moved = _way(attention, sources, kv_share=kv_share, zero_first=zero_first)
        norms.append(own)
        lengths.append(moved)
    U, length = torch.cat(norms, 1), torch.cat(lengths, 1)  # (points, heads), (points - 1, heads)
    points = [0, *points] if zero_first else points
    lines = _head_ways(layout, points, U, length)
    whole, stretches = U.square().sum(1).sqrt().tolist(), length.square().sum(1).sqrt().tolist()
    found: dict[str, Any] = {
        "steps": points, "source": sources[0].changes.source, "snapshots": str(folder), "kv_share": kv_share,
        "total": _summary(points, whole, sum(stretches)) | {"U": whole, "length": stretches},
        "rank_correlation": [spearman(row.tolist(), U[-1].tolist()) for row in U],
        "layout_sha256": layout.sha256, "warnings": sources[0].changes.warnings,
        "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    if files:
        write_json(files[0], found | {"heads": PATH_HEADS})
        write_lines(files[1], lines)
    return found | {"heads": lines, "files": [str(path) for path in files]}


def _head_ways(layout: HeadLayout, points: Sequence[int], U: Tensor, length: Tensor) -> list[dict[str, Any]]:
    """A line a head from its norms (points, heads) and its stretches (points - 1, heads)."""
    lines: list[dict[str, Any]] = []
    for column, key in enumerate(layout.heads):
        own = U[:, column].tolist()
        way = _summary(points, own, float(length[:, column].sum()))
        lines.append({"layer": key.layer, "head": key.head, **way, "U": own, "stack": key.stack, "kind": key.kind})
    return lines


def _open(steps: Sequence[tuple[int, Path]], base: Place | Checkpoint | None, places: dict[str, Any]) -> list[Source]:
    """A source a snapshot, all in the layout of the first; a full model at step 0 is the start where no base is given.

    Raises:
        LoraforgeError: Full models without a start, or nothing behind it.
    """
    full = looks_like_checkpoint(steps[0][1])
    if full and base is None and steps[0][0] == 0:
        base = steps[0][1]
    start = base if isinstance(base, Checkpoint) or base is None else open_checkpoint(base)
    if not full:
        found: list[Source] = []
        for _, path in steps:
            found.append(open_changes(start, adapter=path, **places))
            # One layout for all, so that their heads are the same.
            places = places | {"layout": found[0].layout}
        return found
    if start is None:
        raise LoraforgeError(
            "the way of full models needs its start", where=steps[0][1].parent, expected="step-0, or the base",
            hint="add --base MODEL",
        )  # fmt: skip
    return [open_changes(start, final=path, **places) for _, path in steps]


def _way(attention: Attention, sources: Sequence[Source], *, kv_share: bool, zero_first: bool) -> tuple[Tensor, Tensor]:
    """Norms of an attention's heads at each point, (points, n_q), and of each stretch, (points - 1, n_q)."""
    places = [place for place in one_a_module(attention) if place.module]
    before: dict[str, Change | None] = {}
    norms: list[Tensor] = [torch.zeros(attention.n_q, dtype=torch.float64)] if zero_first else []
    lengths: list[Tensor] = []
    for source in sources:
        now = {place.module: source.changes.change(place) for place in places}
        norms.append(_head_norms(attention, now, kv_share))
        if len(norms) > 1:
            stretch = {module: difference(change, before.get(module)) for module, change in now.items()}
            lengths.append(_head_norms(attention, stretch, kv_share))
        before = now
    empty = torch.zeros(0, attention.n_q, dtype=torch.float64)
    return torch.stack(norms), torch.stack(lengths) if lengths else empty


def _head_norms(attention: Attention, changes: dict[str, Change | None], kv_share: bool) -> Tensor:
    """U of an attention's heads, (n_q,)."""
    parts = part_norms(attention, changes)
    each = [by_query_head(attention, part, parts[part], kv_share=kv_share).square() for part in PARTS if part in parts]
    return torch.stack(each).sum(0).sqrt()


def _summary(steps: Sequence[int], U: Sequence[float], path: float) -> dict[str, Any]:
    """Length, net length, their ratio, and the step of half the update."""
    net = U[-1]
    return {"path": path, "net": net, "net_over_path": net / path if path else None, "half_step": half_step(steps, U)}


def half_step(steps: Sequence[int], U: Sequence[float]) -> float | None:
    """The step at which U first reaches half of its last value, linear between snapshots; None for no update."""
    half = U[-1] / 2
    if half <= 0.0:
        return None
    at = next(index for index, value in enumerate(U) if value >= half)
    if at == 0:
        return float(steps[0])
    share = (half - U[at - 1]) / (U[at] - U[at - 1])
    return steps[at - 1] + share * (steps[at] - steps[at - 1])

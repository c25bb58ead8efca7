"""Spectra of updates, module by module and head by head: effective ranks, and what they do to the base's directions.

On the singular values s_i of dW: stable rank sum s^2 / s_1^2; effective rank exp(-sum p ln p) with p = s_i / sum s (Roy
and Vetterli, 2007); rank90 and rank99, the least k with that share of sum s^2; rank_use = effective rank / r, near 1
where the rank of an adapter is all used, near 0 where it is wasted. Factors give all singular values from an r x r
core; so do rows B_h R^T of a single head.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters import Adapter
from loraforge.checkpoints import Checkpoint
from loraforge.linalg.spectrum import effective_rank, singular_values, stable_rank
from loraforge.measure.files import SPECTRUM, write_json, write_lines
from loraforge.measure.heads.layout import PARTS, Attention
from loraforge.measure.updates.files import output_files
from loraforge.measure.updates.intruders import (
    EPSILONS,
    KS,
    alignment,
    amplification,
    base_vectors,
    intruder_dimensions,
    leading_vectors,
)  # fmt: skip
from loraforge.measure.updates.lines import Progress
from loraforge.measure.updates.matching import layout_modules
from loraforge.measure.updates.norms import one_a_module
from loraforge.measure.updates.slices import Change, change_norm, check_fit, triangle
from loraforge.measure.updates.sources import Source, open_changes
from loraforge.types import LowRank

Place = str | os.PathLike[str]
SPECTRUM_HEADS = "spectrum_heads.jsonl"
K = 10  # top directions of the base that an update is aligned with
_LARGE = 2048  # a larger dense update is looked at through its leading values
_LEADING = 256


def spectrum(change: Change) -> dict[str, Any]:
    """Singular values of an update and the numbers read from them.

    Args:
        change: Factors, or a matrix (m, n).

    Returns:
        {rank, sv, stable_rank, eff_rank, rank90, rank99, rank_use}. rank is that of the factors, None of a matrix. Of a
        matrix above 2048 on both sides `sv` holds the leading 256: what they do not settle is None.
    """
    if isinstance(change, LowRank):
        return spectrum_numbers(singular_values(change), rank=change.rank)
    if min(change.shape) <= _LARGE:
        return spectrum_numbers(torch.linalg.svdvals(change.to(torch.float64)))
    _, S, _ = leading_vectors(change.to(torch.float64), _LEADING)
    return spectrum_numbers(S, size=change_norm(change))


def spectrum_numbers(S: Tensor, *, rank: int | None = None, size: float | None = None) -> dict[str, Any]:
    """What is read from singular values.

    Args:
        S: (k,) float64, descending.
        rank: r of the factors, for rank_use.
        size: Frobenius norm of the whole update, where S has its leading values alone.
    """
    squares = S.square()
    total = float(squares.sum()) if size is None else size**2
    eff = effective_rank(S) if size is None else None
    stable = stable_rank(S) if size is None else (total / float(squares[0]) if total > 0.0 else 0.0)
    return {
        "rank": rank, "sv": S.tolist(), "stable_rank": stable, "eff_rank": eff,
        "rank90": _rank_of_share(squares, total, 0.90), "rank99": _rank_of_share(squares, total, 0.99),
        "rank_use": eff / rank if rank and eff is not None else None,
    }  # fmt: skip


def _rank_of_share(squares: Tensor, total: float, share: float) -> int | None:
    """The least k with that share of the energy; 0 for no energy, None where the values at hand do not reach it."""
    if total <= 0.0:
        return 0
    # A share that is reached up to rounding is reached.
    reached = squares.cumsum(0) >= share * total * (1.0 - 1e-12)
    return int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else None


def head_spectra(attention: Attention, changes: Mapping[str, Change | None]) -> Iterator[dict[str, Any]]:
    """A line for each part and head of an attention that has an update: {layer, head, stack, kind, part, sv, ...}.

    `head` of k and v is the key-value head.
    """
    for part in PARTS:
        place = attention.part(part)
        change = None if place is None else changes.get(place.module)
        if place is None or change is None:
            continue
        check_fit(tuple(change.shape), place, part)
        core = _one_sided(change, part)
        slices = [core[:, place.span(h)] if part == "o" else core[place.span(h)] for h in range(place.heads)]
        for head, values in enumerate(torch.linalg.svdvals(torch.stack(slices))):
            numbers = spectrum_numbers(values)
            yield {
                "layer": attention.layer, "head": head, "stack": attention.stack, "kind": attention.kind, "part": part,
                "sv": numbers["sv"], "eff_rank": numbers["eff_rank"], "stable_rank": numbers["stable_rank"],
            }  # fmt: skip


def _one_sided(change: Change, part: str) -> Tensor:
    """A matrix whose slices have the singular values of the update's: of factors without their orthonormal side."""
    if not isinstance(change, LowRank):
        return change.to(torch.float64)
    if part == "o":
        return triangle(change.B) @ change.A.to(torch.float64) * change.scaling
    return change.B.to(torch.float64) @ triangle(change.A.mT).mT * change.scaling


def base_numbers(
    weight: Tensor, change: Change, *, k: int = K, ks: Sequence[int] = KS, epsilons: Sequence[float] = EPSILONS
) -> dict[str, Any]:
    """Intruder dimensions, alignment and amplification of one module, its weight decomposed once."""
    vectors = base_vectors(weight, k)
    found = intruder_dimensions(weight, change, ks=ks, epsilons=epsilons, vectors=vectors)
    return found | alignment(change, vectors, k) | {"amplification": amplification(weight, change, k)}


def measure_spectrum(
    base: Place | Checkpoint | None = None,
    *,
    adapter: Place | Adapter | None = None,
    final: Place | Checkpoint | None = None,
    intruders: bool = True,
    per_head: bool = True,
    k: int = K,
    ks: Sequence[int] = KS,
    epsilons: Sequence[float] = EPSILONS,
    out: Place | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **places: Any,
) -> dict[str, Any]:
    """Measures the spectrum of the update of every attention projection, and writes it.

    Args:
        base: The base; needed with `final`, and for intruders, alignment and amplification.
        adapter: An adapter of it; or
        final: a fine-tuned copy of it.
        intruders: Look at the base's directions where the base is known: a whole decomposition of each weight.
        per_head: Also the spectrum of each head's slices.
        k: Top directions of the base for the alignment.
        ks: How many leading directions are looked at for intruders.
        epsilons: Thresholds of intruders.
        out: File of lines (NAME.jsonl), or the folder for spectrum.jsonl; meta and heads come beside it.
        overwrite: Replace them.
        progress: Called with (stage, detail, done, total).
        **places: layout, config, heads, kv_heads, head_dim: see `sources.open_changes`.

    Returns:
        {lines, heads, meta, files}.

    Raises:
        UsageError: Not one of adapter and final.
        LoraforgeError: The inputs do not fit each other, or an output exists.
    """
    started = time.perf_counter()
    files = output_files(out, SPECTRUM, overwrite=overwrite, more=(SPECTRUM_HEADS,) if per_head else ())
    source = open_changes(base, adapter=adapter, final=final, **places)
    weights = source.changes.weights
    lines: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    total = len(layout_modules(source.layout))
    for attention in source.layout.attentions:
        updates = _updates(source, attention)
        for place in one_a_module(attention):
            change = updates.get(place.module)
            if change is None:
                continue
            if progress is not None:
                progress("spectrum", place.module, len(lines), total)
            line = {"module": place.module} | spectrum(change)
            if intruders and weights is not None:
                line |= base_numbers(weights.read(place), change, k=k, ks=ks, epsilons=epsilons)
            lines.append(line | _about(attention, place.module))
        heads += head_spectra(attention, updates) if per_head else ()
    meta = source.meta | {
        "k": k, "ks": list(ks), "epsilons": list(epsilons), "near": 0.01, "modules": len(lines),
        "intruders": intruders and weights is not None, "warnings": source.changes.warnings,
        "layout_sha256": source.layout.sha256, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    if files:
        write_lines(files[0], lines)
        write_json(files[1], meta)
        if per_head:
            write_lines(files[2], heads)
    return {"lines": lines, "heads": heads, "meta": meta, "files": [str(path) for path in files]}


def _about(attention: Attention, module: str) -> dict[str, Any]:
    """Where a module belongs; `part` names all that share it, as `qkv`."""
    parts = [part for part in PARTS if (place := attention.part(part)) is not None and place.module == module]
    return {"part": "".join(parts), "layer": attention.layer, "stack": attention.stack, "kind": attention.kind}


def _updates(source: Source, attention: Attention) -> dict[str, Change | None]:
    """Module -> update of an attention."""
    return {place.module: source.changes.change(place) for place in one_a_module(attention) if place.module}

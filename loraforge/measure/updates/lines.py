"""The lines of an update: every head's norms by component, relative norms, biases and circuits, and their totals.

    U_c = ||dW_c,h||_F for c in q, k, v (rows of head h) and o (columns),    U = sqrt(U_q^2 + U_k^2 + U_v^2 + U_o^2)
    Urel = U / (n_q + n_k + n_v + n_o),  n_c = ||W0_c,h||_F + 1e-12     (the document's: an L2 over an L1 norm)
    Urel_l2 = U / sqrt(n_q^2 + n_k^2 + n_v^2 + n_o^2)                   (0.1 for a change of every weight by a tenth)

Query heads that share a key-value head each count its rows; `kv_share` scales their norms by 1/sqrt(group), in U and in
n, so that sum_h U_h^2 is the squared norm of the update of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraforge.linalg.pool import one_thread
from loraforge.measure.heads.layout import PARTS, Attention, HeadLayout
from loraforge.measure.updates.changes import Changes
from loraforge.measure.updates.circuits import CIRCUITS, circuit_changes
from loraforge.measure.updates.norms import NormsCache, PartNorms, bias_norms, one_a_module, part_norms
from loraforge.types import LowRank

EPS = 1e-12  # the document's, added to each norm
Progress = Callable[[str, str, int, int], None]
Columns = Mapping[str, list[float | None]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How an update is measured.

    Attributes:
        kv_share: Share the norms of key-value heads among their query heads.
        bias: Add the norms of the changes of the biases.
        circuits: Add the changes of both circuits, where the base is known.
        scope: `all` lists every module outside the heads, `heads` whole tensors alone.
        cache: File that keeps the base's norms by hash.
        base_sha256: Hash of the base's weights, where it is known.
        progress: Called with (stage, detail, done, total).
        absent: U of a part that the layout lacks: 0 where it stands for an adapter alone, None (unknown) otherwise.
    """

    kv_share: bool = True
    bias: bool = False
    circuits: bool = True
    scope: str = "heads"
    cache: Path | None = None
    base_sha256: str | None = None
    progress: Progress | None = None
    absent: float | None = None


def head_lines(
    changes: Changes, layout: HeadLayout, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One line a head, and the squared norm of the update of each part over all heads.

    Raises:
        LoraforgeError: A matrix does not fit the layout, or holds NaN or Inf.
    """
    weights, cache = changes.weights, settings.cache
    kept = NormsCache(cache, weights.checkpoint, layout, sha256=settings.base_sha256) if cache and weights else None
    known = None if kept is None else kept.found
    lines: list[dict[str, Any]] = []
    base: list[PartNorms] = []
    squares = dict.fromkeys(PARTS, 0.0)
    # One thread: the matrices are small, and sums then do not depend on the number of cores.
    with one_thread():
        for index, attention in enumerate(layout.attentions):
            if settings.progress is not None:
                name = f"{attention.stack} {attention.kind} {attention.layer}"
                settings.progress("update", name, index, len(layout.attentions))
            matrices: dict[str, Tensor] = {}
            if weights is not None and (known is None or settings.circuits):
                matrices = weights.of(attention)
            if weights is not None:
                base.append(part_norms(attention, matrices) if known is None else known[index])
            own, found = _attention_lines(changes, attention, matrices, base[-1] if base else {}, settings)
            lines += found
            for part, norms in own.items():
                squares[part] += float(norms.square().sum())
    if kept is not None and known is None:
        kept.keep(base)
    return lines, squares


def _attention_lines(
    changes: Changes, attention: Attention, matrices: Mapping[str, Tensor], base: PartNorms, settings: Settings
) -> tuple[PartNorms, list[dict[str, Any]]]:
    """Norms of the update of an attention's parts, and the lines of its heads."""
    places = [place for place in one_a_module(attention) if place.module]
    updates = {place.module: changes.change(place) for place in places}
    own = part_norms(attention, updates)
    extra: dict[str, list[float | None]] = {name: [None] * attention.n_q for name in CIRCUITS}
    if settings.circuits and matrices:
        extra |= circuit_changes(attention, matrices, updates)
    if settings.bias:
        biases = bias_norms(attention, {place.module: changes.bias(place) for place in places})
        # Every line has all three columns, also where the layout has no such part.
        extra |= {f"Ub{part}": [settings.absent] * attention.n_q for part in PARTS[:3]}
        extra |= {f"U{name}": _by_head(attention, name[1], norms, settings) for name, norms in biases.items()}
    factors = all(update is None or isinstance(update, LowRank) for update in updates.values())
    source = "factors" if factors and changes.source == "factors" else "dense"
    return own, [_ordered(line, extra, source) for line in _norm_lines(attention, own, base, settings)]


def by_query_head(attention: Attention, part: str, norms: Tensor, *, kv_share: bool = True) -> Tensor:
    """One norm a query head, (n_q,): those of key-value heads are repeated, with `kv_share` over 1/sqrt(group) each."""
    if part not in ("k", "v"):
        return norms
    share = 1.0 / math.sqrt(attention.group) if kv_share else 1.0
    return norms.repeat_interleave(attention.group) * share


def zero_warnings(lines: list[dict[str, Any]]) -> list[str]:
    """A sentence for the heads whose relative update is unknown although the base is known."""
    known = [line for line in lines if any(line[f"n{part}"] is not None for part in PARTS)]
    zero = [f"layer {line['layer']} head {line['head']}" for line in known if line["Urel"] is None]
    if not zero:
        return []
    shown = ", ".join(zero[:4]) + (f" and {len(zero) - 4} more" if len(zero) > 4 else "")
    return [f"a slice of the base is zero, so nothing is relative to it: Urel is null for {shown}"]


def totals(squares: Mapping[str, float], others: list[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
    """Norms of the update over all heads, by part, outside the heads, and of everything.

    Args:
        squares: Squared norms by part.
        others: Rows of what is outside the heads.
        whole: They are all that there is.
    """
    inside = math.fsum(squares.values())
    values = [row["U"] for row in others]
    outside = math.fsum(value**2 for value in values if value is not None) if whole else None
    everything = None if outside is None else inside + outside
    return {
        "heads": math.sqrt(inside), "parts": {part: math.sqrt(value) for part, value in squares.items()},
        "other": None if outside is None else math.sqrt(outside),
        "all": None if everything is None else math.sqrt(everything),
        "share_of_heads": inside / everything if everything else None,
        "unknown": [row["name"] for row in others if row["U"] is None],
    }  # fmt: skip


def _norm_lines(attention: Attention, own: PartNorms, base: PartNorms, settings: Settings) -> list[dict[str, Any]]:
    """Keys and norms of an attention's heads."""
    columns: dict[str, list[float | None]] = {}
    # A part that a fused projection has, but not in evenly spaced rows, is not absent: its norms are unknown.
    places = [place for place in map(attention.part, PARTS) if place is not None]
    fused = len({place.module for place in places}) < len(places)
    for letter, norms, missing in (("U", own, None if fused else settings.absent), ("n", base, None)):
        for part in PARTS:
            known = part in norms
            columns[letter + part] = (
                _by_head(attention, part, norms[part], settings) if known else [missing] * attention.n_q
            )
    lines = []
    for head in range(attention.n_q):
        line: dict[str, Any] = {name: values[head] for name, values in columns.items()}
        U = math.sqrt(sum(line[f"U{part}"] ** 2 for part in PARTS if line[f"U{part}"] is not None))
        sizes = [line[f"n{part}"] for part in PARTS if line[f"n{part}"] is not None]
        relative = bool(sizes) and min(sizes) > 0.0
        line |= {
            "layer": attention.layer, "head": head, "U": U,
            "Urel": U / sum(size + EPS for size in sizes) if relative else None,
            "Urel_l2": U / math.sqrt(sum(size**2 for size in sizes)) if relative else None,
            "kv_head": head // attention.group, "stack": attention.stack, "kind": attention.kind,
        }  # fmt: skip
        lines.append(line)
    return lines


def _by_head(attention: Attention, part: str, norms: Tensor, settings: Settings) -> list[float | None]:
    return list(by_query_head(attention, part, norms, kv_share=settings.kv_share).tolist())


def _ordered(line: dict[str, Any], extra: Columns, source: str) -> dict[str, Any]:
    """The line in the order of the files, its extra columns last."""
    first = ("layer", "head", "U", "Urel", *(f"U{part}" for part in PARTS), *(f"n{part}" for part in PARTS))
    ordered = {name: line[name] for name in (*first, "Urel_l2", "kv_head")}
    ordered |= {"source": source, "stack": line["stack"], "kind": line["kind"]}
    return ordered | {name: values[line["head"]] for name, values in extra.items()}

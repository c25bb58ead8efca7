"""Oracle: gate gradients to Fisher numbers, and what a run's files say, in plain Python and numpy float64.

The statistics are the document's (its `aggregate`), with the design's repairs: only finite values are ranked, ties in a
top-K go to the smaller (layer, head), and what cannot be computed is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLUMNS = "layer head I_pre I_post U Urel G F Ppred Uq Uk Uv Uo".split()


def fisher(s: np.ndarray, *, batch: int | None = None, eps: float = 1e-6, relative: bool = True) -> dict[str, Any]:
    """G, F, Ppred, S and M of gate gradients.

    Args:
        s: (samples, heads): gradient of each sample's loss by each gate.
        batch: Average over so many samples first (the document); None for one sample at a time.
        eps: Of Ppred = G^2 / (F + eps).
        relative: Whether eps counts in units of the largest F.
    """
    s = np.asarray(s, dtype=np.float64)
    rows = s if batch is None else np.stack([s[i : i + batch].mean(0) for i in range(0, len(s), batch)])
    G, F = np.abs(rows).mean(0), (rows**2).mean(0)
    small = eps * F.max() if relative else eps
    return {"G": G, "F": F, "Ppred": G**2 / (F + small), "S": rows.mean(0), "M": np.abs(s).mean(0), "n": len(rows)}


def average_ranks(x: Sequence[float]) -> np.ndarray:
    """1 + how many are smaller + half of how many others are equal."""
    return np.array([1 + sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x])


def both_finite(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if _finite(a) and _finite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def spearman(x: Sequence[Any], y: Sequence[Any]) -> float | None:
    """Pearson's correlation of the average ranks; None for a constant input or fewer than two pairs."""
    x, y = both_finite(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def top(x: Sequence[Any], k: int) -> set[int]:
    """Positions of the k largest finite values; of equal ones the first."""
    order = sorted((i for i, value in enumerate(x) if _finite(value)), key=lambda i: (-x[i], i))
    return set(order[:k])


def overlap(x: Sequence[Any], y: Sequence[Any], k: int) -> float:
    """Share of the top k in common, among the heads that have both: chance, K/n, needs one population."""
    x, y = both_finite(x, y)
    k = min(k, len(x))
    return len(top(x, k) & top(y, k)) / k


def percentile(x: Sequence[float], q: float) -> float:
    """Linear between the two nearest of the sorted values (numpy's default)."""
    values = sorted(x)
    place = q / 100 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def join(run: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of heads.csv: left join on (layer, head) from `pre`; None where something is missing.

    Args:
        run: `pre`, `post`, `fisher`, `update` -> the lines of those files; only `pre` and `update` must be there.
    """
    rows = {}
    for line in run["pre"]:
        rows[line["layer"], line["head"]] = dict.fromkeys(COLUMNS) | {
            "layer": line["layer"], "head": line["head"], "I_pre": line["I"],
        }  # fmt: skip
    wanted = {
        "post": {"I_post": "I"},
        "fisher": {name: name for name in ("G", "F", "Ppred")},
        "update": {name: name for name in ("U", "Urel", "Uq", "Uk", "Uv", "Uo")},
    }
    for name, columns in wanted.items():
        for line in run.get(name, ()):
            row = rows.get((line["layer"], line["head"]))
            if row is not None:
                row |= {column: line[key] for column, key in columns.items()}
    return [rows[key] for key in sorted(rows)]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """heads.csv as the document writes it: 13 columns, repr of the numbers, `nan` for what is missing."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        lines.append(",".join("nan" if row[name] is None else repr(row[name]) for name in COLUMNS))
    return "\n".join(lines) + "\n"


def cases(rows: Sequence[Mapping[str, Any]], hi: float = 90, lo: float = 30) -> dict[str, Any]:
    """cases.json: inclusive percentiles over the heads that have both I_pre and Urel."""
    usable = [row for row in rows if _finite(row["I_pre"]) and _finite(row["Urel"])]
    at = {(name, q): percentile([row[name] for row in usable], q) for name in ("I_pre", "Urel") for q in (hi, lo)}
    i_hi, i_lo, u_hi, u_lo = at["I_pre", hi], at["I_pre", lo], at["Urel", hi], at["Urel", lo]
    return {
        "important_but_static": [_case(r) for r in usable if r["I_pre"] >= i_hi and r["Urel"] <= u_lo],
        "plastic_but_unimportant": [_case(r) for r in usable if r["Urel"] >= u_hi and r["I_pre"] <= i_lo],
        "thresholds": {f"{name}_p{q:g}": value for (name, q), value in at.items()},
    }


def stats(rows: Sequence[Mapping[str, Any]], topk: int = 20) -> dict[str, Any]:
    """The document's keys of stats.json."""
    column = {name: [row[name] for row in rows] for name in COLUMNS}
    found: dict[str, Any] = {"topk": topk, "n_heads": len(rows)}
    for name in ("U", "Urel"):
        found[f"spearman_rho_Ipre_{name}"] = spearman(column["I_pre"], column[name])
        found[f"topk_overlap_Ipre_{name}"] = overlap(column["I_pre"], column[name], topk)
    picked = cases(rows)
    for name in ("important_but_static", "plastic_but_unimportant"):
        found[f"n_{name}"] = len(picked[name])
    found["n_heads_Ipost"] = sum(_finite(value) for value in column["I_post"])
    if found["n_heads_Ipost"]:
        found["topk_overlap_Ipre_Ipost"] = overlap(column["I_pre"], column["I_post"], topk)
        for name in ("U", "Urel", "G", "F", "Ppred"):
            found[f"spearman_rho_Ipost_{name}"] = spearman(column["I_post"], column[name])
    return found


def null_rho95(n: int, draws: int = 20000, seed: int = 0) -> float:
    """The 95% band of |rho| of n pairs without any relation, by simulation."""
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.tile(np.arange(n, dtype=np.float64), (draws, 1)), axis=1)
    fixed = np.arange(n) - (n - 1) / 2
    rho = (ranks - (n - 1) / 2) @ fixed / (fixed @ fixed)
    return float(np.quantile(np.abs(rho), 0.95))


def null_overlap(n: int, k: int, draws: int = 20000, seed: int = 0) -> float:
    """Mean top-k overlap of unrelated values."""
    rng = np.random.default_rng(seed)
    picked = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :k]
    return float((picked < k).sum(1).mean() / k)


def null_cases(n: int, hi: float = 90, lo: float = 30, draws: int = 20000, seed: int = 0) -> np.ndarray:
    """How many cases of one kind n heads with unrelated I and Urel have, in so many draws."""
    places = list(range(n))
    above, below = percentile(places, hi), percentile(places, lo)
    rng = np.random.default_rng(seed)
    other = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    return ((np.arange(n) >= above) & (other <= below)).sum(1)


def _case(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("layer", "head", "I_pre", "Urel", "U", "G", "Ppred")}


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)

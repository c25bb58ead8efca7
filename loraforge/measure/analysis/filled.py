"""Statistics of a run in one shape, from our files or the document's; chance levels filled in. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.measure.analysis.null import common_members, rho_band

Row = Mapping[str, Any]
_KINDS_OF_CASES = ("important_but_static", "plastic_but_unimportant")


def fill_numbers(rows: Sequence[Row], stats: Mapping[str, Any], cases: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics, chance levels and cases in one shape, whether the files are ours or the document's.

    Args:
        rows: Heads, as in heads.csv.
        stats: Content of stats.json; chance levels that it lacks are worked out from the numbers of heads.
        cases: Content of cases.json, likewise.

    Returns:
        The keys stats, rho, cases, hi, lo, null, line, layers, components, overlap, groups, notes of a run's content.
    """
    ends = sorted({float(m[1]) for key in cases.get("thresholds") or {} if (m := re.search(r"_p([\d.]+)$", key))})
    n, k = int(stats.get("n_heads") or len(rows)), int(stats.get("topk") or 20)
    null = stats.get("null") or {}
    overlap = common_members(0, n, min(k, n), min(k, n))
    rho = {key: dict(entry) for key, entry in (stats.get("rho") or {}).items()}
    for key, value in stats.items():
        if key.startswith("spearman_rho_"):
            rho.setdefault(key.removeprefix("spearman_rho_"), {"rho": value, "n": n, "rho95": rho_band(n)})
    return {
        "stats": dict(stats), "rho": rho, "cases": dict(cases),
        "hi": f"{ends[-1]:g}" if ends else None, "lo": f"{ends[0]:g}" if ends else None,
        "null": {
            "rho95": null.get("rho95") or rho_band(n),
            "overlap_expected": overlap.expected / min(k, n) if overlap else None,
            "overlap_lo": overlap.range95[0] / min(k, n) if overlap else None,
            "overlap_hi": overlap.range95[1] / min(k, n) if overlap else None,
            "cases": {kind: _case_chance(rows, cases, null, kind, ends) for kind in _KINDS_OF_CASES},
        },
        "line": _line(rows), "layers": stats.get("layers") or [], "components": stats.get("components") or [],
        "overlap": stats.get("overlap") or {}, "groups": stats.get("groups") or {},
        "notes": [str(note) for note in stats.get("notes") or ()],
    }  # fmt: skip


def _case_chance(
    rows: Sequence[Row], cases: Mapping[str, Any], null: Mapping[str, Any], kind: str, ends: Sequence[float]
) -> dict[str, Any] | None:
    """How many cases of a kind independent columns would give."""
    told = (null.get("cases_expected") or cases.get("expected") or {}).get(kind)
    if told:
        low, high = told.get("range95") or (None, None)
        return {"expected": told.get("expected"), "lo": low, "hi": high, "p": told.get("p")}
    limits = cases.get("thresholds") or {}
    first, second = ("I_pre", "Urel") if kind == "important_but_static" else ("Urel", "I_pre")
    high = limits.get(f"{first}_p{ends[-1]:g}") if ends else None
    low = limits.get(f"{second}_p{ends[0]:g}") if ends else None
    if high is None or low is None:
        return None
    both = [row for row in rows if row.get("I_pre") is not None and row.get("Urel") is not None]
    sizes = sum(row[first] >= high for row in both), sum(row[second] <= low for row in both)
    found = common_members(len(cases.get(kind) or ()), len(both), *sizes)
    if found is None:
        return None
    return {"expected": found.expected, "lo": found.range95[0], "hi": found.range95[1], "p": found.p}


def _line(rows: Sequence[Row]) -> dict[str, float | None]:
    """Least squares of Ppred on U; empty without three heads or a spread of U."""
    from scipy.stats import linregress

    pairs = [(row["U"], row["Ppred"]) for row in rows if row.get("U") is not None and row.get("Ppred") is not None]
    if len(pairs) < 3 or len({u for u, _ in pairs}) < 2:
        return {}
    fit = linregress([u for u, _ in pairs], [p for _, p in pairs])
    return {
        "slope": float(fit.slope),
        "intercept": float(fit.intercept),
        "pearson": float(fit.rvalue) if math.isfinite(fit.rvalue) else None,
    }

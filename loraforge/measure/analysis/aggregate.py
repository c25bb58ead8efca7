"""The table of a run's heads, its statistics beside their chance levels, and its counterexamples. Torch-free.

heads.csv, stats.json and cases.json hold what the document's files of these names hold, under the same names; the
default profile adds what is needed to tell a finding from chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.joined import Heads, csv_text, join_heads
from loraforge.measure.analysis.null import DRAWS, rho_band
from loraforge.measure.analysis.statistics import Cases, correlation, find_cases, spearman, top_overlap
from loraforge.measure.files import CASES, HEADS, IMPORTANCE, STATS, write_json
from loraforge.storage.atomic import write_whole

TOP_K, HIGH, LOW = 20, 90.0, 30.0
COMPONENTS = ("q", "k", "v", "o")
# The document's pairs; stats.json names them spearman_rho_... and topk_overlap_...
_RHOS = (("Ipre", ("U", "Urel")), ("Ipost", ("U", "Urel", "G", "F", "Ppred")))
_OVERLAPS = (("Ipre_U", "U"), ("Ipre_Urel", "Urel"), ("Ipre_Ipost", "I_post"))
_AGAINST = ("U", "Urel", "Urel_l2", "G", "F", "Ppred")
_PARTS = ("Uq", "Uk", "Uv", "Uo", "OV", "QK")
_KINDS_OF_CASES = {"important_but_static": "static", "plastic_but_unimportant": "plastic"}


def aggregate(
    run_dir: str | Path,
    *,
    topk: int = TOP_K,
    hi: float = HIGH,
    lo: float = LOW,
    profile: Literal["default", "document", "seed"] = "default",
    strict: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Joins a run's measurements and writes heads.csv, stats.json and cases.json into its folder.

    Args:
        run_dir: Folder with importance_pre.jsonl and update.jsonl, ours or the document's; importance_post.jsonl and
            gradfisher_pre.jsonl may be missing.
        topk: K of the overlaps; cut to the number of heads.
        hi: Percentile from which a value is high in the counterexamples.
        lo: Percentile up to which it is low.
        profile: `document` (or `seed`) writes the document's columns and keys and nothing else.
        strict: A head is important only if the interval of its importance lies above zero.
        draws: Permutations of each p.
        seed: Of permutations and resamples.

    Returns:
        {heads: number, stats: content of stats.json, cases: content of cases.json, files: paths, notes}.

    Raises:
        LoraforgeError: A required file is missing or unreadable, or `strict` without intervals.
        UsageError: A setting out of its range.
    """
    if topk < 1:
        raise UsageError("topk must be at least 1", got=topk)
    if not 0 <= lo < hi <= 100:
        raise UsageError("the percentiles must be 0 <= lo < hi <= 100", got=f"lo {lo:g}, hi {hi:g}")
    folder = Path(run_dir)
    if not folder.is_dir():
        raise LoraforgeError("there is no such run", where=folder, expected="the folder of a measured run")
    heads = join_heads(folder)
    if not len(heads):
        raise LoraforgeError("there is no head in the measurement", where=folder / IMPORTANCE["pre"])
    if strict and not heads.has("I_pre_lo"):
        raise LoraforgeError(
            "--strict needs the intervals of the importance", where=folder / IMPORTANCE["pre"], got="no ci_lo",
            hint="measure it with loraforge measure importance, or leave --strict out",
        )  # fmt: skip
    document = profile != "default"
    if document and len(heads.groups) > 1:
        raise LoraforgeError(
            "the document's files cannot tell these heads apart: they know layer and head alone", where=folder,
            got=", ".join(f"{stack}/{kind}" for stack, kind in heads.groups), hint="take the default profile",
        )  # fmt: skip
    chosen = cases_of(heads, hi, lo, strict)
    stats = document_stats(heads, chosen, topk)
    cases = cases_content(heads, chosen, hi, lo, document=document)
    notes = [*heads.notes, *_notes(heads, topk)]
    if document:
        stats["topk"] = topk  # its script writes what was asked, even beyond the number of heads
    else:
        stats |= _beyond(heads, chosen, topk, draws, seed)
        if len(heads.groups) > 1:
            stats["groups"] = {
                f"{stack}/{kind}": _group(heads, (stack, kind), topk, (hi, lo, strict), draws, seed)
                for stack, kind in heads.groups
            }
        stats["notes"] = notes
    write_whole(folder / HEADS, csv_text(heads, document=document))
    files = [folder / HEADS, write_json(folder / STATS, stats), write_json(folder / CASES, cases)]
    return {"heads": len(heads), "stats": stats, "cases": cases, "files": [str(file) for file in files], "notes": notes}


def document_stats(heads: Heads, cases: Cases, topk: int) -> dict[str, Any]:
    """The document's keys of stats.json; None where there is no number."""
    column = heads.columns
    found: dict[str, Any] = {}
    for name in ("U", "Urel"):
        found[f"spearman_rho_Ipre_{name}"] = spearman(column["I_pre"], column[name])
    overlaps = {pair: top_overlap(column["I_pre"], column[name], topk)["overlap"] for pair, name in _OVERLAPS}
    found |= {f"topk_overlap_{pair}": overlaps[pair] for pair in ("Ipre_U", "Ipre_Urel")}
    found["topk"] = min(topk, len(heads))
    found["n_heads"] = len(heads)
    found["n_heads_Ipost"] = int(np.isfinite(column["I_post"]).sum())
    found["topk_overlap_Ipre_Ipost"] = overlaps["Ipre_Ipost"]
    for name in _RHOS[1][1]:
        found[f"spearman_rho_Ipost_{name}"] = spearman(column["I_post"], column[name])
    found["n_important_but_static"] = len(cases.static)
    found["n_plastic_but_unimportant"] = len(cases.plastic)
    return found


def cases_of(heads: Heads, hi: float, lo: float, strict: bool = False) -> Cases:
    """The counterexamples; with `strict` only heads whose interval of I_pre lies above zero are important."""
    above: NDArray[np.bool_] | None = heads.columns["I_pre_lo"] > 0 if strict else None
    return find_cases(heads.columns["I_pre"], heads.columns["Urel"], hi=hi, lo=lo, above_zero=above)


def cases_content(heads: Heads, cases: Cases, hi: float, lo: float, *, document: bool = False) -> dict[str, Any]:
    """cases.json: both kinds with the heads' numbers, and the thresholds."""
    found: dict[str, Any] = {
        name: [_case(heads, i, document) for i in getattr(cases, short)] for name, short in _KINDS_OF_CASES.items()
    }
    cut = cases.thresholds
    found["thresholds"] = {
        f"I_pre_p{hi:g}": cut["x_hi"], f"I_pre_p{lo:g}": cut["x_lo"],
        f"Urel_p{hi:g}": cut["y_hi"], f"Urel_p{lo:g}": cut["y_lo"],
    }  # fmt: skip
    return found if document else found | {"expected": expected_counts(cases)}


def _case(heads: Heads, i: int, document: bool) -> dict[str, Any]:
    key = heads.keys[i]
    numbers = {name: float(heads.columns[name][i]) for name in ("I_pre", "Urel", "U", "G", "Ppred")}
    found = {"layer": key.layer, "head": key.head, **numbers}
    return found if document else found | {"stack": key.stack, "kind": key.kind}


def expected_counts(cases: Cases) -> dict[str, Any]:
    """Counts of counterexamples beside chance, as in stats.json."""
    found = {name: cases.chance[short] for name, short in _KINDS_OF_CASES.items()}
    return {name: None if chance is None else chance.to_json() for name, chance in found.items()}


def _beyond(heads: Heads, cases: Cases, topk: int, draws: int, seed: int) -> dict[str, Any]:
    """What stats.json says beyond the document: chance levels, intervals, components and layers."""
    column, layers = heads.columns, heads.layers
    pairs = {
        f"{short}_{name}": (f"I_{short[1:]}", name) for short in ("Ipre", "Ipost") for name in (*_AGAINST, *_PARTS)
    } | {"Ipre_Ipost": ("I_pre", "I_post"), "U_Ppred": ("U", "Ppred")}  # fmt: skip
    rhos = {
        pair: correlation(column[x], column[y], layers, draws=draws, seed=seed, brief=y in _PARTS)
        for pair, (x, y) in pairs.items()
        if heads.has(x) and heads.has(y)
    }
    overlaps = {pair: top_overlap(column["I_pre"], column[name], topk) for pair, name in _OVERLAPS}
    return {
        "null": {
            "rho95": rho_band(len(heads)),
            "overlap_expected": overlaps["Ipre_U"]["expected"],
            "overlap_range95": overlaps["Ipre_U"]["range95"],
            "cases_expected": expected_counts(cases),
            "p_perm": {pair: found["p_perm"] for pair, found in rhos.items()},
            "draws": draws,
            "seed": seed,
        },
        "rho": rhos,
        "overlap": overlaps,
        "layers": _layers(heads),
        "components": _components(heads),
    }


def _group(
    heads: Heads, group: tuple[str, str], topk: int, rule: tuple[float, float, bool], draws: int, seed: int
) -> dict[str, Any]:
    """The statistics of one stack and kind alone."""
    part = heads.only([i for i, key in enumerate(heads.keys) if (key.stack, key.kind) == group])
    cases = cases_of(part, *rule)
    return document_stats(part, cases, topk) | _beyond(part, cases, topk, draws, seed)


def _layers(heads: Heads) -> list[dict[str, Any]]:
    """A row an attention: means over its heads, the norm of its update, rho within it."""
    rows: list[dict[str, Any]] = []
    for stack, kind, layer in dict.fromkeys(heads.layers):
        part = heads.only([i for i, place in enumerate(heads.layers) if place == (stack, kind, layer)])
        means = {name: _mean(part.columns[name]) for name in ("I_pre", "I_post", "G", "F", "Urel")}
        row: dict[str, Any] = {"stack": stack, "kind": kind, "layer": layer, "heads": len(part), **means}
        row["U"] = _root(part.columns["U"])
        row["rho_Ipre_Urel"] = spearman(part.columns["I_pre"], part.columns["Urel"])
        rows.append(row)
    return rows


def _components(heads: Heads) -> list[dict[str, Any]]:
    """A row a component: norm of its update over all heads, share of the energy, relative size, rank correlations."""
    column = heads.columns
    sizes = {part: _root(column[f"U{part}"]) for part in COMPONENTS}
    energy = sum(size**2 for size in sizes.values() if size is not None)
    rows = []
    for part, size in sizes.items():
        base = _root(column[f"n{part}"])
        rows.append({
            "part": part,
            "U": size,
            "share": size**2 / energy if size is not None and energy else None,
            "relative": size / base if size is not None and base else None,
            "rho_Ipre": spearman(column["I_pre"], column[f"U{part}"]),
            "rho_Ipost": spearman(column["I_post"], column[f"U{part}"]),
        })  # fmt: skip
    return rows


def _notes(heads: Heads, topk: int) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = [f"top-K: K is {len(heads)}, as there are fewer heads than {topk}"] if len(heads) < topk else []
    for name in ("I_pre", "I_post", "U", "Urel"):
        values = heads.columns[name][np.isfinite(heads.columns[name])]
        if len(values) > 1 and np.all(values == values[0]):
            notes.append(f"{name} is {values[0]:g} for all heads: it has no rank correlation")
    return notes


def _mean(values: NDArray[np.float64]) -> float | None:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else None


def _root(values: NDArray[np.float64]) -> float | None:
    """Root of the sum of squares of what is finite."""
    kept = values[np.isfinite(values)]
    return float(np.linalg.norm(kept)) if len(kept) else None

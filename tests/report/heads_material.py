"""Contents of runs, comparisons and seeds as `measure.content` reads them: heavy tails, ties, gaps, both signs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats as statistics

PARTS = ("q", "k", "v", "o")


def make_heads(layers: int = 6, heads: int = 12, seed: int = 0, method: str = "FFT") -> list[dict[str, Any]]:
    """Rows of heads.csv: importance with a heavy tail and both signs, exact ties, two heads that were not measured."""
    draw = np.random.default_rng(seed)
    lora = np.random.default_rng(seed + (7 if method == "LoRA" else 1))
    rows: list[dict[str, Any]] = []
    for layer in range(layers):
        for head in range(heads):
            pre = 0.0 if head == 3 else float(draw.standard_t(1.3) * 4e-4 * (1 + layer / 3))
            post = float(0.5 * pre + draw.standard_t(1.3) * 1.5e-3 * (1 + layer / 3))
            width = float(abs(draw.normal()) * 2e-4 + 1e-4)
            parts = {f"U{part}": float(lora.gamma(8.0, 0.012 * (1 + layer / layers))) for part in PARTS}
            norms = {f"n{part}": float(lora.gamma(40.0, 0.1)) for part in PARTS}
            total = math.sqrt(sum(value**2 for value in parts.values()))
            size = float(abs(draw.normal(2e-3, 1e-3)) + abs(pre))
            fisher = size**2 * float(1 + draw.gamma(1.0))
            rows.append({
                "layer": layer, "head": head, "I_pre": pre, "I_post": post, "U": total,
                "Urel": total / sum(norms.values()), "G": size, "F": fisher, "Ppred": size**2 / fisher, **parts,
                "stack": "enc", "kind": "self", "I_pre_lo": pre - width, "I_pre_hi": pre + width,
                "I_post_lo": post - 2 * width, "I_post_hi": post + 2 * width,
                "Urel_l2": total / math.sqrt(sum(value**2 for value in norms.values())), **norms,
            })  # fmt: skip
    rows[5] |= {"I_post": None, "I_post_lo": None, "I_post_hi": None}
    rows[7] |= {"G": None, "F": None, "Ppred": None}
    return rows


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([math.nan if row[name] is None else row[name] for row in rows])


def make_run(layers: int = 6, heads: int = 12, seed: int = 0, method: str = "FFT", name: str = "") -> dict[str, Any]:
    """What `run_content` returns for one run."""
    rows = make_heads(layers, heads, seed, method)
    n = len(rows)
    k = min(20, n // 2)
    pre, post, relative = column(rows, "I_pre"), column(rows, "I_post"), column(rows, "Urel")

    def rho(x: str, y: str) -> float:
        return float(statistics.spearmanr(column(rows, x), column(rows, y), nan_policy="omit").statistic)

    measured = {"I_pre": pre, "Urel": relative}
    limits = {f"{key}_p{q}": float(np.percentile(measured[key], q)) for key in measured for q in (90, 30)}
    static = [r for r in rows if r["I_pre"] >= limits["I_pre_p90"] and r["Urel"] <= limits["Urel_p30"]]
    plastic = [r for r in rows if r["Urel"] >= limits["Urel_p90"] and r["I_pre"] <= limits["I_pre_p30"]]

    def top(values: np.ndarray) -> set[int]:
        return set(np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:k].tolist())

    ranked = {"U": column(rows, "U"), "Urel": relative, "Ipost": post}
    stats = {
        "spearman_rho_Ipre_U": rho("I_pre", "U"), "spearman_rho_Ipre_Urel": rho("I_pre", "Urel"), "topk": k,
        **{f"topk_overlap_Ipre_{key}": len(top(pre) & top(values)) / k for key, values in ranked.items()},
        "n_heads": n, "n_heads_Ipost": n - 1, "n_important_but_static": len(static),
        "n_plastic_but_unimportant": len(plastic),
        **{f"spearman_rho_Ipost_{key}": rho("I_post", key) for key in ("U", "Urel", "G", "F", "Ppred")},
    }  # fmt: skip
    law = statistics.hypergeom(n, k, k)
    cases = statistics.hypergeom(n, round(0.1 * n + 0.5), round(0.3 * n))
    expected = {"expected": float(cases.mean()), "lo": float(cases.ppf(0.025)), "hi": float(cases.ppf(0.975)), "p": 0.4}
    null = {
        "rho95": 1.96 / math.sqrt(n - 1), "overlap_expected": k / n, "overlap_lo": law.ppf(0.025) / k,
        "overlap_hi": law.ppf(0.975) / k,
        "cases": {"important_but_static": expected, "plastic_but_unimportant": expected},
    }  # fmt: skip
    names = {"Ipre": "I_pre", "Ipost": "I_post"}
    pairs = [*((a, b) for a in names for b in ("U", "Urel", "G", "F", "Ppred")), ("Ipre", "Ipost"), ("U", "Ppred")]
    rhos = {
        f"{a}_{b}": {"rho": (value := rho(names.get(a, a), names.get(b, b))), "n": n - 1, "p_perm": 0.41,
                     "ci": [max(-1, value - 0.2), min(1, value + 0.2)], "kendall": 0.7 * value,
                     "within_layer": {"rho": 0.9 * value, "p_perm": 0.5, "layers": layers}, "rho95": null["rho95"]}
        for a, b in pairs
    }  # fmt: skip
    slope, intercept = np.polyfit(*(column([r for r in rows if r["G"]], key) for key in ("U", "Ppred")), 1)
    taken = {"objective": "task", "method": "exact", "ablate": "zero", "subject": {"n": 277}}
    return {
        "name": name or f"{method} on rte, seed {seed}", "method": method, "task": "rte", "seed": seed,
        "rank": 8 if method == "LoRA" else None, "profile": "default", "hi": 90, "lo": 30,
        "config": {"method": method, "task": "rte", "seed": seed, "rank": 8},
        "hashes": {"base_sha256": "ab12" * 16, "theta0_sha256": "cd34" * 16},
        "heads": rows, "stats": stats, "null": null, "rho": rhos,
        "line": {"slope": slope, "intercept": intercept, "pearson": 0.03}, "layers": [], "components": [],
        "overlap": {"Ipre_U": {"hits": 5, "k": 20, "expected": 400 / n, "p": 0.3}}, "groups": {},
        "cases": {"important_but_static": static, "plastic_but_unimportant": plastic, "thresholds": limits},
        "spectrum": make_spectrum(layers, 8 if method == "LoRA" else 48, seed), "spectrum_heads": [], "path": None,
        "importance": {"pre": dict(taken), "post": dict(taken)},
        "command": "loraforge measure run out/RTE", "versions": {"torch": "2.13.0"}, "notes": [], "missing": {},
    }  # fmt: skip


def make_spectrum(layers: int, rank: int, seed: int) -> list[dict[str, Any]]:
    """Lines of spectrum.jsonl with the place of their module."""
    draw = np.random.default_rng(seed)
    lines = []
    for layer in range(layers):
        for part in PARTS:
            values = np.sort(np.exp(-draw.uniform(0.02, 1.2) * np.arange(rank)) * draw.uniform(0.5, 2))[::-1]
            share = values / values.sum()
            effective = float(np.exp(-(share * np.log(share)).sum()))
            lines.append({
                "module": f"encoder.layer.{layer}.attention.{part}", "rank": rank, "sv": values.tolist(),
                "stable_rank": float((values**2).sum() / values[0] ** 2), "eff_rank": effective,
                "rank90": int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), 0.9)) + 1,
                "rank_use": effective / rank, "n_intruder": {"k10": {"0.5": int(draw.integers(0, 3))}},
                "layer": layer, "part": part,
            })  # fmt: skip
    return lines


def make_comparison(names: tuple[str, ...] = ("FFT", "LoRA-r8"), layers: int = 6) -> dict[str, Any]:
    """What `compare_content` returns for runs of several methods over the same heads."""
    runs = {
        name: make_run(layers, 12, 0, "LoRA" if "LoRA" in name else "FFT", name) | {"rank": 8 * i or None}
        for i, name in enumerate(names)
    }
    band = next(iter(runs.values()))["null"]["rho95"]
    pairs = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            deltas = {
                key: {
                    "a": runs[a]["stats"][key], "b": runs[b]["stats"][key],
                    "difference": (value := runs[a]["stats"][key] - runs[b]["stats"][key]),
                    "ci": [value - 0.2, value + 0.2] if "rho" in key else None, "size_difference": abs(value),
                    "size_ci": None, "beyond_chance": abs(value) > 0.2 if "rho" in key else None,
                }
                for key in ("spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "n_important_but_static")
            }  # fmt: skip
            between = {
                key: {"rho": value, "n": layers * 12, "p_perm": 0.01, "ci": [value - 0.2, value + 0.2], "rho95": band}
                for key, value in (("U", 0.11), ("Urel", 0.06), ("I_post", 0.93))
            }
            changes = {"n": 1, "both_significant": 1, "heads": [{"layer": 1, "head": 2, "a": 0.002, "b": -0.003}]}
            pairs.append({"a": a, "b": b, "deltas": deltas, "between": between, "sign_changes": changes,
                          "overlap": {"U": {"overlap": 0.4, "expected": 0.28, "p": 0.1}}})  # fmt: skip
    comparison = {
        "names": list(names), "n_heads": layers * 12, "rho95": band, "topk": 20, "pairs": pairs,
        "hashes": {name: {"base_sha256": "ab12" * 16, "theta0_sha256": "cd34" * 16} for name in names},
        "same_base": True, "same_start": True, "warnings": [],
        "findings": ["The difference of ρ(I_pre, Urel) between FFT and LoRA-r8 is not larger than chance."],
    }  # fmt: skip
    return {"names": list(names), "comparison": comparison, "runs": runs, "summary": "", "missing": {}, "warnings": [],
            "findings": comparison["findings"]}  # fmt: skip


def make_seeds(seeds: int = 3) -> dict[str, Any]:
    """What `seeds_content` returns for two methods and two tasks."""
    draw = np.random.default_rng(5)
    methods, tasks = ("FFT", "LoRA-r8"), ("mrpc", "rte")
    keys = ("spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "spearman_rho_Ipost_U", "topk_overlap_Ipre_Urel",
            "topk_overlap_Ipre_Ipost", "n_important_but_static")  # fmt: skip

    def spread(key: str) -> dict[str, Any]:
        values = draw.normal(0.1 if "rho" in key else 0.3, 0.08, seeds).tolist()
        sd = float(np.std(values, ddof=1)) if seeds > 1 else None
        return {"mean": float(np.mean(values)), "sd": sd, "min": min(values), "max": max(values), "n": seeds,
                "values": values}  # fmt: skip

    def agreement() -> dict[str, Any]:
        known = seeds > 1
        return {"rho": float(draw.uniform(0.2, 0.9)) if known else None, "kendall_w": 0.6 if known else None,
                "p": 0.01 if known else None, "seeds": seeds, "n": 72}  # fmt: skip

    known = seeds > 1
    noise = {"n": seeds, "noise": 0.05 if known else None, "ci": [0.01, 0.23] if known else None}
    noise["reason"] = None if known else "1 seeds of both methods: seed noise is unknown"
    return {
        "folder": "out/SEEDS", "notes": [], "rho95": 0.23,
        "runs": [
            {"name": m, "method": m.split("-")[0], "task": t, "seed": s, "rank": None, "folder": f"out/{m}/{t}/seed{s}"}
            for m in methods for t in tasks for s in range(seeds)
        ],
        "statistics": {m: {t: {key: spread(key) for key in keys} for t in tasks} for m in methods},
        "stability": {m: {t: {c: agreement() for c in ("I_pre", "I_post", "U")} for t in tasks} for m in methods},
        "differences": [
            {"task": t, "key": key, "a": "FFT", "b": "LoRA-r8", "difference": 0.12, **noise,
             "larger": (t == "rte") if known else None}
            for t in tasks for key in keys[:3]
        ],
        "cross_task": [
            {"method": m, "quantity": c, "a": "mrpc", "b": "rte", "rho": rho, "n": 72, "rho95": 0.23, "p_perm": 0.01}
            for m in methods for c, rho in (("I_post", -0.1), ("U", 0.7))
        ],
    }  # fmt: skip

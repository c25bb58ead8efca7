"""Several runs together: what a seed moves, which methods differ by more, what tasks share. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, rankdata, t

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.joined import Heads, join_heads
from loraforge.measure.analysis.null import permutation_p, rho_band
from loraforge.measure.analysis.runs import Run, open_run, read_object
from loraforge.measure.analysis.seeds_text import seeds_markdown
from loraforge.measure.analysis.statistics import spearman
from loraforge.measure.files import STATS, write_json
from loraforge.storage.atomic import write_whole

SEEDS = "seeds.json"
# Columns whose ranking of the heads is compared over seeds; those two over tasks.
_STABLE = ("I_pre", "I_post", "U", "Urel", "G", "F", "Ppred")
_ACROSS = ("I_post", "U")
# Of stats.json: settings and sizes, which no seed moves.
_SETTINGS = {"topk", "n_heads", "n_heads_Ipost"}
_Groups = dict[tuple[str, str], list[tuple[Run, Heads, dict[str, Any]]]]


def summarise(run_dirs: Sequence[str | Path], out: str | Path, *, report: bool = True) -> dict[str, Any]:
    """Writes seeds.json and seeds.md, and with `report` the page and pictures, over runs of any methods, tasks, seeds.

    Runs of one method (with its rank) and task are seeds of each other. Their statistics come from stats.json, which is
    made where it is missing.

    Args:
        run_dirs: Folders of measured runs.
        out: Folder to write to.
        report: Also write report.html and pictures.

    Returns:
        The content of seeds.json: {runs, statistics: {method: {task: {key: {mean, sd, min, max, n, values}}}},
        stability: {method: {task: {column: {rho, kendall_w, p, seeds, n}}}}, differences: [{task, key, a, b, seeds,
        difference, noise, ci, n, larger, reason}], cross_task: [{method, quantity, a, b, rho, n, rho95, p_perm}],
        notes}.

    Raises:
        LoraforgeError: A run lacks its measurements, or two runs are the same method, task and seed.
        UsageError: No run.
    """
    if not run_dirs:
        raise UsageError("no run to summarise", expected="folders of measured runs")
    groups = _read(run_dirs)
    everyone = [item for group in groups.values() for item in group]
    content: dict[str, Any] = {
        "runs": [
            {"name": run.name, "method": run.method, "task": run.task, "seed": run.seed, "rank": run.rank,
             "folder": str(run.folder)}
            for run, _, _ in everyone
        ],
        "statistics": {},
        "stability": {},
    }  # fmt: skip
    for (method, task), group in groups.items():
        content["statistics"].setdefault(method, {})[task] = _spreads([stats for _, _, stats in group])
        content["stability"].setdefault(method, {})[task] = _stabilities([heads for _, heads, _ in group])
    content["differences"] = _differences(groups)
    content["cross_task"] = _across_tasks(groups)
    content["notes"] = _notes(groups)
    folder = Path(out)
    write_json(folder / SEEDS, content)
    write_whole(folder / "seeds.md", seeds_markdown(content))
    if report:
        from loraforge.measure.analysis.content import seeds_content
        from loraforge.report.heads_seeds import write_seeds_report

        write_seeds_report(folder, seeds_content(folder))
    return content


def stability(columns: Sequence[ArrayLike]) -> dict[str, Any]:
    """How far seeds agree on the ranking of the heads.

    Args:
        columns: One (n,) column a seed, head by head.

    Returns:
        rho (mean Spearman over the pairs of seeds), kendall_w (Kendall's coefficient of concordance with the correction
        for ties), p (its chi-squared approximation with n - 1 degrees of freedom), seeds, n (heads that all seeds
        have). None where fewer than two seeds or heads, or a constant column, leave nothing to compare.
    """
    values = np.array([np.asarray(column, dtype=float) for column in columns])
    values = values[:, np.isfinite(values).all(axis=0)]
    seeds, n = values.shape
    found: dict[str, Any] = {"rho": None, "kendall_w": None, "p": None, "seeds": seeds, "n": n}
    if seeds < 2 or n < 2:
        return found
    rhos = [spearman(a, b) for a, b in combinations(values, 2)]
    known = [rho for rho in rhos if rho is not None]
    ranks = rankdata(values, axis=1)
    sums = ranks.sum(axis=0)
    ties = sum(float((count**3 - count).sum()) for row in values for count in [np.unique(row, return_counts=True)[1]])
    largest = seeds**2 * (n**3 - n) - seeds * ties
    if len(known) < len(rhos) or largest <= 0:
        return found
    w = float(12 * ((sums - sums.mean()) ** 2).sum() / largest)
    p = float(chi2.sf(seeds * (n - 1) * w, n - 1))
    return found | {"rho": float(np.mean(known)), "kendall_w": w, "p": p}


def paired_difference(a: Mapping[int, float | None], b: Mapping[int, float | None]) -> dict[str, Any]:
    """Difference a - b of a statistic of two methods, paired by seed, against what the seed moves.

    Args:
        a: Seed -> value.
        b: Seed -> value.

    Returns:
        seeds (that both have), n, difference (mean), noise (sd of the differences), ci (Student's t, 95 %), larger
        (whether the interval excludes 0) and reason (why there is none).
    """
    pairs = {s: (a[s], b[s]) for s in sorted(set(a) & set(b))}
    moved = {s: x - y for s, (x, y) in pairs.items() if x is not None and y is not None}
    values = np.array(list(moved.values()))
    n = len(values)
    found: dict[str, Any] = {
        "seeds": list(moved), "n": n, "difference": float(values.mean()) if n else None,
        "noise": None, "ci": None, "larger": None, "reason": None,
    }  # fmt: skip
    if n < 2:
        return found | {"reason": f"{n} seeds of both methods: seed noise is unknown"}
    sd = float(values.std(ddof=1))
    if sd <= 1e-9 * float(np.abs(values).max()):
        # Counts and overlaps take few values: a few seeds can agree by accident.
        return found | {"noise": 0.0, "reason": "every seed gave the same difference: seed noise is unknown"}
    half = float(t.ppf(0.975, n - 1)) * sd / n**0.5
    low, high = found["difference"] - half, found["difference"] + half
    return found | {"noise": sd, "ci": [low, high], "larger": bool(low > 0 or high < 0)}


def _read(run_dirs: Sequence[str | Path]) -> _Groups:
    """Runs by (method with rank, task), in the order given."""
    groups: _Groups = {}
    for folder in run_dirs:
        run = open_run(folder)
        heads = join_heads(run.folder)
        group = groups.setdefault((run.name, run.task or "-"), [])
        same = [other.folder for other, _, _ in group if other.seed == run.seed]
        if same:
            got = f"seed {run.seed}, as {same[0]}"
            raise LoraforgeError(
                "two runs are the same method, task and seed", where=folder, got=got,
                expected="one run a seed; run_config.json or the folder's name (seed1_r8) says which",
            )  # fmt: skip
        stats = read_object(run.folder / STATS) or json.loads(json.dumps(aggregate(run.folder)["stats"]))
        group.append((run, heads, stats))
    return groups


def _keys(stats: Mapping[str, Any]) -> list[str]:
    """The statistics at the top of a stats.json."""
    return [k for k, v in stats.items() if k not in _SETTINGS and (v is None or isinstance(v, int | float))]


def _spreads(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """mean, sd, min, max, n and the values of each statistic over seeds."""
    spread = {}
    for key in _keys(found[0]):
        values = [stats.get(key) for stats in found]
        known = np.array([value for value in values if value is not None], dtype=float)
        n = len(known)
        spread[key] = {
            "mean": float(known.mean()) if n else None,
            "sd": float(known.std(ddof=1)) if n > 1 else None,
            "min": float(known.min()) if n else None,
            "max": float(known.max()) if n else None,
            "n": n,
            "values": values,
        }
    return spread


def _shared(tables: Sequence[Heads], name: str) -> list[NDArray[np.float64]]:
    """A column of several runs over the heads that all of them have."""
    at = [{key: i for i, key in enumerate(heads.keys)} for heads in tables]
    keys = [key for key in tables[0].keys if all(key in places for places in at)]
    return [heads.columns[name][[places[key] for key in keys]] for heads, places in zip(tables, at, strict=True)]


def _stabilities(tables: Sequence[Heads]) -> dict[str, Any]:
    return {name: stability(_shared(tables, name)) for name in _STABLE if any(heads.has(name) for heads in tables)}


def _differences(groups: _Groups) -> list[dict[str, Any]]:
    """Each statistic's difference between each two methods on one task."""
    rows = []
    for (first, second), key in (
        (pair, key)
        for pair in combinations(groups, 2)
        if pair[0][1] == pair[1][1]
        for key in _keys(groups[pair[0]][0][2])
    ):
        by_seed = [
            {run.seed if run.seed is not None else -1: stats.get(key) for run, _, stats in groups[name]}
            for name in (first, second)
        ]
        rows.append({"task": first[1], "key": key, "a": first[0], "b": second[0], **paired_difference(*by_seed)})
    return rows


def _across_tasks(groups: _Groups) -> list[dict[str, Any]]:
    """Whether the same heads matter and move on two tasks: rho of the means over seeds, for each method."""
    rows = []
    for first, second in combinations(groups, 2):
        if first[0] != second[0]:
            continue
        tables = [[heads for _, heads, _ in groups[name]] for name in (first, second)]
        for name in _ACROSS:
            columns = _shared([*tables[0], *tables[1]], name)
            a, b = (np.mean(part, axis=0) for part in (columns[: len(tables[0])], columns[len(tables[0]) :]))
            n = int((np.isfinite(a) & np.isfinite(b)).sum())
            rows.append({
                "method": first[0], "quantity": name, "a": first[1], "b": second[1], "rho": spearman(a, b), "n": n,
                "rho95": rho_band(n), "p_perm": permutation_p(a, b),
            })  # fmt: skip
    return rows


def _notes(groups: _Groups) -> list[str]:
    single = [f"{method} on {task}" for (method, task), group in groups.items() if len(group) == 1]
    return [f"one seed alone, so no spread: {', '.join(single)}"] if single else []

"""Ranks or targets of a next adapter from what was measured of a run's heads.

A suggestion says where the measured numbers would put the parameters, always beside the same budget spent evenly. It
claims nothing without a run: whether it helps is seen by training both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.modules import Module, read_modules
from loraforge.measure.analysis.runs import Run, open_run, read_object
from loraforge.measure.files import FINAL, check_free, write_json

RANK = 8
NO_CLAIM = "a suggestion claims nothing without a run: train it and the uniform one, and compare"
RANKS, TARGETS = "rank_pattern.json", "targets.json"
# Scores below this share of the largest are nothing.
_NOTHING = 1e-12


def suggest_ranks(
    run_dir: str | Path,
    *,
    by: str = "I",
    budget: int | None = None,
    mean_rank: float | None = None,
    r_min: int = 1,
    r_max: int | None = None,
    alpha: float | None = None,
    parts: str = "qkvo",
    base: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Deals ranks out to a run's projections in proportion to their scores, within a budget of parameters.

    Writes a file that `train-lora --rank-pattern` takes: r, alpha, targets, rank_pattern, alpha_pattern, whose keys
    are PEFT's (regular expressions that match the end of a module's name); every module keeps the scaling alpha / r.

    Args:
        run_dir: Folder of a measured run, with layout.json.
        by: `I` (importance after training), `I_pre`, `F`, `G`, `U`, or `energy` (rank90 of the update).
        budget: Parameters of all A and B together; default those of the run's rank (else 8) everywhere.
        mean_rank: Instead of `budget`: the parameters of this rank everywhere.
        r_min: Least rank of a projection; 0 leaves projections out.
        r_max: Largest rank; default four times the uniform one. A side of the weight bounds it too.
        alpha: Alpha at the run's rank (else 8), which fixes the scaling; default the run's, else twice the rank.
        parts: Which of q, k, v and o.
        base: Model for the shapes, where the run does not lead to it.
        out: File; default rank_pattern.json in the run's folder.
        overwrite: Replace it.

    Returns:
        {by, budget, parameters, scaling, uniform: {r, parameters}, modules: [{module, key, parts, layer, score, cost,
        rank, alpha}], patterns (what the file holds), note, out}.

    Raises:
        LoraforgeError: Files are missing, or the budget cannot pay `r_min` everywhere.
        UsageError: Settings that contradict each other.
    """
    if budget is not None and mean_rank is not None:
        raise UsageError("budget and mean rank say the same thing", expected="one of them")
    run = open_run(run_dir)
    modules = read_modules(run, by, parts=parts, base=base)
    costs = [module.cost for module in modules]
    start, start_alpha, rslora = _of_run(run, alpha)
    if budget is None:
        budget = int((start if mean_rank is None else mean_rank) * sum(costs))
    uniform = budget // sum(costs)
    top = 4 * max(uniform, 1) if r_max is None else r_max
    if not 0 <= r_min <= top or top < 1:
        raise UsageError("the bounds of the rank must be 0 <= r_min <= r_max", got=f"r_min {r_min}, r_max {top}")
    highs = [min(top, *module.shape) for module in modules]
    ranks = allocate([module.score for module in modules], costs, budget, [min(r_min, h) for h in highs], highs)
    # alpha / r, or alpha / sqrt(r) with rank stabilisation: what the run was trained with stays.
    scaling = start_alpha / (math.sqrt(start) if rslora else start)
    alphas = [_plain(scaling * (math.sqrt(rank) if rslora else rank)) for rank in ranks]
    used = [(m, rank, a) for m, rank, a in zip(modules, ranks, alphas, strict=True) if rank]
    patterns = {
        "r": start,
        "alpha": _plain(start_alpha),
        "targets": [module.suffix for module, _, _ in used],
        "rank_pattern": {re.escape(module.suffix): rank for module, rank, _ in used},
        "alpha_pattern": {re.escape(module.suffix): alpha for module, _, alpha in used},
    }
    path = Path(out) if out is not None else run.folder / RANKS
    check_free(path, overwrite=overwrite)
    write_json(path, patterns)
    return {
        "by": by,
        "budget": budget,
        "parameters": int(np.dot(costs, ranks)),
        "scaling": scaling,
        "rslora": rslora,
        "uniform": {"r": uniform, "parameters": uniform * sum(costs)},
        "modules": [
            _row(module) | {"rank": rank, "alpha": a} for module, rank, a in zip(modules, ranks, alphas, strict=True)
        ],
        "patterns": patterns,
        "note": NO_CLAIM,
        "out": str(path),
    }


def suggest_targets(
    run_dir: str | Path,
    *,
    by: str = "I",
    budget: int | None = None,
    r: int | None = None,
    alpha: float | None = None,
    parts: str = "qkvo",
    base: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Picks the projections with the largest score per parameter until a budget is spent, all at one rank.

    Writes a file that `train-lora --targets` takes.

    Args:
        run_dir: Folder of a measured run, with layout.json.
        by: As in `suggest_ranks`.
        budget: Parameters of all A and B together; default half of those of every projection at rank r.
        r: Rank of the targets; default the run's, else 8.
        alpha: As in `suggest_ranks`.
        parts: Which of q, k, v and o to choose among.
        base: Model for the shapes, where the run does not lead to it.
        out: File; default targets.json in the run's folder.
        overwrite: Replace it.

    Returns:
        {by, budget, r, parameters, score_share (of all projections' score), uniform: {r, parameters}, modules:
        [{module, key, parts, layer, score, cost, chosen}], patterns, note, out}.

    Raises:
        LoraforgeError: Files are missing, or the budget pays no projection.
    """
    run = open_run(run_dir)
    modules = read_modules(run, by, parts=parts, base=base)
    start, start_alpha, rslora = _of_run(run, alpha)
    rank = start if r is None else r
    if rank < 1:
        raise UsageError("the rank must be at least 1", got=rank)
    narrow = min(modules, key=lambda module: min(module.shape))
    if rank > min(narrow.shape):
        raise UsageError("the rank is larger than a side of a projection", where=narrow.suffix, got=rank,
                         expected=f"at most {min(narrow.shape)}")  # fmt: skip
    costs = np.array([module.cost for module in modules])
    whole = int(rank * costs.sum())
    budget = whole // 2 if budget is None else budget
    worth = np.array([module.score for module in modules]) / costs
    chosen, left = set[int](), budget
    for i in np.argsort(-worth, kind="stable"):
        if modules[i].score > 0 and rank * costs[i] <= left:
            chosen.add(int(i))
            left -= int(rank * costs[i])
    if not chosen:
        raise LoraforgeError(
            "the budget pays no projection that scored anything", where=run.folder, got=budget,
            expected=f"at least {int(rank * costs.min())}, the cheapest at rank {rank}",
        )  # fmt: skip
    total = sum(module.score for module in modules)
    patterns = {
        "r": rank,
        "alpha": _plain(start_alpha * (math.sqrt(rank / start) if rslora else rank / start)),
        "targets": [module.suffix for i, module in enumerate(modules) if i in chosen],
    }
    path = Path(out) if out is not None else run.folder / TARGETS
    check_free(path, overwrite=overwrite)
    write_json(path, patterns)
    uniform = int(budget // costs.sum())
    return {
        "by": by,
        "budget": budget,
        "r": rank,
        "parameters": budget - left,
        "score_share": sum(modules[i].score for i in chosen) / total,
        "uniform": {"r": uniform, "parameters": int(uniform * costs.sum())},
        "modules": [_row(module) | {"chosen": i in chosen} for i, module in enumerate(modules)],
        "patterns": patterns,
        "note": NO_CLAIM,
        "out": str(path),
    }


def allocate(scores: ArrayLike, costs: ArrayLike, budget: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole ranks in proportion to scores, within bounds and a budget; the rest by largest remainder.

    The real-valued rank of a module is its score times one factor, clamped; the factor spends the budget exactly, or
    as much as the bounds allow. Ranks are rounded down, and then up in the order of the remainders while it fits.

    Args:
        scores: (n,) of the modules, 0 or more; all 0 counts as all equal.
        costs: (n,) parameters of a unit of rank.
        budget: Largest sum of rank times cost.
        low: (n,) least ranks.
        high: (n,) largest ranks.

    Raises:
        LoraforgeError: The budget does not pay the least ranks.
    """
    s, c = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    lows, highs = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    if c @ lows > budget:
        raise LoraforgeError(
            "the budget does not pay the least rank of every module", got=budget,
            expected=f"at least {int(c @ lows)}", hint="a larger budget, or a smaller least rank",
        )  # fmt: skip
    s = s / s.max() if s.max() > 0 else np.ones_like(s)
    some = s > _NOTHING
    # The spending grows with the factor, linearly between the factors at which a module enters or leaves its bounds.
    factors = np.unique(np.concatenate([[0.0], lows[some] / s[some], highs[some] / s[some]]))
    spent = np.array([c @ np.clip(factor * s, lows, highs) for factor in factors])
    ideal = np.clip(float(np.interp(budget, spent, factors)) * s, lows, highs)
    # A whole number may come out a rounding below itself.
    ranks = np.floor(ideal + 1e-9)
    for i in np.argsort(-(ideal - ranks), kind="stable"):
        if ranks[i] + 1 <= highs[i] and ideal[i] > ranks[i] + 1e-9 and c @ ranks + c[i] <= budget:
            ranks[i] += 1
    return [int(rank) for rank in ranks]


def _of_run(run: Run, alpha: float | None) -> tuple[int, float, bool]:
    """Rank, alpha and rank stabilisation of the run's adapter; rank 8 and twice that after full fine-tuning."""
    adapter = read_object(run.folder / FINAL / "adapter_config.json")
    rank = run.rank or RANK
    options = run.config.get("lora")
    record = options if isinstance(options, Mapping) else run.config
    recorded = adapter.get("lora_alpha", record.get("alpha"))
    known = float(recorded) if isinstance(recorded, int | float) else 2.0 * rank
    return rank, known if alpha is None else float(alpha), bool(adapter.get("use_rslora", record.get("rslora")))


def _row(module: Module) -> dict[str, Any]:
    return {
        "module": module.name, "key": module.suffix, "parts": module.parts, "layer": module.layer,
        "score": module.score, "cost": module.cost,
    }  # fmt: skip


def _plain(value: float) -> int | float:
    """A whole number as int: PEFT's files say alpha so."""
    return int(value) if float(value).is_integer() else float(value)

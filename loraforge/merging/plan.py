"""What a merge would do: modules, ranks, bytes and flops, from headers alone. Writes nothing, loads no factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraforge.calibrate.batches import Batch
from loraforge.merging.job import Job
from loraforge.merging.stream import WINDOW_BYTES

FLOAT, DOUBLE = 4, 8
# Of a result without a low rank: passes over its rows, and entries of a block of them.
SKETCH_PASSES, BLOCK = 6, 2**20


def plan_factored(job: Job, dtype: torch.dtype) -> dict[str, Any]:
    """Plan of a data-free method.

    Args:
        job: What was asked and opened.
        dtype: Dtype of the written factors.

    Returns:
        {modules: [{module, shape, ranks, rank_out, ...}], peak_bytes, flops, output_bytes, steps}.
    """
    rows = _rows(job)
    dense = job.row.output.startswith("R (dense")
    lossless = not dense and job.post is None and job.rule.is_lossless and job.row.default_rank == "full"
    cut = 0 if lossless else sum(_cut_flops(row) for row in rows)
    if dense:
        cut += sum(_dense_flops(row) for row in rows)
    steps = ["read factors"] + (["survey"] if job.row.survey else []) + [job.row.name]
    steps += [] if lossless else ["sketch, rank rule" if dense else "QR, core SVD, rank rule"]
    return {
        "modules": rows,
        "peak_bytes": max((_peak(row, dense=dense, lossless=lossless) for row in rows), default=0) + WINDOW_BYTES,
        "flops": cut,
        "output_bytes": sum(dtype.itemsize * row["rank_out"] * sum(row["shape"]) for row in rows),
        "steps": steps + (["flatten"] if job.post is not None else []) + ["write"],
    }


def _cut_flops(row: Mapping[str, Any]) -> int:
    """Bases of both sides, the core's SVD and the factors of a module."""
    return int(4 * sum(row["shape"]) * row["total_rank"] ** 2 + 22 * row["total_rank"] ** 3)


def _dense_flops(row: Mapping[str, Any]) -> int:
    """Forming the deltas for the merge and for every pass of the sketch."""
    m, n = row["shape"]
    return int(2 * m * n * row["total_rank"] * SKETCH_PASSES + 2 * m * n * (row["rank_out"] + 8) * SKETCH_PASSES)


def _peak(row: Mapping[str, Any], *, dense: bool, lossless: bool) -> int:
    """Bytes at work on one module beside the window of factors."""
    m, n = row["shape"]
    factors = DOUBLE * row["total_rank"] * (m + n)
    if dense:
        return int(factors + DOUBLE * (m + n) * (row["rank_out"] + 8) * 2 + DOUBLE * BLOCK * (len(row["ranks"]) + 3))
    return int(factors if lossless else 4 * factors)


def plan_calibrated(job: Job, batches: Sequence[Batch]) -> dict[str, Any]:
    """Plan of a calibrated method: the live activations of both streams at the widest module and its Grams."""
    rows = _rows(job)
    tokens = sum(int(b.enc_mask.sum()) if b.enc_mask is not None else _rows_of(b) for b in batches)
    held = sum(b.enc_mask.numel() if b.enc_mask is not None else _rows_of(b) for b in batches)
    width = max(row["shape"][1] for row in rows)
    grams = (3 if job.params.searches else 1) * job.params.folds + 3
    passes = job.params.max_iter if job.params.init == "adapters" else 1
    solve = sum(2 * tokens * row["shape"][1] ** 2 + row["shape"][1] ** 3 // 3 for row in rows)
    forward = 4 * held * sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "modules": rows,
        "tokens": tokens,
        "batches": len(batches),
        "peak_bytes": 2 * held * width * FLOAT * 3 + grams * width**2 * DOUBLE,
        "flops": passes * (solve + forward) + (forward if job.params.verify and passes == 1 else 0),
        "output_bytes": sum(FLOAT * row["rank_out"] * sum(row["shape"]) for row in rows),
        "steps": ["load base and data", "trace", "sweep" if passes == 1 else f"{passes} solves", "verify", "write"],
    }


def _rows(job: Job) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for module in job.modules:
        infos = [a.info(module) for a in job.adapters if module in a.modules_set]
        m, n = infos[0].m, infos[0].n
        total = sum(i.rank for i in infos) if job.row.span == "sum" else max(i.rank for i in infos)
        total = getattr(job.params, "clusters", None) or total
        rank = total
        asked = getattr(job.params, "rank", None) if job.row.own_rule else job.rule.rank
        least, most = job.params.bounds if job.row.own_rule else (job.rule.min_rank, job.rule.max_rank)
        if job.row.default_rank == "max" and job.rule.is_lossless:
            rank = max(i.rank for i in infos)
        if asked is not None:
            rank = asked
        cut = rank != total or most is not None or not job.rule.is_lossless
        if cut:
            rank = max(rank, least)
        if most is not None:
            rank = min(rank, most)
        lossless = total
        if job.row.needs == "calibration":
            # Solved in an orthonormal basis of the columns of all B_i, or dense and then cut.
            lossless = min(total, m) if job.params.with_pretrain_matrix == 0 else min(total, m, n)
        rows.append(
            {
                "module": module,
                "shape": [m, n],
                "ranks": [i.rank for i in infos],
                "total_rank": total,
                "rank_out": min(rank, total, m, n) if cut else lossless,
                "at_most": _depends_on_data(job),
            }
        )
    if job.uniform_rank:
        widest = max(row["rank_out"] for row in rows)
        rows = [row | {"rank_out": widest} for row in rows]
    return rows


def _depends_on_data(job: Job) -> bool:
    """Whether the rank of a module is known only from its spectrum."""
    rule = job.rule
    goals = (rule.energy, rule.nuclear, rule.ratio, rule.fro_error, job.budget, job.post)
    own = job.row.own_rule and getattr(job.params, "rank", None) is None
    sparse = job.row.needs == "adapters" and (hasattr(job.params, "seed") or hasattr(job.params, "density"))
    return own or sparse or any(goal is not None for goal in goals)


def _rows_of(batch: Batch) -> int:
    """Samples of a batch without tokens: each counts as one row here, as the number of patches is the model's."""
    return len(batch.indices)

"""What a merge would do: modules, ranks, bytes and flops, from headers alone. Writes nothing, loads no factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loraforge.calibrate.batches import Batch
from loraforge.merging.job import Job

FLOAT, DOUBLE = 4, 8


def plan_factored(job: Job, dtype: torch.dtype) -> dict[str, Any]:
    """Plan of a data-free method.

    Args:
        job: What was asked and opened.
        dtype: Dtype of the written factors.

    Returns:
        {modules: [{module, shape, ranks, rank_out, ...}], peak_bytes, flops, output_bytes, steps}.
    """
    rows = _rows(job)
    exact = sum(FLOAT * row["total_rank"] * sum(row["shape"]) for row in rows)
    widest = max((DOUBLE * 4 * row["total_rank"] * sum(row["shape"]) for row in rows), default=0)
    flops = sum(4 * sum(row["shape"]) * row["total_rank"] ** 2 + 22 * row["total_rank"] ** 3 for row in rows)
    lossless = job.rule.is_lossless and job.row.default_rank == "full"
    return {
        "modules": rows,
        "peak_bytes": exact + (0 if lossless else widest),
        "flops": 0 if lossless else flops,
        "output_bytes": sum(dtype.itemsize * row["rank_out"] * sum(row["shape"]) for row in rows),
        "steps": ["read factors", job.row.name] + ([] if lossless else ["QR, core SVD, rank rule"]) + ["write"],
    }


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
        total = sum(i.rank for i in infos)
        rank = total
        if job.row.default_rank == "max" and job.rule.is_lossless:
            rank = max(i.rank for i in infos)
        if job.rule.rank is not None:
            rank = job.rule.rank
        cut = rank != total or not job.rule.is_lossless
        if cut:
            rank = max(rank, job.rule.min_rank)
        if job.rule.max_rank is not None:
            rank = min(rank, job.rule.max_rank)
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
                "at_most": job.rule.energy is not None,
            }
        )
    if job.uniform_rank:
        widest = max(row["rank_out"] for row in rows)
        rows = [row | {"rank_out": widest} for row in rows]
    return rows


def _rows_of(batch: Batch) -> int:
    """Samples of a batch without tokens: each counts as one row here, as the number of patches is the model's."""
    return len(batch.indices)

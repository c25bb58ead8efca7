"""The account of a merge: the report that run.json, the model card and `merge --json` are made of."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.kernels.backend import kernel_report
from loraforge.linalg.device import peak_bytes, peak_rss
from loraforge.merging.job import Job
from loraforge.provenance import versions


def merge_report(job: Job, layers: Sequence[Mapping[str, Any]], seed: int | None, seconds: float) -> dict[str, Any]:
    """The report of a merge; relative_error and kept_energy are totals over all modules, by squared norms.

    Args:
        job: The finished merge.
        layers: A row a module, in order: module, rank, kept_energy, relative_error, norm, and the method's own.
        seed: The user's seed.
        seconds: Wall time so far.
    """
    total = sum(layer["norm"] ** 2 for layer in layers)
    lost = sum((layer["norm"] * layer["relative_error"]) ** 2 for layer in layers)
    relative = (lost / total) ** 0.5 if total > 0 else 0.0
    infos = {m: next(a.info(m) for a in job.adapters if m in a.modules_set) for m in job.modules}
    notes = [note for layer in layers for note in layer.get("notes") or ()]
    if job.loader.summary():
        notes.append(str(job.loader.summary()))
    if layers and total == 0.0:
        notes.append("the merged update is zero in every module")
    return {
        "out": None,
        "method": job.row.name,
        "params": dataclasses.asdict(job.params),
        "weights": list(job.weights),
        "rank_rule": dataclasses.asdict(job.rule) | {"budget": job.budget},
        "post": None if job.post is None else dataclasses.asdict(job.post),
        "adapters": [
            {
                "name": name,
                "path": os.fspath(a.path),
                "format": a.format,
                "sha256": a.sha256,
                "modules": len(a.modules),
                "ranks": sorted({a.info(m).rank for m in a.modules}),
            }
            for name, a in zip(job.names, job.adapters, strict=True)
        ],
        "modules": len(job.modules),
        "rank_max": max((layer["rank"] for layer in layers), default=0),
        "parameters": sum(layer["rank"] * (infos[layer["module"]].m + infos[layer["module"]].n) for layer in layers),
        "base": next((a.base for a in job.adapters if a.base), None),
        "task_type": next((a.task_type for a in job.adapters if a.task_type), None),
        "relative_error": relative,
        "kept_energy": 1.0 - relative**2,
        "seconds": seconds,
        "phases": job.phases,
        "peak_rss_bytes": peak_rss(),
        "device": str(job.device),
        "peak_device_bytes": peak_bytes(job.device),
        "seed": getattr(job.params, "seed", seed),
        "kernels": kernel_report(),
        "versions": versions("torch"),
        "warnings": list(dict.fromkeys([*job.warnings, *notes])),
        "layers": [dict(layer) for layer in layers],
    }

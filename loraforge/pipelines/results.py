"""The table of a pipeline: base, every adapter, each task's own, and the merges, by task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.pipelines.build import Build

_WEIGHTS = ("*.safetensors", "*.bin")


def table_rows(build: Build, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Tasks and rows of a finished evaluation.

    Args:
        build: What was run.
        records: Records by stage.

    Returns:
        tasks: [{id, metric, lower_is_better, n}]; rows: [{name, kind (base, adapter, own or merge), scores, intervals,
        mean, normalised, path, bytes, ...}], lists in the order of the tasks, None where a row has no score.
    """
    found = json.loads((build.evaluation / "results.json").read_text(encoding="utf-8"))
    tasks = [{key: task.get(key) for key in ("id", "metric", "lower_is_better", "n")} for task in found["tasks"]]
    merges = {merge.name: merge for merge in build.pipeline.merges}
    rows = []
    for row in found["rows"]:
        name, kind = row["name"], row["kind"]
        cells = [row["cells"][task["id"]] for task in tasks]
        content = {
            "name": name,
            "kind": "merge" if name in merges else kind if kind in ("base", "own") else "adapter",
            "scores": [cell["value"] for cell in cells],
            "intervals": [cell.get("interval") for cell in cells],
            "mean": row["average"],
            "normalised": row["normalised"],
            "path": row["path"],
            "bytes": None if row["path"] is None else _weight_bytes(Path(row["path"])),
        }
        if name in merges:
            record = records[f"merge:{name}"]
            content |= {
                "method": merges[name].row.name,
                "seconds": record["seconds"],
                "rank": record["result"]["rank_max"],
            }
        rows.append(content)
    return {"tasks": tasks, "rows": rows}


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weights that one loads; heads that were kept apart are not among them."""
    return sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))

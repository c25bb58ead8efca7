"""The folder of an evaluation: results.json, report.html, and run.json that says how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loraforge
from loraforge.report.evaluation import write_evaluation_report
from loraforge.storage.atomic import check_target, new_folder

_RUN = ("base", "split", "settings", "versions", "seconds")


def check_out(out: str | Path, overwrite: bool) -> None:
    """Refuses an output that is taken, before anything is computed.

    Raises:
        LoraforgeError: It exists and may not be replaced.
    """
    check_target(Path(out).resolve(), overwrite)


def write_evaluation(out: str | Path, record: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Writes the record of an evaluation as numbers and as a page; the folder appears whole or not at all.

    Raises:
        LoraforgeError: It exists and may not be replaced, or the disk refuses.
    """
    with new_folder(out, overwrite) as folder:
        (folder / "results.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        run = {"loraforge": loraforge.__version__, **{key: record[key] for key in _RUN}}
        run["inputs"] = [{key: row.get(key) for key in ("name", "kind", "path", "sha256")} for row in record["rows"]]
        run["tasks"] = record["tasks"]
        (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_evaluation_report(folder / "report.html", record)
    return Path(out)

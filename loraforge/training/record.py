"""What a finished run says about itself: run.json and the README.md of its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.storage.files import sha256_of
from loraforge.tasks import TaskData, TaskSpec

# Packages whose versions decide the numbers.
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def base_record(base: str | Path, config: Any) -> dict[str, Any]:
    """What the base is: its weight files with their sha256, or the revision of an id in the cache."""
    folder = Path(base)
    if not folder.is_dir():
        return {"base": str(base), "base_revision": getattr(config, "_commit_hash", None)}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {"base": str(base), "base_sha256": {path.name: sha256_of(path) for path in files}}


def data_record(data: Mapping[str, TaskData]) -> dict[str, Any]:
    """The splits of the task."""
    return {
        split: {"source": rows.source, "sha256": rows.sha256, "rows": len(rows), "available": rows.available}
        for split, rows in data.items()
    }


def task_record(spec: TaskSpec, kind: str) -> dict[str, Any]:
    """The task without its sources (data_record has them) and without what was left to its default."""
    kept = {
        name: getattr(spec, name)
        for name in spec.__slots__
        if name not in ("train", "eval", "test", "kind", "overrides") and getattr(spec, name) is not None
    }
    return {"id": spec.id, "kind": kind, **{k: v if isinstance(v, str | int) else _plain(v) for k, v in kept.items()}}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json and README.md."""
    text = json.dumps(record, indent=1, allow_nan=False, default=str) + "\n"
    (folder / "run.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(record), encoding="utf-8")


def card(record: Mapping[str, Any]) -> str:
    """README.md of a trained adapter or model, with the front matter that model hubs read."""
    lora = record["method"] == "lora"
    base = record["base"]
    front = ["---", f"library_name: {'peft' if lora else 'transformers'}", "tags:", *(["- lora"] if lora else [])]
    front += ["- loraforge", f"base_model: {json.dumps(base, ensure_ascii=False)}", "---", ""]
    task = record["task"]
    facts = {
        "task": f"{task['id']} ({task['kind']})",
        "base": base,
        "steps": record["steps"],
        "epochs": record["epochs"],
        "trained parameters": record["trainable_parameters"],
        "seed": record["seed"],
    }
    if lora:
        facts |= {"rank": record["lora"]["r"], "alpha": record["lora"]["alpha"], "modules": record["modules"]}
    if record["labels"]:
        facts["classes"] = ", ".join(record["labels"])
    lines = [*front, f"# {'LoRA adapter' if lora else 'Model'} for {_cell(task['id'])}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_show(value)} |" for name, value in facts.items()]
    if record["metrics"]:
        lines += ["", "## Measured", "", "| split | metric | value | 95 % interval | rows |", "|---|---|---|---|---|"]
        lines += [_metric_row(split, name, score) for split, score in record["metrics"].items()
                  for name in score["metrics"]]  # fmt: skip
    lines += ["", "## Use", "", "```python", *_loading(record), "```", "", "`run.json` holds all settings.", ""]
    return "\n".join(lines)


def _metric_row(split: str, name: str, score: Mapping[str, Any]) -> str:
    low_high = score["intervals"].get(name)
    interval = "" if low_high is None else f"{low_high[0]:.4f} to {low_high[1]:.4f}"
    return f"| {split} | {name} | {_show(score['metrics'][name])} | {interval} | {score['n']} |"


def _loading(record: Mapping[str, Any]) -> list[str]:
    name = record["model_class"]
    if record["method"] == "full":
        return [f"from transformers import {name}", "", f'model = {name}.from_pretrained("path/to/this/folder")']
    heads = f", num_labels={len(record['labels'])}" if record["labels"] else ""
    return [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({json.dumps(record['base'], ensure_ascii=False)}{heads})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]


def _show(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.6g}" if isinstance(value, float) else _cell(value)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else os.fspath(value)

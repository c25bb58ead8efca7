"""The README.md of a merged adapter: a model card of what the run's report says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(report: Mapping[str, Any]) -> str:
    """Model card text with the front matter that model hubs read.

    Args:
        report: The merge's report. Read where present: method, params, base, task_type, adapters ([{path, name, weight,
            sha256}]), weights, modules (number), rank_max, parameters, relative_error, kept_energy, dtype, warnings.

    Returns:
        Markdown; the same report gives the same text.
    """
    base = report.get("base")
    front = ["---", "library_name: peft", "tags:", "- lora", "- merge", "- loraforge"]
    # JSON strings are YAML strings, whatever characters a path holds.
    front += [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if base else []
    method = report.get("method", "merge")
    lines = [*front, "---", "", "# Merged LoRA adapter", "", f"Method: `{method}`", ""]
    facts = {
        "modules": report.get("modules"),
        "largest rank": report.get("rank_max"),
        "parameters": report.get("parameters"),
        "dtype": report.get("dtype"),
        "relative error of the rank rule": report.get("relative_error"),
        "kept energy": report.get("kept_energy"),
    }
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_show(value)} |" for name, value in facts.items() if value is not None]
    params = report.get("params") or {}
    lines += [f"| {name} | `{_cell(value)}` |" for name, value in params.items()]
    lines += ["", "## Merged from", "", "| adapter | weight | sha256 |", "|---|---|---|"]
    adapters = report.get("adapters") or []
    weights = report.get("weights") or [None] * len(adapters)
    for entry, weight in zip(adapters, weights, strict=False):
        shown = entry.get("weight", weight)
        name = entry.get("name") or str(entry.get("path", "")).rstrip("/").rpartition("/")[2]
        lines.append(f"| {_cell(name)} | {_show(shown)} | `{str(entry.get('sha256', ''))[:16]}` |")
    if report.get("warnings"):
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in report["warnings"])]
    lines += ["", "## Use", "", *_use(str(report.get("format") or "peft"))]
    return "\n".join(lines)


def _use(layout: str) -> list[str]:
    """How to load it, by format."""
    scale = "Every module has scale 1 (alpha equals the rank). `run.json` holds the whole recipe."
    if layout != "peft":
        return [
            f"The `.safetensors` file is in the spelling of {layout}: load it with any tool for that.",
            "",
            scale,
            "",
        ]
    return [
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
        "```",
        "",
        "Every module has scale 1 (`lora_alpha = r`). `run.json` holds the whole recipe.",
        "",
    ]


def _show(value: Any) -> str:
    """Numbers with six digits, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else _cell(value if value is not None else "")


def _cell(value: Any) -> str:
    """Text that cannot break out of a table cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")

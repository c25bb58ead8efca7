"""The README.md of a merged model: a model card of what the run's report says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def full_model_card(report: Mapping[str, Any]) -> str:
    """Model card text with the front matter that model hubs read.

    Args:
        report: The merge's report. Read where present: method, params, base, adapters ([{path, name, format, sha256}]),
            weights, parameters, relative_error, dtype, rounding, warnings.

    Returns:
        Markdown; the same report gives the same text.
    """
    base = report.get("base")
    front = ["---", "library_name: transformers", "tags:", "- merge", "- loraforge"]
    # JSON strings are YAML strings, whatever characters a path holds.
    front += [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if base else []
    method = report.get("method", "merge")
    lines = [*front, "---", "", "# Merged model", "", f"Method: `{method}`", "", "| | |", "|---|---|"]
    facts = {
        "parameters": report.get("parameters"),
        "dtype": report.get("dtype"),
        "relative error of the rank rule": report.get("relative_error"),
        "relative rounding of the weights": report.get("rounding"),
        **(report.get("params") or {}),
    }
    lines += [f"| {name} | {_show(value)} |" for name, value in facts.items() if value is not None]
    entries = report.get("adapters") or []
    weights = report.get("weights") or [None] * len(entries)
    lines += ["", "## Merged from", "", "| input | kind | weight | sha256 |", "|---|---|---|---|"]
    for entry, weight in zip(entries, weights, strict=False):
        digest = str(entry.get("sha256", ""))[:16]
        lines.append(
            f"| {_show(entry.get('name', ''))} | {_show(entry.get('format'))} | {_show(weight)} | `{digest}` |"
        )
    if report.get("warnings"):
        lines += ["", "## Notes", "", *(f"- {_show(note)}" for note in report["warnings"])]
    lines += ["", "`run.json` holds the whole recipe and the hashes of every input file.", ""]
    return "\n".join(lines)


def _show(value: Any) -> str:
    """Numbers with six digits, anything else as text that cannot break out of a table cell."""
    text = f"{value:.6g}" if isinstance(value, float) else str("" if value is None else value)
    return text.replace("|", "\\|").replace("\n", " ")

"""New results beside stored ones: a verdict only where the change is larger than what the timings spread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError

SCHEMA = 1
FENCE = 1.5  # of an interquartile range, as far as Tukey lets whiskers go
FEWEST = 3  # timings below which a spread says nothing
PEERS = ("reference", "torch", "peft", "document")
_NAMES = ("group", "case", "form", "device")
_FIGURES = ("seconds", "iqr", "runs")


def load_result(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        LoraforgeError: The file is missing, no JSON, of another schema, or lacks what a comparison needs.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoraforgeError(
            "there are no stored results", where=path, hint="make them with --out FILE.json"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoraforgeError("the stored results are no JSON", where=path, got=error) from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        got = f"schema {found.get('schema')}" if isinstance(found, dict) else type(found).__name__
        raise LoraforgeError(
            "the file holds no results of `loraforge bench`", where=path, got=got, expected=f"schema {SCHEMA}"
        )
    rows = found.get("rows")
    if not isinstance(found.get("machine"), dict) or not isinstance(rows, list) or not all(map(_is_row, rows)):
        expected = f"an object `machine`, and rows with {', '.join((*_NAMES, *_FIGURES))}"
        raise LoraforgeError("the stored results are incomplete", where=path, expected=expected)
    return found


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in _NAMES)
        and all(isinstance(row.get(name), int | float) for name in _FIGURES)
    )


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios new / old of the rows that both have.

    A change counts if the medians lie further apart than `FENCE` times the sum of both interquartile ranges; with fewer
    than `FEWEST` timings on a side nothing is known of the spread.

    Returns:
        `rows` in the order of the new result, `only_new` and `only_old` (names of rows), `notes` on what makes the two
        hard to compare.
    """
    before = {_key(row): row for row in old["rows"]}
    rows = []
    for row in new["rows"]:
        past = before.get(_key(row))
        if past is None or past["seconds"] <= 0.0:
            continue
        change, spread = row["seconds"] - past["seconds"], FENCE * (row["iqr"] + past["iqr"])
        verdict = "same" if abs(change) <= spread else "slower" if change > 0.0 else "faster"
        if min(row["runs"], past["runs"]) < FEWEST:
            verdict = "unknown"
        rows.append(
            {name: row[name] for name in _NAMES}
            | {
                "seconds_old": past["seconds"],
                "seconds_new": row["seconds"],
                "ratio": row["seconds"] / past["seconds"],
                "spread": spread / past["seconds"],
                "verdict": verdict,
            }
        )
    here = {_key(row) for row in new["rows"]}
    groups = set(new["groups"])
    return {
        "rows": rows,
        "only_new": [" ".join(key) for key in sorted(here - before.keys())],
        "only_old": [" ".join(key) for key in sorted(before.keys() - here) if key[0] in groups],
        "notes": _notes(new, old),
    }


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _NAMES)


def _notes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What differs beside the code."""
    notes = []
    for label, where, key in (
        ("machines", "machine", "machine"), ("GPUs", "machine", "gpu"), ("threads", "machine", "threads"),
        ("versions of torch", "machine", "torch"), ("clocks", "", "clock"), ("sizes", "", "size"),
    ):  # fmt: skip
        a, b = ((r.get(where) or {}).get(key) if where else r.get(key) for r in (old, new))
        if a != b:
            notes.append(f"other {label}: stored {a}, now {b}")
    return notes


def too_slow(comparison: Mapping[str, Any], limit: float) -> list[dict[str, Any]]:
    """The rows of this program, not of its peers, whose verdict is "slower" and whose ratio is above `limit`."""
    own = [row for row in comparison["rows"] if row["form"] not in PEERS]
    return [row for row in own if row["verdict"] == "slower" and row["ratio"] > limit]

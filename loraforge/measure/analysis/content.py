"""What the files of a run, a comparison or several seeds say, as plain data for the reports. Torch-free.

Every reader takes the document's files as well: what they lack beside the numbers, the chance levels, is filled in.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.analysis.filled import fill_numbers
from loraforge.measure.analysis.joined import DOCUMENT, EXTRA, read_heads
from loraforge.measure.analysis.null import rho_band
from loraforge.measure.analysis.runs import open_run, read_object
from loraforge.measure.files import CASES, CONFIG, FISHER, HEADS, IMPORTANCE, LAYOUT, SPECTRUM, STATS, UPDATE, key_of
from loraforge.measure.heads.families import locate
from loraforge.measure.heads.layout import PARTS, HeadLayout

METRICS, JOINED, SUMMARY, SEEDS = "compare_metrics.json", "heads_joined.csv", "compare_summary.txt", "seeds.json"
SPECTRUM_HEADS, PATH, PATH_HEADS = "spectrum_heads.jsonl", "path.json", "path.jsonl"
_MEASURED = {"pre": IMPORTANCE["pre"], "post": IMPORTANCE["post"], "fisher": FISHER, "update": UPDATE}
# What a run may lack, and how to have it.
_OPTIONAL = {
    IMPORTANCE["post"]: "Importance after training was not measured: loraforge measure importance --phase post.",
    FISHER: "Gradient and Fisher information of the gates were not measured: loraforge measure fisher.",
    SPECTRUM: "The update's singular values were not measured: loraforge measure spectrum.",
    PATH: "No snapshots were kept along the training (--snapshots K), so its path is not known.",
}
_TEXT = {"stack", "kind"}
_WHOLE = {"layer", "head", "kv_head"}


def run_content(folder: str | Path) -> dict[str, Any]:
    """What a measured run's folder says.

    Returns:
        {name, folder, method, task, seed, rank, profile, command, versions, config, hashes, heads: rows of heads.csv
        (None for nan), stats, rho: {pair: {rho, rho95, ...}}, null: {rho95, overlap_expected, overlap_lo, overlap_hi,
        cases: {kind: {expected, lo, hi, p}}}, cases, hi, lo (percentiles of the cases), line (least squares of Ppred on
        U), layers, components, overlap, groups, spectrum (lines with layer and part), spectrum_heads, path, importance:
        {pre, post, fisher, update: settings}, notes, missing: {file: sentence}}.

    Raises:
        LoraforgeError: heads.csv, stats.json or cases.json is missing or cannot be read.
    """
    place = Path(folder)
    _demand(place, (HEADS, STATS, CASES), "a measured run", f"loraforge measure aggregate {place}")
    run, stats, cases = open_run(place), read_object(place / STATS), read_object(place / CASES)
    layout = read_object(place / LAYOUT)
    rows = _rows(place / HEADS)
    title = run.name + (f" on {run.task}" if run.task else "") + ("" if run.seed is None else f", seed {run.seed}")
    return {
        "name": title,
        "folder": str(place), "method": run.method, "task": run.task, "seed": run.seed, "rank": run.rank,
        "config": dict(run.config), **{key: run.config.get(key) for key in ("profile", "command")},
        "versions": run.config.get("versions") or {}, "hashes": _hashes(run.config), "heads": rows,
        **fill_numbers(rows, stats, cases),
        "spectrum": _placed(_json_lines(place / SPECTRUM), layout), "path": _path(place),
        "spectrum_heads": _json_lines(place / SPECTRUM_HEADS),
        "importance": {name: _settings(place / file) for name, file in _MEASURED.items()},
        "missing": _missing(place, rows),
    }  # fmt: skip


def compare_content(folder: str | Path) -> dict[str, Any]:
    """What a comparison's folder says.

    Returns:
        {names, folder, comparison (of compare_metrics.json), summary, runs: {name: as of `run_content`, from the table
        of the comparison where a run's folder is gone}, findings, warnings, missing}.

    Raises:
        LoraforgeError: compare_metrics.json or heads_joined.csv is missing or cannot be read.
    """
    place = Path(folder)
    _demand(place, (METRICS, JOINED), "a comparison", "loraforge compare RUN RUN --out DIR")
    metrics = read_object(place / METRICS)
    comparison = metrics.pop("comparison", {})
    names = [str(name) for name in comparison.get("names") or metrics]
    joined = _table(place / JOINED)
    runs: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in names:
        source = Path(str((comparison.get("folders") or {}).get(name) or ""))
        found = next((p for p in (source, place / source) if source.name and (p / HEADS).is_file()), None)
        runs[name] = _from_table(name, joined, metrics.get(name) or {}, (comparison.get("cases") or {}).get(name) or {})
        if found is None:
            missing[name] = f"The folder of {name} is gone ({source}): its spectra and settings are not shown."
        else:
            more = run_content(found)
            kept = ("spectrum", "path", "importance", "hashes", "task", "seed", "rank", "method", "command", "config")
            # The table has the heads that all runs share; the run's own file knows more about each.
            shared = {key_of(row) for row in runs[name]["heads"]}
            heads = [row for row in more["heads"] if key_of(row) in shared]
            runs[name] |= {key: more[key] for key in kept} | {"heads": heads}
    return {
        "names": names, "folder": str(place), "comparison": comparison, "runs": runs, "missing": missing,
        "summary": (place / SUMMARY).read_text(encoding="utf-8") if (place / SUMMARY).is_file() else "",
        "findings": list(comparison.get("findings") or ()), "warnings": list(comparison.get("warnings") or ()),
    }  # fmt: skip


def seeds_content(folder: str | Path) -> dict[str, Any]:
    """What a summary over seeds says: its keys, `folder`, and `rho95`, the chance band for the heads that seeds share.

    Raises:
        LoraforgeError: seeds.json is missing or cannot be read.
    """
    place = Path(folder)
    _demand(place, (SEEDS,), "a summary over seeds", None)
    empty: dict[str, Any] = {"statistics": {}, "stability": {}}
    empty |= {key: [] for key in ("runs", "differences", "cross_task", "notes")}
    content = {**empty, **read_object(place / SEEDS), "folder": str(place)}
    groups = [found for by_task in content["stability"].values() for found in by_task.values()]
    counts = [int(entry.get("n") or 0) for found in groups for entry in found.values()]
    return content | {"rho95": rho_band(max(counts, default=0))}


def _demand(folder: Path, names: Sequence[str], what: str, hint: str | None) -> None:
    """Refuses a folder that lacks files, naming all of them."""
    if not folder.is_dir():
        raise LoraforgeError(f"there is no such folder of {what}", where=folder, expected=", ".join(names), hint=hint)
    gone = [name for name in names if not (folder / name).is_file()]
    raise_problems([LoraforgeError(f"a file of {what} is missing", where=folder / name, hint=hint) for name in gone])


def _rows(path: Path) -> list[dict[str, Any]]:
    """heads.csv as a row a head with None where nothing was measured; columns that no head has are left out."""
    heads = read_heads(path)
    names = [name for name in heads.columns if heads.has(name)]
    return [
        {"layer": key.layer, "head": key.head, "stack": key.stack, "kind": key.kind}
        | {name: _known(float(heads.columns[name][i])) for name in names}
        for i, key in enumerate(heads.keys)
    ]  # fmt: skip


def _table(path: Path) -> list[dict[str, Any]]:
    """A table of heads with any columns: numbers, None for nan."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(name: str, text: str | None) -> Any:
    if name in _TEXT:
        return text
    try:
        return int(text or "") if name in _WHOLE else _known(float(text or "nan"))
    except ValueError:
        return text


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _from_table(
    name: str, joined: list[dict[str, Any]], stats: Mapping[str, Any], cases: Mapping[str, Any]
) -> dict[str, Any]:
    """One run of a comparison as its table of all runs has it."""
    place = ("layer", "head", "stack", "kind")
    rows = [
        {key: row.get(key) for key in place}
        | {column: row[f"{column}_{name}"] for column in (*DOCUMENT, *EXTRA) if f"{column}_{name}" in row}
        for row in joined
    ]
    rows = [row for row in rows if row.get("I_pre") is not None or row.get("U") is not None]
    empty: dict[str, Any] = {
        "spectrum": [],
        "spectrum_heads": [],
        "path": None,
        "importance": {},
        "hashes": {},
        "config": {},
        "missing": {},
    }
    return {"name": name, "method": name, "task": None, "seed": None, "rank": None, "heads": rows, **empty,
            **fill_numbers(rows, stats, cases)}  # fmt: skip


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, or none where it is not there."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise LoraforgeError("a line of the measurement cannot be read", where=path, got=error) from error


def _path(folder: Path) -> dict[str, Any] | None:
    """The way through training with its line a head, where it was measured."""
    found = read_object(folder / PATH)
    return found | {"lines": _json_lines(folder / PATH_HEADS)} if found else None


def _placed(lines: list[dict[str, Any]], layout: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines of modules with the layer and the part (q, k, v, o, or the module's last word) that they belong to."""
    known: dict[str, tuple[int, str]] = {}
    for attention in HeadLayout.from_json(layout).attentions if layout else ():
        for part in PARTS:
            projection = attention.part(part)
            if projection is not None:
                mark = (
                    ""
                    if (attention.stack, attention.kind) == ("enc", "self")
                    else f" ({attention.stack} {attention.kind})"
                )
                known.setdefault(projection.module, (attention.layer, part + mark))
    found = []
    for line in lines:
        name = str(line.get("module"))
        guess = locate(name)
        numbers = re.findall(r"\.(\d+)\.", f".{name}.")
        other = (int(numbers[0]) if numbers else None, name.rsplit(".", 1)[-1])
        layer, part = known.get(name) or ((guess.layer, guess.part) if guess else other)
        found.append(line | {"layer": layer, "part": part})
    return found


def _settings(path: Path) -> dict[str, Any]:
    """The settings that lie beside a measurement."""
    return read_object(path.with_name(f"{path.stem}.meta.json"))


def _hashes(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every digest of a record, at any depth."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _hashes(value, f"{prefix}{key}.")
        elif str(key).endswith("sha256") and isinstance(value, str):
            found[f"{prefix}{key}"] = value
    return found


def _missing(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """What was not measured; a column of heads.csv stands for its file."""
    have = set(rows[0]) if rows else set()
    there = {IMPORTANCE["post"]: "I_post" in have, FISHER: "G" in have}
    found = {name: told for name, told in _OPTIONAL.items() if not there.get(name, (folder / name).is_file())}
    if not (folder / CONFIG).is_file():
        found[CONFIG] = "Nothing says how the run was made: there is no run_config.json."
    return found

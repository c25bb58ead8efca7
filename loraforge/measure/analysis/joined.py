"""One table of all that was measured of a run's heads, from its files of lines or from heads.csv. Torch-free."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.files import FISHER, HEADS, IMPORTANCE, UPDATE, key_of, read_lines
from loraforge.measure.heads.layout import KINDS, STACKS, HeadKey

# The document's columns, in its order, and ours behind them.
DOCUMENT = ("I_pre", "I_post", "U", "Urel", "G", "F", "Ppred", "Uq", "Uk", "Uv", "Uo")
EXTRA = (
    "I_pre_se", "I_pre_lo", "I_pre_hi", "I_post_se", "I_post_lo", "I_post_hi", "S", "M", "Urel_l2",
    "nq", "nk", "nv", "no", "OV", "QK", "kv_head",
)  # fmt: skip
# Column -> key of the line, by file.
_IMPORTANCE = {"": "I", "_se": "se", "_lo": "ci_lo", "_hi": "ci_hi"}
_SOURCES: dict[str, dict[str, str]] = {
    IMPORTANCE["pre"]: {f"I_pre{end}": key for end, key in _IMPORTANCE.items()},
    IMPORTANCE["post"]: {f"I_post{end}": key for end, key in _IMPORTANCE.items()},
    FISHER: {name: name for name in ("G", "F", "Ppred", "S", "M")},
    UPDATE: {
        name: name
        for name in ("U", "Urel", "Uq", "Uk", "Uv", "Uo", "Urel_l2", "nq", "nk", "nv", "no", "OV", "QK", "kv_head")
    },
}
_REQUIRED = (IMPORTANCE["pre"], UPDATE)
_WHOLE = {"kv_head"}


@dataclass(frozen=True)
class Heads:
    """What was measured of each head.

    Attributes:
        keys: (n,) heads, encoder before decoder, layer by layer, self before cross: of equal values the first wins.
        columns: Name of `DOCUMENT` and `EXTRA` -> (n,) float64; NaN where nothing was measured.
        notes: What the files lack.
    """

    keys: tuple[HeadKey, ...]
    columns: Mapping[str, NDArray[np.float64]]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """How many heads."""
        return len(self.keys)

    def has(self, name: str) -> bool:
        """Whether any head has a value of a column."""
        return bool(np.isfinite(self.columns[name]).any())

    @property
    def layers(self) -> list[tuple[str, str, int]]:
        """(n,) the attention of each head."""
        return [(key.stack, key.kind, key.layer) for key in self.keys]

    @property
    def groups(self) -> list[tuple[str, str]]:
        """The stacks and kinds there are, in order."""
        return list(dict.fromkeys((key.stack, key.kind) for key in self.keys))

    def only(self, places: Sequence[int]) -> Heads:
        """The heads at these positions."""
        chosen = list(places)
        return Heads(tuple(self.keys[i] for i in chosen), {k: v[chosen] for k, v in self.columns.items()})


def join_heads(folder: Path) -> Heads:
    """The table of a run's folder: all heads of importance_pre.jsonl with what the other files say of them.

    A folder without those files and with heads.csv alone is read from that.

    Raises:
        LoraforgeError: importance_pre.jsonl or update.jsonl is missing or cannot be read.
    """
    if not any((folder / name).is_file() for name in _REQUIRED) and (folder / HEADS).is_file():
        return read_heads(folder / HEADS)
    lines: dict[str, list[dict[str, Any]]] = {}
    problems: list[LoraforgeError] = []
    for name in _SOURCES:
        if name in _REQUIRED or (folder / name).is_file():
            try:
                lines[name] = read_lines(folder / name)
            except LoraforgeError as error:
                problems.append(error)
    raise_problems(problems)
    notes = [f"{name} is missing: its columns are empty" for name in _SOURCES if name not in lines]
    named = {line["stack"] for found in lines.values() for line in found if line.get("stack")}
    # A file without stacks, as the document's, speaks of the one stack that the others name.
    stack = str(named.pop()) if len(named) == 1 else "enc"
    keys = sorted((key_of(line, stack) for line in lines[IMPORTANCE["pre"]]), key=_place)
    columns = {name: np.full(len(keys), np.nan) for name in (*DOCUMENT, *EXTRA)}
    for file, found in lines.items():
        at = {key_of(line, stack): line for line in found}
        missing = sum(key not in at for key in keys)
        other = len(at) - (len(keys) - missing)
        if missing:
            notes.append(f"{file} lacks {missing} of {len(keys)} heads")
        if other:
            notes.append(f"{file} has {other} heads that {IMPORTANCE['pre']} lacks: left out")
        for column, name in _SOURCES[file].items():
            columns[column] = np.array([_number(at.get(key, {}).get(name), folder / file, name) for key in keys])
    return Heads(tuple(keys), columns, notes)


def read_heads(path: Path) -> Heads:
    """The table of a heads.csv, ours or the document's.

    Raises:
        LoraforgeError: Not there, or without layer, head, I_pre and U.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        found = {key_of({**row, "layer": int(row["layer"]), "head": int(row["head"])}): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a table with the columns layer, head, I_pre, I_post, U, Urel, ..."
        raise LoraforgeError("the table of heads cannot be read", where=path, got=error, expected=expected) from error
    keys = sorted(found, key=_place)
    columns = {
        name: np.array([_number(found[key].get(name), path, name) for key in keys], dtype=float)
        for name in (*DOCUMENT, *EXTRA)
    }
    return Heads(tuple(keys), columns)


def csv_text(heads: Heads, *, document: bool = False) -> str:
    """heads.csv: the document's 13 columns, then ours; floats as `repr` writes them, `nan` where there is none.

    Args:
        heads: The table.
        document: The 13 columns alone.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "head", *DOCUMENT, *(() if document else ("stack", "kind", *EXTRA))])
    for i, key in enumerate(heads.keys):
        row = [key.layer, key.head, *(cell(heads, name, i) for name in DOCUMENT)]
        if not document:
            row += [key.stack, key.kind, *(cell(heads, name, i) for name in EXTRA)]
        writer.writerow(row)
    return out.getvalue()


def cell(heads: Heads, name: str, i: int) -> str:
    """A value as heads.csv has it."""
    value = float(heads.columns[name][i])
    if not math.isfinite(value):
        return "nan"
    return str(int(value)) if name in _WHOLE else repr(value)


def _place(key: HeadKey) -> tuple[int, int, int, int]:
    """Where a head stands in the layout's order; unknown names of stacks and kinds come last."""
    stack = STACKS.index(key.stack) if key.stack in STACKS else len(STACKS)
    return stack, key.layer, KINDS.index(key.kind) if key.kind in KINDS else len(KINDS), key.head


def _number(value: Any, where: Path, name: str) -> float:
    """A value of a line; what is missing or not finite is NaN."""
    try:
        number = math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError) as error:
        raise LoraforgeError("a value is no number", where=f"{where}, {name}", got=repr(value)) from error
    return number if math.isfinite(number) else math.nan

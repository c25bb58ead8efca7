"""Files with private key names, read through a key map that the user gives.

A key map is a JSON object, `key_map.json` beside the file of tensors or given to `open_adapter`: module name -> where
its factors are,

    {"blocks.0.attn.q": {"A": "w_a_000", "B": "w_b_000", "alpha": 4}, ...}

with A (r, n) and B (m, r) as in PEFT; alpha may be left out and is r then, which is scale 1. Sam_LoRA files need this:
their w_a_000, w_b_000 are the query and value slices (even and odd numbers) of the fused qkv of each block, at scale 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.adapters.formats.parts import Contents, lora_part
from loraforge.adapters.keys import is_safe_name
from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile

KEY_MAP_NAME = "key_map.json"


def read_key_map(path: Path) -> dict[str, Any]:
    """The key map in a file.

    Raises:
        LoraforgeError: It cannot be read or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LoraforgeError("The key map cannot be read", where=path, got=error, expected="a JSON object") from error
    if not isinstance(found, dict):
        raise LoraforgeError("The key map is not a JSON object", where=path, got=type(found).__name__)
    return found


def read_mapped(file: TensorFile, key_map: Mapping[str, Any]) -> Contents:
    """Reads the modules that a key map names.

    Args:
        file: The file of tensors.
        key_map: Module name -> {"A": key, "B": key, "alpha": number (optional)}.

    Returns:
        The modules, with every wrong entry in `problems` and keys that the map leaves out in `unknown`.
    """
    contents = Contents("keymap")
    used: set[str] = set()
    for name, entry in key_map.items():
        wrong = _problem(name, entry, file)
        if wrong is not None:
            contents.problems.append(LoraforgeError(wrong, where=f"key map: {name!r}", got=json.dumps(entry)[:200]))
            continue
        slots = {"A": entry["A"], "B": entry["B"]}
        used.update(slots.values())
        alpha = entry.get("alpha")
        try:
            contents.parts[name] = lora_part(name, slots, file, lambda r, a=alpha: a / r if a else 1.0, False)  # type: ignore[misc]
        except LoraforgeError as problem:
            contents.problems.append(problem)
    contents.unknown = sorted(file.shapes.keys() - used)
    return contents


def _problem(name: str, entry: Any, file: TensorFile) -> str | None:
    """What is wrong with an entry, or None."""
    if not is_safe_name(name):
        return "A key map names a module that is no dotted module name"
    if not isinstance(entry, dict) or not {"A", "B"} <= entry.keys() <= {"A", "B", "alpha"}:
        return 'An entry of the key map is not {"A": key, "B": key, "alpha": number or left out}'
    if any(not isinstance(entry[side], str) or entry[side] not in file.shapes for side in "AB"):
        return "An entry of the key map names a key that the file does not have"
    alpha = entry.get("alpha")
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha)
    ):
        return "The alpha of an entry of the key map is no finite number"
    return None

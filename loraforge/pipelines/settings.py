"""`--set` on a recipe with a pipeline: dotted keys over what it says. Torch-free."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.errors import UsageError, did_you_mean
from loraforge.pipelines import heads_recipe
from loraforge.recipe_keys import OPTIONS
from loraforge.recipes import read_entry
from loraforge.storage.yaml_file import read_value
from loraforge.tasks.spec import KEYS as TASK_KEYS

SECTIONS = ("lora", "train", "eval", *heads_recipe.SECTIONS)
# Of a recipe's keys, those that are no single value.
_STRUCTURES = ("pipeline", "params", "tasks", "adapters", "calibration")


def apply_settings(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with dotted keys set.

    Raises:
        UsageError: An unknown key, section or task (with the closest known one).
        LoraforgeError: A value of the wrong kind.
    """
    changed = copy.deepcopy(dict(recipe))
    pipeline = changed["pipeline"]
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        if head == "rows" and not rest:
            for task in pipeline.get("tasks") or ():
                task["rows"] = value
        elif head in ("how", "seeds") and not rest:
            pipeline[head] = value
        elif head in SECTIONS and rest:
            pipeline[head] = {**(pipeline.get(head) or {}), rest: value}
        elif head == "tasks" and rest:
            _set_task(pipeline.get("tasks") or (), rest, value, key)
        elif head == "params" and rest:
            changed["params"] = {**changed.get("params", {}), **read_entry({"params": {rest: value}}, key)["params"]}
        elif head in OPTIONS and not rest and head not in _STRUCTURES:
            changed |= read_entry({head: value}, "--set")
            if head == "seed" and pipeline.get("seeds") and "seeds" not in settings:
                pipeline["seeds"] = [changed["seed"]]
        else:
            known = [*OPTIONS, "rows", "how", "seeds", *(f"{s}.NAME" for s in (*SECTIONS, "params")), "tasks.ID.KEY"]
            raise UsageError(f"unknown key '{key}' of a recipe", where="--set", hint=did_you_mean(key, known))
    return changed


def as_typed(value: Any) -> str:
    """A value as one types it behind `--set KEY=`."""
    return value if isinstance(value, str) and read_value(value) == value else json.dumps(value)


def _set_task(tasks: Sequence[dict[str, Any]], rest: str, value: Any, key: str) -> None:
    """Sets `ID.KEY` of a task; an id may hold dots, a key does not."""
    name, _, field = rest.rpartition(".")
    names = [str(task.get("id")) for task in tasks]
    if name not in names:
        raise UsageError(f"no task '{name}' in the recipe", where=key, hint=did_you_mean(name, names))
    if field not in TASK_KEYS:
        raise UsageError(f"unknown key '{field}' of a task", where=key, hint=did_you_mean(field, TASK_KEYS))
    tasks[names.index(name)][field] = value

"""Recipes: everything that the merge command can be told, as a YAML file, and the presets that come with loraforge.

Two spellings are read into one plain dict: loraforge's own, and the IterIS documents' configuration files with one
section a `task_type` and a global `seed`. Its keys are the arguments of `loraforge.merge`, `out`, `tasks`, what a
preset says about its adapters, and `pipeline`: how `loraforge run` trains and measures them. A method's parameters may
stand at the top level or under `params`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.recipe_keys import OPTIONS, PARAMS, Reader, free
from loraforge.storage.yaml_file import read_yaml

PRESETS = Path(__file__).with_name("presets")

# The document's words for what a recipe calls otherwise. `rank` and `lora_alpha` there describe the adapters.
_RENAMED: dict[str, str] = {
    "task_targets": "tasks",
    "model_name": "base",
    "manual_ceof": "weights",
    "rank": "adapter_rank",
    "lora_alpha": "adapter_alpha",
    "per_device_eval_batch_size": "eval_batch_size",
}
_SPOKEN = {"weights": "weights (manual_ceof)", "adapter_alpha": "lora_alpha"}
_MEMORY = ("use_fp16", "use_gradient_checkpointing", "sequential_layer_processing")
_SECTION_MARKS = {"task_targets", "model_name", "manual_ceof", "samples_num"}
# What a recipe says that is no argument of `loraforge.merge`.
_NOT_ARGUMENTS = (
    "name", "description", "paper", "notes", "tasks", "adapter_rank", "adapter_alpha", "eval_batch_size", "out",
    "report", "overwrite", "pipeline",
)  # fmt: skip


def preset_names() -> list[str]:
    """Names of the presets that come with loraforge, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_recipe(source: str | Path, section: str | None = None) -> dict[str, Any]:
    """Reads a recipe file or a preset.

    Args:
        source: A preset's name, or the path of a YAML file; `FILE.yaml#SECTION` names a section of a document's file.
        section: The section (the document's `task_type`), if the file has several.

    Returns:
        A plain dict: keys of OPTIONS, with the method's parameters under `params`. Paths stand as written.

    Raises:
        UsageError: Unknown preset, section or key (with the closest known word).
        LoraforgeError: Unreadable file, a value of the wrong kind, lists whose lengths disagree.
    """
    text, _, fragment = str(source).partition("#")
    path = Path(text)
    is_file = isinstance(source, Path) or path.suffix in (".yaml", ".yml") or "/" in text or path.is_file()
    if not is_file:
        if text not in preset_names():
            raise UsageError(f"unknown preset '{text}'", hint=did_you_mean(text, preset_names()))
        path = PRESETS / f"{text}.yaml"
    content = read_yaml(path, "recipe")
    sections = {
        k: v for k, v in content.items() if k not in OPTIONS and isinstance(v, dict) and _SECTION_MARKS & v.keys()
    }
    if not sections:
        if section or fragment:
            raise UsageError("the recipe has no sections", where=path, got=section or fragment)
        return {"name": path.stem, **_normalise(content, str(path))}
    return _from_document(content, sections, section or fragment or None, path)


def merge_recipe(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what was given beside it; a value of None means "not given".

    `params` are merged key by key, everything else is replaced. Adapters of one's own replace the preset's: what the
    preset says about its own adapters (rank, alpha, and its tasks and data if the number differs) is dropped with them,
    and equal weights are carried over to the new number.

    Raises:
        UsageError: Unknown key.
        LoraforgeError: A value of the wrong kind, or a number of weights that is not the number of adapters.
    """
    given = _normalise({k: v for k, v in overrides.items() if v is not None}, "the options given")
    merged = {k: v for k, v in recipe.items() if k not in given}
    if "adapters" in given:
        count = len(given["adapters"])
        old = len(recipe.get("tasks") or recipe.get("adapters") or given["adapters"])
        stale = {"adapter_rank", "adapter_alpha"} | ({"tasks", "calibration"} if old != count else set())
        merged = {k: v for k, v in merged.items() if k not in stale}
        weights = merged.get("weights")
        if weights and len(set(weights)) == 1:
            merged["weights"] = weights[:1] * count
    merged |= given
    if "params" in recipe or "params" in given:
        params = dict(recipe.get("params", {}))
        # --samples and --max-length are options of the command and parameters of the method under one meaning.
        for option, param in (("samples", "samples_num"), ("max_length", "max_length")):
            if option in given and param in params:
                params[param] = given[option]
        merged["params"] = params | given.get("params", {})
    _check_counts(merged, str(recipe.get("name", "the recipe")))
    return merged


def merge_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that `loraforge.merge` takes as keyword arguments."""
    return {key: value for key, value in recipe.items() if key not in _NOT_ARGUMENTS}


def read_entry(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A part of a recipe that stands elsewhere: values read by the kind of their key, parameters under `params`.

    Raises:
        UsageError: Unknown key.
        LoraforgeError: A value of the wrong kind.
    """
    return _normalise(entry, where)


def _from_document(
    content: dict[str, Any], sections: dict[str, Any], section: str | None, path: Path
) -> dict[str, Any]:
    """One section of a document's configuration file, in a recipe's words."""
    if section is None and len(sections) == 1:
        section = next(iter(sections))
    if section not in sections:
        what = "the file has several sections" if section is None else f"unknown section '{section}'"
        hint = f"name one as {path}#{next(iter(sections))}" if section is None else did_you_mean(section, sections)
        raise UsageError(what, where=path, got=", ".join(sections), hint=hint)
    body = {str(k): v for k, v in sections[section].items()}
    plus = any(key in body for key in ("use_mats", "use_camr", "use_dcs"))
    found: dict[str, Any] = {"method": "iteris-plus" if plus else "iteris"}
    notes = [
        f"{key} has no counterpart: Grams are accumulated in fp64 block by block" for key in _MEMORY if key in body
    ]
    for key, value in body.items():
        if key == "save":
            if value not in (0, 1):
                raise LoraforgeError("'save' is 0 or 1", where=f"{path}, {section}", got=value)
            found |= {"output_kind": "model"} if value else {}
        elif key in PARAMS:
            found.setdefault("params", {})[key] = value
        elif key not in _MEMORY:
            found[_RENAMED.get(key, key)] = value
    if notes:
        found["notes"] = notes
    shared = {k: v for k, v in content.items() if k not in sections}
    words = [*_RENAMED, *_MEMORY, "save"]
    return {"name": section, **_normalise({**shared, **found}, f"{path}, section {section}", words)}


def _normalise(content: Mapping[str, Any], where: str, also: list[str] | None = None) -> dict[str, Any]:
    """Values read by the kind of their key, parameters gathered under `params`; all problems at once."""
    problems: list[LoraforgeError] = []
    recipe: dict[str, Any] = {}
    params: dict[str, Any] = {}

    def read(key: str, value: Any, reader: Reader, into: dict[str, Any]) -> None:
        try:
            into[key] = None if value is None and into is params else reader(value)
        except ValueError as error:
            problems.append(LoraforgeError(f"'{key}' has a wrong value", where=where, got=repr(value), expected=error))

    for key, value in content.items():
        if key == "params":
            if not isinstance(value, Mapping):
                problems.append(LoraforgeError("'params' is a mapping", where=where, got=type(value).__name__))
                continue
            for name, entry in value.items():
                read(str(name), entry, PARAMS.get(str(name), free), params)
        elif key in OPTIONS:
            read(key, value, OPTIONS[key], recipe)
        elif key in PARAMS:
            read(key, value, PARAMS[key], params)
        else:
            hint = did_you_mean(key, [*OPTIONS, *PARAMS, *(also or [])])
            problems.append(UsageError(f"unknown key '{key}'", where=where, hint=hint))
    raise_problems(problems)
    if params or "params" in content:
        recipe["params"] = params
    _check_counts(recipe, where)
    return recipe


def _check_counts(recipe: Mapping[str, Any], where: str) -> None:
    """Lists that have one entry an adapter must agree in length."""
    owner = "adapters" if recipe.get("adapters") else "tasks"
    if not recipe.get(owner):
        return
    count = len(recipe[owner])
    problems = [
        LoraforgeError(
            f"'{_SPOKEN.get(key, key)}' has a wrong number of entries",
            where=where,
            got=f"{len(recipe[key])} for {count} {owner}",
            expected=f"{count}, one for each of {', '.join(recipe[owner])}",
        )
        for key in ("tasks", "weights", "adapter_alpha", "calibration")
        if recipe.get(key) is not None and len(recipe[key]) != count
    ]
    raise_problems(problems)

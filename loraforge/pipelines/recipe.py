"""What a recipe says about its pipeline: tasks, training, merges, evaluation; and `--set` on any of it. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.merging.methods import MethodRow, find_method
from loraforge.pipelines.heads_recipe import COMPARE, Comparison, read_comparison
from loraforge.pipelines.settings import SECTIONS, apply_settings, as_typed
from loraforge.recipes import load_recipe, merge_arguments, preset_names, read_entry
from loraforge.tasks.spec import TaskSpec, parse_task

TRAINS = ("lora", "full", COMPARE)
KEYS = ("how", *SECTIONS, "seeds", "tasks", "merges", "sources")
EVALUATION = ("metrics", "choice_mode", "split", "limit", "max_new_tokens", "batch_tokens", "dtype")
# Of a recipe's own merge, what its pipeline brings itself.
_OWN = ("adapters", "base", "calibration", "stats", "device")
_CALIBRATION = ("template", "target", "target_map", "label_field", "max_length")


@dataclass(frozen=True)
class Merge:
    """One merge of a pipeline.

    Attributes:
        name: What its row and its folder are called.
        row: The method.
        arguments: Further arguments of `loraforge.merge`.
    """

    name: str
    row: MethodRow
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A recipe's pipeline, checked.

    Attributes:
        name: Of the recipe.
        description: One line.
        base: Folder or id of the base.
        seed: Of training and merging.
        device: auto, cpu or cuda[:i].
        how: "lora": an adapter a task; "full": all weights; "compare": both, whose heads are measured and compared.
        tasks: The tasks; their relative paths are joined with the data folder.
        lora: LoRA options.
        train: Training arguments.
        evaluate: Options of the evaluation.
        merges: The merges, in order.
        calibration: Task to what a calibration source says besides its file.
        sources: Name or beginning of a source to what is known of it: {from, size, licence, note}.
        data: Folder that relative paths are counted from.
        words: What names it on the command line, behind `loraforge run`.
        comparison: Of "compare": seeds, both trainings, measurement.
    """

    name: str
    description: str
    base: str
    seed: int
    device: str
    how: str
    tasks: tuple[TaskSpec, ...]
    lora: Mapping[str, Any]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    merges: tuple[Merge, ...]
    calibration: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, Mapping[str, Any]]
    data: Path
    words: str
    comparison: Comparison | None = None


def pipeline_presets() -> list[str]:
    """Names of the presets that say how to train and measure."""
    return [name for name in preset_names() if "pipeline" in load_recipe(name)]


def open_pipeline(
    source: str | Path, *, data: str | Path | None = None, settings: Mapping[str, Any] | None = None
) -> Pipeline:
    """Reads a preset or a recipe file with a `pipeline` section.

    Args:
        source: Name of a preset, or path of a YAML file.
        data: Folder that relative paths are counted from; default the recipe's own folder, for presets the current one.
        settings: Dotted key to value, over what the recipe says: `base`, `train.max_steps`, `lora.r`, `eval.KEY`,
            `params.max_iter`, `tasks.ID.train`, `rows` (of every task), `how` ...

    Raises:
        UsageError: Unknown preset, key or method.
        LoraforgeError: A recipe without a pipeline, or a value that cannot be used; all problems at once.
    """
    recipe = load_recipe(source)
    if "pipeline" not in recipe:
        raise LoraforgeError(
            "the recipe says how to merge, but not how to train and measure",
            where=source,
            expected="a section 'pipeline' with tasks",
            hint=f"loraforge merge ... --preset or --recipe; presets with a pipeline: {', '.join(pipeline_presets())}",
        )
    recipe = apply_settings(recipe, settings or {})
    own = Path(str(source).partition("#")[0]).parent if str(source) not in preset_names() else Path()
    words = [str(source), *(() if data is None else ("--data", str(data)))]
    words += [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={as_typed(value)}")]
    return _parse(recipe, Path(data) if data is not None else own, str(source), shlex.join(words))


def _parse(recipe: Mapping[str, Any], data: Path, where: str, words: str) -> Pipeline:
    """The parts of a recipe, checked; all problems at once."""
    section: Mapping[str, Any] = recipe["pipeline"]
    problems: list[LoraforgeError] = [
        UsageError(f"unknown key '{key}' of a pipeline", where=where, hint=did_you_mean(key, KEYS))
        for key in section
        if key not in KEYS
    ]
    for key in (*SECTIONS, "sources"):
        if not isinstance(section.get(key) or {}, Mapping):
            problems.append(LoraforgeError(f"'{key}' of a pipeline is a mapping", where=where, got=repr(section[key])))
    problems += [
        UsageError(f"unknown option '{key}' of the evaluation", where=where, hint=did_you_mean(key, EVALUATION))
        for key in section.get("eval") or ()
        if key not in EVALUATION
    ]
    how = section.get("how", "lora")
    if how not in TRAINS:
        problems.append(
            UsageError("unknown kind of training", where=f"{where}: how", got=how, expected=", ".join(TRAINS))
        )
    if not recipe.get("base"):
        problems.append(LoraforgeError("the pipeline has no base model", where=where, hint="--base MODEL"))
    comparison = read_comparison(recipe, section, where, problems)
    tasks = _tasks(section.get("tasks"), recipe.get("tasks"), data, where, problems)
    merges = _merges(recipe, section.get("merges") or [], len(tasks), where, problems)
    shared = {task.id for task in tasks} & {merge.name for merge in merges}
    if shared:
        got = ", ".join(sorted(shared))
        problems.append(LoraforgeError("a task and a merge have one name", where=where, got=got, hint="rename one"))
    raise_problems(problems)
    return Pipeline(
        name=str(recipe.get("name", where)),
        description=str(recipe.get("description", "")),
        base=str(recipe["base"]),
        seed=int(recipe.get("seed", 0)),
        device=str(recipe.get("device", "auto")),
        how=how,
        tasks=tasks,
        merges=merges,
        calibration={task.id: _calibration(recipe.get("calibration"), i, task) for i, task in enumerate(tasks)},
        data=data,
        words=words,
        comparison=comparison,
        **{name: dict(section.get(key) or {}) for name, key in
           (("lora", "lora"), ("train", "train"), ("evaluate", "eval"), ("sources", "sources"))},
    )  # fmt: skip


def _tasks(
    entries: Any, names: Sequence[str] | None, data: Path, where: str, problems: list[LoraforgeError]
) -> tuple[TaskSpec, ...]:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        problems.append(
            LoraforgeError(
                "the pipeline has no tasks", where=f"{where}: tasks", expected="a list of {id: ..., train: ...}"
            )
        )
        return ()
    tasks = []
    for i, entry in enumerate(entries, 1):
        try:
            tasks.append(parse_task(entry, f"{where}, task {i}", data))
        except LoraforgeError as problem:
            problems.append(problem)
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        problems.append(LoraforgeError("two tasks have one id", where=where, got=", ".join(ids)))
    if names and len(ids) == len(entries) and list(names) != ids:
        got = f"{', '.join(ids)} in the pipeline, {', '.join(names)} in the merge"
        problems.append(LoraforgeError("the tasks of a recipe do not agree", where=where, got=got))
    return tuple(tasks)


def _merges(
    recipe: Mapping[str, Any], entries: Any, count: int, where: str, problems: list[LoraforgeError]
) -> tuple[Merge, ...]:
    """The recipe's own merge, then the further ones; one without a method changes the recipe's own."""
    own = {key: value for key, value in merge_arguments(recipe).items() if key not in _OWN}
    wanted = [own] if own.get("method") else []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        problems.append(LoraforgeError("'merges' of a pipeline is a list of mappings", where=where))
        entries = []
    for i, entry in enumerate(entries, 1):
        try:
            read = read_entry(entry, f"{where}, merge {i}")
        except LoraforgeError as problem:
            problems.append(problem)
            continue
        if "method" not in read:
            params = {**own.get("params", {}), **read.get("params", {})}
            read = {**own, **read, **({"params": params} if params else {})}
        wanted.append({"seed": recipe["seed"], **read} if "seed" in recipe else read)
    merges = []
    for content in wanted:
        try:
            row = find_method(str(content.get("method")))
            row.make_params(content.get("params"))
            _check_merge(row, content, count, where)
        except LoraforgeError as problem:
            problems.append(problem)
            continue
        arguments = {
            key: value for key, value in content.items() if key not in (*_OWN, "name", "method", "description")
        }
        merges.append(Merge(str(content.get("name", row.name)), row, arguments))
    names = [merge.name for merge in merges]
    if len(set(names)) < len(names):
        got, hint = ", ".join(names), "give each a name of its own"
        problems.append(LoraforgeError("two merges have one name", where=where, got=got, hint=hint))
    return tuple(merges)


def _check_merge(row: MethodRow, content: Mapping[str, Any], count: int, where: str) -> None:
    """Refuses before the training what the merge would refuse after it.

    Raises:
        LoraforgeError: Another number of adapters or weights than it takes, calibration for a method without.
    """
    least, most = row.counts
    if count and not least <= count <= (most or count):
        got, expected = f"{count} tasks", f"{least}" if most == least else f"{least} to {most or 'any number'}"
        what = f"method '{row.name}' takes another number of adapters"
        raise LoraforgeError(what, where=where, got=got, expected=expected)
    if content.get("weights") and len(content["weights"]) != count:
        got, expected = f"{len(content['weights'])} weights", f"{count}, one a task"
        raise LoraforgeError(f"wrong number of weights for '{row.name}'", where=where, got=got, expected=expected)
    idle = [key for key in ("samples", "max_length", "template") if content.get(key) and row.needs != "calibration"]
    if idle:
        raise LoraforgeError(f"method '{row.name}' uses no calibration data", where=where, got=", ".join(idle))


def _calibration(given: Any, index: int, task: TaskSpec) -> dict[str, Any]:
    """What a calibration source says besides its file: the recipe's own fields, else the task's."""
    if isinstance(given, Mapping):
        entry = given.get(task.id)
    else:
        entry = given[index] if isinstance(given, list) and index < len(given) else None
    if entry is not None:
        return {k: v for k, v in entry.items() if k in _CALIBRATION} if isinstance(entry, Mapping) else {}
    fields = {"target": task.target, "target_map": task.target_map, "label_field": task.label}
    found = {key: value for key, value in fields.items() if value is not None}
    if task.text is None:
        return found
    return found | {"template": task.text if "{" in task.text else f"{{{task.text}}}"}

"""The tasks that a command's options name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, raise_problems
from loraforge.tasks.spec import TaskSpec, parse_task

_YAML = (".yaml", ".yml")


def read_tasks(
    entries: Sequence[str], file: str | None, *, split: str, fields: Mapping[str, Any] | None = None
) -> list[TaskSpec]:
    """The tasks of --task and --tasks, in this order.

    Args:
        entries: `NAME=FILE` with rows of the split, or `[NAME=]TASK.yaml`.
        file: A YAML file with a list of tasks, alone or under `tasks` (as a training sequence has).
        split: What the files of rows are.
        fields: Keys of a task that hold for every file of rows, as {"label": "gold"}.

    Raises:
        UsageError: An entry without a name; no task at all.
        LoraforgeError: A file that is no task; all problems at once.
    """
    found: list[TaskSpec] = []
    problems: list[LoraforgeError] = []
    for entry in entries:
        try:
            found.append(_task(entry, split, fields or {}))
        except LoraforgeError as problem:
            problems.append(problem)
    if file is not None:
        found += _tasks_of(Path(file), problems)
    raise_problems(problems)
    if not found:
        raise UsageError("no task was named", expected="--task NAME=FILE, --task TASK.yaml or --tasks FILE.yaml")
    return found


def _task(entry: str, split: str, fields: Mapping[str, Any]) -> TaskSpec:
    name, equals, place = entry.partition("=")
    if not equals:
        name, place = "", entry
    if Path(place).suffix in _YAML:
        content = _read(Path(place))
        if fields:
            given = ", ".join(f"--{key.replace('_', '-')}" for key in fields)
            raise UsageError("a task's own file says what these options would", where=place, got=given)
        return parse_task({**content, **({"id": name} if name else {})}, place, Path(place).parent)
    if not equals:
        raise UsageError("a file of rows needs a name for its task", got=entry, expected=f"--task NAME={entry}")
    return parse_task({"id": name, split: place, **fields}, f"--task {name}")


def _tasks_of(path: Path, problems: list[LoraforgeError]) -> list[TaskSpec]:
    entries = _read(path).get("tasks")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise LoraforgeError("the file has no list of tasks", where=path, expected="tasks: [{id: ..., test: ...}, ...]")
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(parse_task(entry, f"{path}, task {number}", path.parent))
        except LoraforgeError as problem:
            problems.append(problem)
    return found


def _read(path: Path) -> dict[str, Any]:
    from loraforge.storage.yaml_file import read_yaml

    return read_yaml(path, "task file")


def read_pairs(entries: Sequence[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE entries of a repeated option.

    Raises:
        UsageError: One without '=', or a name twice.
    """
    found: dict[str, str] = {}
    for entry in entries or ():
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} takes NAME=VALUE", got=entry)
        if name in found:
            raise UsageError(f"{option} names '{name}' twice", got=entry)
        found[name] = value
    return found


def read_places(entries: Sequence[str] | None, option: str) -> list[str] | dict[str, str]:
    """Folders of a repeated option, all as FOLDER or all as NAME=FOLDER.

    Raises:
        UsageError: Some with a name and some without.
    """
    named = [entry for entry in entries or () if "=" in entry and not Path(entry).exists()]
    if not named:
        return list(entries or ())
    if len(named) < len(entries or ()):
        raise UsageError(f"{option} takes a name for all or for none", got=", ".join(entries or ()))
    return read_pairs(named, option)

"""A task out of a YAML or JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraforge.errors import LoraforgeError
from loraforge.tasks.spec import TaskSpec, parse_task


def read_task(path: str | Path) -> TaskSpec:
    """The task of a file; relative paths in it count from its folder.

    Raises:
        LoraforgeError: It cannot be read, or is no task; all problems at once.
    """
    import yaml

    path = Path(path)
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        got = str(error).split("\n")[0]
        raise LoraforgeError("the task file cannot be read", where=path, got=got, expected="YAML or JSON") from error
    if not isinstance(entry, Mapping):
        raise LoraforgeError("the task file is no mapping", where=path, got=type(entry).__name__, expected="id: NAME")
    return parse_task(entry, path, path.parent)

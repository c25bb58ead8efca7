"""A task out of a YAML or JSON file."""

from __future__ import annotations

from pathlib import Path

from loraforge.storage.yaml_file import read_yaml
from loraforge.tasks.spec import TaskSpec, parse_task


def read_task(path: str | Path) -> TaskSpec:
    """The task of a file; relative paths in it count from its folder.

    Raises:
        LoraforgeError: It cannot be read, or is no task; all problems at once.
    """
    path = Path(path)
    entry = read_yaml(path, "task file")
    return parse_task(entry, path, path.parent)

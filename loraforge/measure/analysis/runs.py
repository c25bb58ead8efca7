"""Which method, task and seed a run is of: from its run_config.json, else from the names of its folders. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.files import CONFIG, FINAL

_FULL = {"fft", "full", "train-full", "full-finetuning"}
# OUT/LoRA/TASK/seedS_rR, as the document lays its runs.
_FOLDER = re.compile(r"seed(?P<seed>\d+)(?:_r(?P<rank>\d+))?")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: Where its files are.
        method: `FFT`, `LoRA` or what the record says.
        task: Name of the task; None if nobody says.
        seed: Of the training; None if nobody says.
        rank: Of the adapter; None for full fine-tuning.
        config: Content of run_config.json; empty without one.
    """

    folder: Path
    method: str
    task: str | None
    seed: int | None
    rank: int | None
    config: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """FFT, LoRA-r8: the method as the document writes it."""
        return f"{self.method}-r{self.rank}" if self.rank is not None else self.method

    def digest(self, name: str) -> str | None:
        """A digest of the record, as `base_sha256`; None if it is not there."""
        value = self.config.get(name)
        return json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value


def open_run(folder: str | Path) -> Run:
    """What a folder says of its run.

    Raises:
        LoraforgeError: There is no such folder, or its record cannot be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise LoraforgeError("there is no such run", where=place, expected="the folder of a measured run")
    config = read_object(place / CONFIG)
    resolved = place.resolve()
    match = _FOLDER.fullmatch(resolved.name)
    words = match.groupdict() if match else {}
    method = config.get("method") or (resolved.parents[1].name if match and len(resolved.parents) > 1 else None)
    rank = _whole(_first(config, "rank", "r", "lora_r"), words.get("rank"))
    adapter = read_object(place / FINAL / "adapter_config.json")
    rank = _whole(rank, adapter.get("r"))
    if method is None:
        method = "FFT" if rank is None and config else "LoRA" if rank is not None else resolved.name
    full = str(method).lower() in _FULL
    task = config.get("task")
    if isinstance(task, Mapping):
        task = _first(task, "id", "name")
    return Run(
        place,
        "FFT" if full else "LoRA" if str(method).lower() == "lora" else str(method),
        str(task) if task else (resolved.parent.name if match else None),
        _whole(config.get("seed"), words.get("seed")),
        None if full else rank,
        config,
    )


def name_runs(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[str]:
    """One name a run: those given, else the methods' where they tell the runs apart, else the folders'.

    Raises:
        UsageError: Another number of names than of runs, or names that are not different.
    """
    if names is not None:
        if len(names) != len(runs) or len(set(names)) != len(names):
            raise UsageError("every run needs a name of its own", got=", ".join(names), expected=f"{len(runs)} names")
        return list(names)
    for candidates in ([run.name for run in runs], [run.folder.resolve().name for run in runs]):
        if len(set(candidates)) == len(candidates):
            return candidates
    found = [str(run.folder) for run in runs]
    if len(set(found)) < len(found):
        raise UsageError("a run is named twice", got=", ".join(found), expected="different folders")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no file.

    Raises:
        LoraforgeError: It cannot be read or is no object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraforgeError("the file is no JSON", where=path, got=error) from error
    if not isinstance(found, dict):
        raise LoraforgeError("the file holds no object", where=path, got=type(found).__name__)
    return found


def _first(content: Mapping[str, Any], *names: str) -> Any:
    """The first of these that is there."""
    return next((content[name] for name in names if content.get(name) is not None), None)


def _whole(*values: Any) -> int | None:
    """The first that is a whole number or the digits of one."""
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.isdigit():
            return int(value)
    return None

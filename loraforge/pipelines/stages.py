"""Stages of a pipeline: each runs once, is recorded, and is skipped as long as nothing that it depends on has changed.

A stage's action writes its output whole or not at all; the record beside it is written before ("started") and after
("done"). So a run that is killed at any time leaves finished stages with their records, and at most one that was
started: the same command goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.report.page import whole_file
from loraforge.storage.leftovers import hold

Progress = Callable[[str, str, int, int], None]
RECORDS = "stages"
DONE, STARTED, CHANGED, NEW = "done", "started", "changed", "new"


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: GROUP or GROUP:ITEM, as `train:mnli`.
        output: File or folder that it writes.
        inputs: Everything that decides what it writes, JSON-ready; what other stages write is named by `after`.
        after: Names of the stages whose outputs it reads.
        action: Called with (resume, progress): writes the output, replacing an earlier one; returns facts about it.
            With `resume` an earlier call with equal inputs was interrupted.
    """

    name: str
    output: Path
    inputs: Mapping[str, Any]
    after: tuple[str, ...]
    action: Callable[[bool, Progress | None], Mapping[str, Any]]

    @property
    def group(self) -> str:
        """The part of the name that stages of one kind share."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Status:
    """Where a stage stands before a run.

    Attributes:
        stage: The stage.
        fingerprint: Of its inputs and of those of all stages before it.
        state: "done", "started" (an equal run was interrupted), "changed" (done with other inputs) or "new".
        record: What was recorded of it; empty where nothing was.
    """

    stage: Stage
    fingerprint: str
    state: str
    record: Mapping[str, Any]


def survey(stages: Sequence[Stage], folder: Path) -> list[Status]:
    """The state of every stage by the records in a run's folder."""
    prints: dict[str, str] = {}
    found = []
    for stage in stages:
        content = {"inputs": stage.inputs, "after": [prints[name] for name in stage.after]}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        prints[stage.name] = hashlib.sha256(text.encode()).hexdigest()
        record = _read_record(_record_path(folder, stage))
        found.append(Status(stage, prints[stage.name], _state(stage, record, prints[stage.name]), record))
    return found


def choose(
    statuses: Sequence[Status], *, start: str | None = None, only: str | None = None, overwrite: bool = False
) -> list[Status]:
    """The stages that a run has to do, in order.

    Args:
        statuses: The stages as surveyed.
        start: Name or group: these stages and all behind them are done anew.
        only: Name or group: these stages alone are done anew; what they read must be there.
        overwrite: Do stages anew that were done with other inputs.

    Raises:
        UsageError: An unknown stage, or both `start` and `only`.
        LoraforgeError: Results made with other inputs would be replaced, or `only` reads what is not there.
    """
    if start and only:
        raise UsageError("--from and --only exclude each other", expected="one of the two")
    named = [status for status in statuses if _named(status.stage, start or only)]
    if (start or only) and not named:
        names = dict.fromkeys([*(s.stage.group for s in statuses), *(s.stage.name for s in statuses)])
        raise UsageError(f"unknown stage '{start or only}'", hint=did_you_mean(str(start or only), names))
    if only:
        _check_ready(named, statuses)
        return [replace(status, state=NEW) for status in named]
    first = statuses.index(named[0]) if named else len(statuses)
    _check_changed([] if overwrite else statuses[:first])
    earlier = [status for status in statuses[:first] if status.state != DONE]
    return [*earlier, *(replace(status, state=NEW) for status in statuses[first:])]


def run_stages(todo: Sequence[Status], folder: Path, progress: Progress | None = None) -> None:
    """Runs stages in order, each with its record."""
    for status in todo:
        stage, path = status.stage, _record_path(folder, status.stage)
        record = {"stage": stage.name, "fingerprint": status.fingerprint, "inputs": stage.inputs}
        _write_record(path, record | {"state": STARTED})
        start = time.perf_counter()
        result = stage.action(status.state == STARTED, progress)
        seconds = time.perf_counter() - start
        _write_record(path, record | {"state": DONE, "seconds": seconds, "result": dict(result)})


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """The folder of a run, made if need be and locked against a second run; gone again if nothing came into it.

    Raises:
        LoraforgeError: It holds something else, another run works in it, or it cannot be written.
    """
    check_run_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = hold(folder)
    except BlockingIOError as error:
        raise LoraforgeError(
            "another run is at work in this folder", where=folder, hint="wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise LoraforgeError("the folder of the run cannot be made", where=folder, got=error.strerror) from error
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
        os.close(handle)


def check_run_folder(folder: Path) -> None:
    """Refuses a place for a run that holds something else.

    Raises:
        LoraforgeError: Naming it.
    """
    if not folder.exists() or (folder / RECORDS).is_dir():
        return
    if not folder.is_dir():
        raise LoraforgeError("the output is a file, not a folder", where=folder, hint="choose another --out")
    held = sorted(entry.name for entry in folder.iterdir())
    if held:
        raise LoraforgeError(
            "the output folder holds something else",
            where=folder,
            got=", ".join(held[:5]),
            expected="an earlier run of a pipeline, or an empty folder",
            hint="choose another --out",
        )


def _state(stage: Stage, record: Mapping[str, Any], fingerprint: str) -> str:
    """What a record says about a stage with this fingerprint."""
    if not record or (record.get("state") == DONE and not stage.output.exists()):
        return NEW
    if record.get("fingerprint") == fingerprint:
        return str(record["state"])
    return CHANGED if stage.output.exists() else NEW


def _named(stage: Stage, name: str | None) -> bool:
    return name in (stage.name, stage.group)


def _check_ready(named: Sequence[Status], statuses: Sequence[Status]) -> None:
    """Refuses stages that read what is not there."""
    by_name = {status.stage.name: status for status in statuses}
    own = {status.stage.name for status in named}
    missing = {name for s in named for name in s.stage.after if name not in own and by_name[name].state != DONE}
    if missing:
        raise LoraforgeError(
            "a stage reads what is not there",
            where=named[0].stage.name,
            got=", ".join(f"{name}: {by_name[name].state}" for name in by_name if name in missing),
            expected="done, with the settings of this run",
            hint="leave --only out",
        )


def _check_changed(statuses: Sequence[Status]) -> None:
    """Refuses to replace results that were made with other inputs; stages that differ alike are told together."""
    differences: dict[str, list[Stage]] = {}
    for status in statuses:
        if status.state == CHANGED:
            told = _difference(status.record.get("inputs") or {}, status.stage.inputs)
            differences.setdefault(told, []).append(status.stage)
    # What only follows from an earlier stage is not told for itself.
    differences.pop("", None)
    raise_problems(
        [
            LoraforgeError(
                f"done with other inputs: {', '.join(stage.name for stage in stages)}",
                where=stages[0].output,
                got=difference,
                hint="--overwrite does this anew, with all that depends on it; or choose another --out",
            )
            for difference, stages in differences.items()
        ]
    )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, in words; empty if only an earlier stage differs."""
    before, now = _flat(old), _flat(json.loads(json.dumps(new)))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    shown = [f"{key} was {_brief(before.get(key))}, now {_brief(now.get(key))}" for key in keys[:5]]
    return "; ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted name: value}."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, entry in value.items() for k, v in _flat(entry, f"{name}.{key}" if name else key).items()}


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _record_path(folder: Path, stage: Stage) -> Path:
    return folder / RECORDS / f"{stage.name.replace(':', '-')}.json"


def _read_record(path: Path) -> dict[str, Any]:
    """A record; empty where there is none, or where a power loss tore it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with whole_file(path) as draft:
        draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

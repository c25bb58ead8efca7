"""Steps of a measurement: each is done once, its settings are recorded, and it is skipped while they are the same."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.files import CONFIG, log_of, write_json

DONE, SKIPPED, COPIED = "done", "skipped", "copied"
ANEW = "--overwrite does all of it anew; or choose another --out"
ALONE = "loraforge measure aggregate, then plot, redo these alone; or choose another --out"
# Setting that tells of which other steps' settings a step follows.
OF = "of"
# What only a step finds out, kept in run_config.json.
FACTS = ("theta0_sha256", "layout_sha256")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Of the step.
        outputs: Names of its files or folders below the run's folder; each appears whole, the last one last.
        settings: JSON-ready: everything that decides what they hold.
        action: Makes them; may take up a broken-off file of its own. Returns its facts, maybe among others.
        facts: Those of FACTS that it finds out.
        shared: Whether another run's files serve where the settings are equal.
    """

    name: str
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]
    action: Callable[[], Mapping[str, Any]]
    facts: tuple[str, ...] = ()
    shared: bool = False


class Record:
    """run_config.json while its steps are done; written whole after every change.

    Args:
        folder: Of the run.
        content: What it says beside facts and steps.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.path = folder / CONFIG
        old = read_config(folder)
        self.content = dict(content)
        self.steps: dict[str, Any] = dict(old.get("steps") or {})
        self.facts: dict[str, Any] = {name: old[name] for name in FACTS if name in old}

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, {**self.content, **self.facts, "steps": self.steps})

    def forget(self) -> None:
        """As if no step had been done."""
        self.steps, self.facts = {}, {}


def read_config(folder: Path) -> dict[str, Any]:
    """The run_config.json of a run; empty where there is none.

    Raises:
        LoraforgeError: It cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraforgeError("the record of the run is no JSON", where=path, got=str(error)) from error
    return found if isinstance(found, dict) else {}


def do_steps(
    steps: Sequence[Step],
    folder: Path,
    record: Record,
    *,
    overwrite: bool | Literal["changed"] = False,
    others: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Does the steps in order that are not done yet.

    Args:
        steps: The steps.
        folder: Of the run.
        record: Its run_config.json.
        overwrite: Forget what was done; "changed": what was done with other settings.
        others: Folders of other runs, whose files are taken where a step is `shared`.

    Returns:
        [{name, state ("done", "skipped" or "copied"), seconds}].

    Raises:
        LoraforgeError: Files that were made with other settings would be replaced, or a folder that no step made.
    """
    _check_folders(steps, folder, record)
    if overwrite is True:
        for step in steps:
            _remove(step, folder, parts=True)
        record.forget()
    elif not overwrite:
        _check_changed(steps, folder, record)
    found = []
    for step in steps:
        began = time.perf_counter()
        state = SKIPPED if _is_done(step, folder, record.steps, record.facts) else DONE
        if state == DONE:
            _remove(step, folder, parts=False)
            record.steps[step.name] = _plain(step.settings)
            record.steps = {s.name: record.steps[s.name] for s in steps if s.name in record.steps} | record.steps
            record.write()
            state = COPIED if step.shared and any(_copy(step, other, folder, record) for other in others) else DONE
        if state == DONE:
            told = step.action()
            record.facts |= {name: told[name] for name in step.facts}
        record.write()
        found.append({"name": step.name, "state": state, "seconds": time.perf_counter() - began})
    return found


def _is_done(step: Step, folder: Path, steps: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    whole = all((folder / name).exists() for name in step.outputs) and all(name in facts for name in step.facts)
    return whole and steps.get(step.name) == _plain(step.settings)


def _check_changed(steps: Sequence[Step], folder: Path, record: Record) -> None:
    """Refuses to replace what was made otherwise; steps that differ alike are told together."""
    differences: dict[str, list[Step]] = {}
    for step in steps:
        old, now = record.steps.get(step.name), _plain(step.settings)
        # What only follows from steps before it is made again with them.
        if _own(old) != _own(now) and any((folder / name).exists() for name in step.outputs):
            differences.setdefault(_difference(old, now), []).append(step)
    raise_problems(
        [
            LoraforgeError(
                f"done with other settings: {', '.join(step.name for step in changed)}", where=folder,
                got=difference, hint=ANEW if any(OF not in step.settings for step in changed) else ALONE,
            )
            for difference, changed in differences.items()
        ]
    )  # fmt: skip


def _check_folders(steps: Sequence[Step], folder: Path, record: Record) -> None:
    """Never removes a folder that this program did not make: it may hold the weights of a model."""
    raise_problems(
        [
            LoraforgeError(
                "a folder is there already that this measurement did not make", where=folder / name,
                expected="the folder of an earlier measurement, or none",
                hint="--base names it if it is what the training started from; or choose another --out",
            )
            for step in steps
            if step.name not in record.steps
            for name in step.outputs
            if (folder / name).is_dir()
        ]
    )  # fmt: skip


def _difference(old: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if old is None:
        return "files of another program or version"
    keys = [key for key in sorted({*old, *now} - {OF}) if old.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_brief(old.get(key))}, now {_brief(now.get(key))}" for key in keys)


def _own(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if settings is None else {key: value for key, value in settings.items() if key != OF}


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _copy(step: Step, other: Path, folder: Path, record: Record) -> bool:
    """Takes another run's files of a step, if they were made with these settings."""
    config = read_config(other)
    if other == folder or not _is_done(step, other, config.get("steps") or {}, config):
        return False
    for name in step.outputs:
        part = folder / f".{name}.copy"
        shutil.copyfile(other / name, part)
        part.replace(folder / name)
    record.facts |= {name: config[name] for name in step.facts}
    return True


def _remove(step: Step, folder: Path, *, parts: bool) -> None:
    """Takes away what a step wrote, with `parts` also what it left broken off."""
    for name in step.outputs:
        left = (folder / f".{name}.part", log_of(folder / name)) if parts else ()
        for path in (folder / name, *left):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _plain(value: Mapping[str, Any]) -> Any:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dict(value), sort_keys=True))

"""sequence.json: which tasks of a run are finished, and what the run depends on. Written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.provenance import digest_of
from loraforge.storage.leftovers import hold
from loraforge.training.ranks import is_first
from loraforge.training.sequence.depends import check_same
from loraforge.training.sequence.layout import SEQUENCE, STATE, read_json, task_folder, write_json

FORMAT = 1
# A task is waiting, being trained, trained but not scored yet, or done.
PENDING, TRAINING, TRAINED, DONE = "pending", "training", "trained", "done"
JOINT = "joint"


@dataclass(slots=True)
class RunState:
    """The state of a run, as sequence.json has it.

    Attributes:
        run: Folder of the run.
        content: The JSON object.
    """

    run: Path
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def depends(self) -> dict[str, Any]:
        """What the run depends on."""
        return dict(self.content["depends"])

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One entry a trained unit (a task; all of them at once for the method joint), in order."""
        return list(self.content["tasks"])

    def entry(self, task: str) -> dict[str, Any]:
        """The entry of one task."""
        found: dict[str, Any] = next(entry for entry in self.content["tasks"] if entry["id"] == task)
        return found

    def update(self, task: str, **values: Any) -> None:
        """Changes a task's entry; the first process writes the file.

        Raises:
            OSError: The disk refuses.
        """
        self.entry(task).update(values)
        if is_first():
            self.write()

    def write(self) -> None:
        """Writes sequence.json; for the owner alone where it holds rows that were given in memory.

        Raises:
            OSError: The disk refuses.
        """
        tasks = self.content.get("sequence", {}).get("tasks", [])
        write_json(self.run / SEQUENCE, self.content, private=any(isinstance(task["train"], list) for task in tasks))


def begin(run: Path, *, depends: Mapping[str, Any], units: Sequence[str], about: Mapping[str, Any]) -> RunState:
    """The state of a new run, or of the one that is continued.

    Args:
        run: Folder of the run.
        depends: Of `depends_on`.
        units: Ids of what is trained, in order.
        about: What else sequence.json records: the resolved sequence, versions.

    Raises:
        LoraforgeError: The run was begun with something else; a finished task's folder is gone.
        OSError: The disk refuses.
    """
    content = read_json(run / SEQUENCE)
    if content:
        _check_format(run, content)
        check_same(content["depends"], depends, run)
    known = {entry["id"]: entry for entry in content.get("tasks", [])}
    entries = [known.get(unit, {"id": unit, "state": PENDING}) for unit in units]
    _check_folders(run, entries)
    state = RunState(
        run,
        {
            "format": FORMAT,
            "config_hash": digest_of(depends),
            **about,
            "tasks": entries,
            "depends": dict(depends),
        },
    )
    # Versions are those that the run began with; a change is told by the caller.
    if content.get("versions"):
        state.content["versions"] = content["versions"]
    if state.content != content:
        state.write()
    return state


def read_state(run: Path) -> RunState:
    """The state of an existing run.

    Raises:
        LoraforgeError: The folder holds none.
    """
    content = read_json(run / SEQUENCE)
    if not content:
        got = ", ".join(sorted(path.name for path in run.iterdir())[:6]) if run.is_dir() else "no such folder"
        raise LoraforgeError(
            "the folder is no training sequence", where=run, got=got, expected=f"a run with {SEQUENCE}",
            hint="loraforge train-ilora SEQUENCE.yaml makes one",
        )  # fmt: skip
    _check_format(run, content)
    return RunState(run, content)


def _check_format(run: Path, content: Mapping[str, Any]) -> None:
    if content.get("format") != FORMAT or not isinstance(content.get("depends"), dict):
        got, expected = f"format {content.get('format')}", f"format {FORMAT}"
        raise LoraforgeError("the run was written by another release", where=run / SEQUENCE, got=got, expected=expected)


def _check_folders(run: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries:
        folder = task_folder(run, entry["id"])
        if entry["state"] in (TRAINED, DONE) and not (folder / STATE).is_file():
            raise LoraforgeError(
                "a finished task's files are gone",
                where=folder,
                got=f"no {STATE}; {SEQUENCE} says the task is {entry['state']}",
                hint="put the folder back, or start anew (--resume never --overwrite)",
            )


@contextmanager
def open_run(run: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder of a run, held so that no second run writes into it.

    Args:
        run: The folder; made as needed.
        resume: Continue what is there.
        overwrite: Without `resume`: remove an earlier run first.

    Raises:
        LoraforgeError: The folder holds something else, an earlier run while it may not be continued, or another
            process trains into it.
    """
    is_run = (run / SEQUENCE).is_file()
    if run.exists() and not run.is_dir():
        raise LoraforgeError("the output is a file, not a folder", where=run, expected="a folder name")
    if run.is_dir() and any(run.iterdir()) and not is_run:
        got = ", ".join(sorted(path.name for path in run.iterdir())[:5])
        raise LoraforgeError(
            "the output folder holds something else", where=run, got=got, expected="a new folder, or an earlier run",
            hint="choose another folder with --out",
        )  # fmt: skip
    if is_run and not resume and not overwrite:
        raise LoraforgeError(
            "the folder holds a run already", where=run, hint="--resume auto continues it, --overwrite replaces it"
        )
    run.mkdir(parents=True, exist_ok=True)
    try:
        handle = hold(run)
    except BlockingIOError as error:
        raise LoraforgeError(
            "another process trains into this folder", where=run, hint="wait for it, or choose another with --out"
        ) from error
    try:
        if is_run and not resume:
            for entry in run.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        yield
    finally:
        os.close(handle)

"""What a killed run left in its temporary folder: claimed, taken up or cleared."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError

# Inside of a temporary folder: what only a later run needs. Gone when the folder is published.
RESUME = ".resume"
_FINGERPRINT = "fingerprint.json"


def claim(temporary: Path, target: Path) -> int:
    """Makes the temporary folder (or takes one that nobody holds) and locks it until the returned handle is closed.

    Raises:
        LoraforgeError: Another run holds it.
        OSError: It cannot be made.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            temporary.mkdir()
        try:
            handle = hold(temporary)
        except FileNotFoundError:
            continue
        except BlockingIOError as error:
            raise _in_use(temporary, target) from error
        # The holder before may have published or removed the folder between opening and locking.
        if _same(handle, temporary):
            return handle
        os.close(handle)


def hold(folder: Path) -> int:
    """Opens and locks a folder; the system lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be opened, or is a link or a file.
    """
    # Not through a link: what it leads to would be emptied.
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    _lock(handle)
    return handle


def hold_file(path: Path, target: Path) -> int:
    """Opens a file for reading and appending, makes it if need be, and locks it until the returned handle is closed.

    Raises:
        LoraforgeError: Another run holds it.
        OSError: It cannot be opened, or is a link.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            _lock(handle)
        except BlockingIOError as error:
            raise _in_use(path, target) from error
        # The holder before may have finished and removed the file between opening and locking.
        if _same(handle, path):
            return handle
        os.close(handle)


def _lock(handle: int) -> None:
    """Locks an open file or folder; closes it where it cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # File systems without locks (some network ones): two runs into one output are then the user's to avoid.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(handle)
            raise


def _in_use(path: Path, target: Path) -> LoraforgeError:
    return LoraforgeError(
        "Another run is writing this output",
        where=target,
        got=f"{path} is in use",
        expected="one run at a time",
        hint="wait for it, or choose another folder",
    )


def _same(handle: int, path: Path) -> bool:
    """Whether what is open is what has this name now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)


def is_left_by(temporary: Path, target: Path, fingerprint: Mapping[str, Any] | None) -> bool:
    """Whether the temporary folder holds what an interrupted run with this fingerprint left.

    Raises:
        LoraforgeError: It was left by a run that would have written something else.
    """
    note = temporary / RESUME / _FINGERPRINT
    left = _read_fingerprint(note) if fingerprint is not None and note.is_file() else None
    if left is None:
        return False
    mine = json.loads(json.dumps(fingerprint))
    if left != mine:
        raise LoraforgeError(
            "The interrupted run cannot be resumed: it was another one",
            where=temporary,
            got=_difference(left, mine),
            expected="the same inputs and settings as when it was interrupted",
            hint=f"repeat that command, or run without resuming to write {target} anew",
        )
    return True


def clear(temporary: Path, fingerprint: Mapping[str, Any] | None) -> None:
    """Empties the temporary folder and puts the fingerprint into its folder RESUME, if there is one.

    Raises:
        OSError: The disk refuses.
    """
    for entry in temporary.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if fingerprint is None:
        return
    note = temporary / RESUME / _FINGERPRINT
    note.parent.mkdir()
    # Under its name only when whole: a torn one would look like another run's.
    part = note.with_suffix(".tmp")
    part.write_text(json.dumps(fingerprint, sort_keys=True), encoding="utf-8")
    part.rename(note)


def _read_fingerprint(note: Path) -> dict[str, Any] | None:
    """The fingerprint that was left, None where it is damaged (a power loss before it reached the disk)."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _difference(left: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, in words."""
    keys = [key for key in sorted({*left, *mine}) if left.get(key) != mine.get(key)]
    shown = [f"{key} was {_brief(left.get(key))}, now {_brief(mine.get(key))}" for key in keys[:5]]
    return "; ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."

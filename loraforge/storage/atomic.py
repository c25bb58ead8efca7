"""Folders and files that appear whole or not at all.

A new folder is filled beside its place under a temporary name, `.NAME.part`, flushed to disk and renamed. A replaced
folder stays untouched until the new one is whole; where the system can exchange two names in one step, there is no
moment without one.

The temporary folder is locked while a run fills it. What a killed run left there is removed by the next one, or taken
up by it: a run that names its fingerprint (what its result depends on) leaves it in the folder, and a run with the same
fingerprint that asks to resume gets the folder with what is in it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.storage.leftovers import RESUME, claim, clear, hold, is_left_by

MARKERS = ("adapter_config.json", "run.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(
    out: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    resume: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    keep: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the block ends well; any exception leaves no trace.

    Files that serve only a continuation belong into its folder RESUME, which is there where `fingerprint` is given.

    Args:
        out: The folder to make; parents are made as needed.
        overwrite: Replace an existing folder that an earlier run made (it holds one of MARKERS) or that is empty.
        resume: Take up what an interrupted run with this fingerprint left, and leave the folder if interrupted (by
            KeyboardInterrupt) again. With nothing to take up, the folder is empty.
        fingerprint: JSON-ready: everything that decides what the block writes. None: nothing can be taken up.
        keep: Asked after any failure whether what the folder holds is worth a continuation; where it is, the folder is
            left. For runs of hours, whose failure (a full disk) need not come again.

    Raises:
        LoraforgeError: `out` exists and may not be replaced, another run fills it, an interrupted run had another
            fingerprint, or the disk refuses (full, no permission).
    """
    target = Path(out).resolve()
    check_target(target, overwrite)
    made = _missing_parents(target)
    temporary = target.with_name(f".{target.name}.part")
    lock: int | None = None
    ours = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(temporary, target)
        left = resume and is_left_by(temporary, target, fingerprint)
        ours = True
        if not left:
            clear(temporary, fingerprint)
        yield temporary
        _publish(temporary, target, overwrite)
        # From here on the temporary name may be another run's.
        ours, made = False, []
    except OSError as error:
        raise _refusal(target, temporary, error) from error
    except KeyboardInterrupt:
        # Only an interrupted run is worth keeping: any other failure would come again.
        ours = ours and not (resume and fingerprint is not None)
        raise
    finally:
        if ours and not (keep is not None and fingerprint is not None and keep(temporary)):
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses an output path that is taken.

    Raises:
        LoraforgeError: It exists and `overwrite` is off, or it is nothing that this program would have made.
    """
    if not target.exists():
        return
    if not overwrite:
        raise LoraforgeError("The output exists already", where=target, hint="choose another folder or add --overwrite")
    if not target.is_dir():
        raise LoraforgeError("The output is a file, not a folder", where=target, expected="a folder name")
    if any(target.iterdir()) and not any((target / marker).is_file() for marker in MARKERS):
        raise LoraforgeError(
            "The output folder holds something else and is not replaced",
            where=target,
            got=", ".join(sorted(entry.name for entry in target.iterdir())[:5]),
            expected=f"an earlier output (with {' or '.join(MARKERS)}) or an empty folder",
            hint="choose another folder, or remove this one yourself",
        )


def _refusal(target: Path, temporary: Path | None, error: OSError) -> LoraforgeError:
    """The system's refusal in terms of the target: nobody knows the temporary name."""
    reason = error.strerror or str(error) or type(error).__name__
    if temporary is not None:
        reason = reason.replace(str(temporary), str(target))
    # safetensors reports the system's error as text only.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in reason
    return LoraforgeError(
        "The output could not be written",
        where=target,
        got=reason,
        hint="free space or choose another folder" if full else "choose another folder",
    )


def flush_file(path: Path) -> None:
    """Forces a file's (or folder's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file that is the old one or the new one, whenever the process or the machine ends.

    Args:
        path: The file; its folder is made as needed.
        content: Text (written as UTF-8) or bytes.
        private: Readable by its owner alone, from its first byte on.

    Raises:
        OSError: The disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(draft, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    flush_file(path.parent)


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Flushes the temporary folder and gives it the target's name; what had that name before is removed."""
    for entry in sorted(temporary.rglob("*"), reverse=True):
        flush_file(entry)
    # As late as can be: a run that is killed before this is continued, one that is killed behind it starts anew.
    shutil.rmtree(temporary / RESUME, ignore_errors=True)
    flush_file(temporary)
    # Looked at again: another process may have made it meanwhile.
    check_target(target, overwrite)
    if not target.exists():
        temporary.rename(target)
    else:
        # The old content gets the temporary name for a moment, and must not be taken for a leftover there.
        held = hold(target)
        try:
            if not _exchange(temporary, target):
                _swap(temporary, target)
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            os.close(held)
    flush_file(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step (Linux renameat2); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _swap(temporary: Path, target: Path) -> None:
    """The same in renames; the old folder is put back if the new one cannot take its place."""
    aside = temporary.with_name(temporary.name + ".old")
    target.rename(aside)
    try:
        temporary.rename(target)
    finally:
        if not target.exists():
            aside.rename(target)
    aside.rename(temporary)


def _missing_parents(target: Path) -> list[Path]:
    """Parents that do not exist yet, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]

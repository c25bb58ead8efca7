"""Folders that appear whole or not at all.

A new folder is filled beside its place under a temporary name, flushed to disk and renamed. A replaced folder stays
untouched until the new one is whole; where the system can exchange two names in one step, there is no moment without
one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraforge.errors import LoraforgeError

MARKERS = ("adapter_config.json", "run.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the block ends well; any exception leaves no trace.

    Args:
        out: The folder to make; parents are made as needed.
        overwrite: Replace an existing folder that an earlier run made (it holds one of MARKERS) or that is empty.

    Raises:
        LoraforgeError: `out` exists and may not be replaced, or the disk refuses (full, no permission).
    """
    target = Path(out).resolve()
    check_target(target, overwrite)
    made = _missing_parents(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        temporary.mkdir()
        yield temporary
        _publish(temporary, target, overwrite)
        made = []
    except OSError as error:
        raise _refusal(target, temporary, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
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


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Flushes the temporary folder and gives it the target's name; the old content ends up under the temporary name."""
    for entry in sorted(temporary.rglob("*"), reverse=True):
        flush_file(entry)
    flush_file(temporary)
    # Looked at again: another process may have made it meanwhile.
    check_target(target, overwrite)
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        _swap(temporary, target)
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

"""What a result was made with: versions, the program's own commit, digests of settings. Torch-free."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from loraforge import __version__

_REPOSITORY = Path(__file__).resolve().parents[1]


def versions(*packages: str) -> dict[str, str]:
    """Version of the program, of Python and of the packages, by name; nothing is imported.

    Raises:
        importlib.metadata.PackageNotFoundError: One is not installed.
    """
    own = {"loraforge": __version__, "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in packages}


def commit() -> str | None:
    """Short commit of the program's repository, with a mark if files differ from it; None outside of one."""
    # An installed package may lie inside of somebody else's repository.
    if not (_REPOSITORY / ".git").exists():
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "loraforge", "csrc")
    return f"{head}{'+changes' if changed else ''}" if head else None


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-ready value: mappings in the order of their keys, what JSON does not know as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _git(*words: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(_REPOSITORY), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

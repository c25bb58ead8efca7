"""Which line of loraforge asked for something."""

from __future__ import annotations

import sys
from pathlib import Path

import loraforge

ROOT = str(Path(loraforge.__file__).resolve().parent)


def call_site() -> str:
    """`merging/stream.py:120 pieces` of the innermost frame in the package; `outside` without one."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            return f"{code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"

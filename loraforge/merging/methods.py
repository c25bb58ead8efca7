"""The table of merge methods. Torch-free, so that `loraforge methods` and completion start at once.

A method is one row in rows.py and one file beside it. `params` and `function` are "module:name", imported on use.
"""

from __future__ import annotations

from loraforge.errors import UsageError, did_you_mean
from loraforge.merging.row import MethodRow, NoParams
from loraforge.merging.rows import CALIBRATED, ELEMENTS, SPECTRAL, SUMS

__all__ = ["METHODS", "MethodRow", "NoParams", "find_method"]

METHODS: dict[str, MethodRow] = {row.name: row for row in (*CALIBRATED, *SUMS, *SPECTRAL, *ELEMENTS)}


def find_method(name: str) -> MethodRow:
    """The row of a method name or alias.

    Raises:
        UsageError: Unknown name; the message has the closest known one.
    """
    for row in METHODS.values():
        if name == row.name or name in row.aliases:
            return row
    raise UsageError(
        f"unknown merge method '{name}'",
        hint=did_you_mean(name, METHODS) + "; `loraforge methods` explains them",
    )

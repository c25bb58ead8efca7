"""Names of files that more than one room reads, and the order of the names of tensors."""

from __future__ import annotations

import re

# Beside an adapter's weights, or a head that was kept apart: what it was trained for.
TASK_CARD = "task.json"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]

"""`loraforge measure importance`."""

from __future__ import annotations

from loraforge.cli import _options as opt
from loraforge.errors import UsageError


def importance(json: opt.Json = False) -> None:
    """To come."""
    raise UsageError("not there yet")

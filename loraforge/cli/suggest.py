"""`loraforge suggest`: ranks and targets out of measurements."""

from __future__ import annotations

import typer

from loraforge.cli import _options as opt
from loraforge.errors import UsageError

group = typer.Typer(help="Suggest ranks or targets of a LoRA adapter from measurements.", rich_markup_mode=None)


@group.command("ranks")
def ranks(json: opt.Json = False) -> None:
    """To come."""
    raise UsageError("not there yet")


@group.command("targets")
def targets(json: opt.Json = False) -> None:
    """To come."""
    raise UsageError("not there yet")

"""Words for shell completion; torch-free, since it runs at every press of the tab key."""

from __future__ import annotations

import typer


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Method names and aliases with their titles."""
    from loraforge.merging.methods import METHODS

    names = [(name, row.title) for row in METHODS.values() for name in (row.name, *row.aliases)]
    return [(name, title) for name, title in names if name.startswith(incomplete)]


def complete_setting(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """`key=` of the parameters of the method that stands on the line."""
    from loraforge.cli._settings import settings_of
    from loraforge.errors import UsageError
    from loraforge.merging.methods import find_method

    try:
        settings = settings_of(find_method(ctx.params.get("method") or ""))
    except UsageError:
        return []
    return [(f"{s.name}=", s.help) for s in settings if s.name.startswith(incomplete)]


def complete_preset(incomplete: str) -> list[str]:
    """Names of the presets that come with the package."""
    from loraforge.recipes import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]

"""`loraforge methods`: what can be merged how, from the torch-free table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraforge.cli._complete import complete_method
from loraforge.cli._options import Debug, Json, Quiet, Verbose
from loraforge.cli._output import Output

if TYPE_CHECKING:
    from loraforge.merging.methods import MethodRow

# Columns of text that the table with cost and paper needs.
FULL_WIDTH = 160


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method: its parameters.", autocompletion=complete_method)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the merge methods, or the parameters of one."""
    from loraforge.merging.methods import METHODS, find_method

    out = Output(as_json=json, quiet=quiet, verbose=verbose)
    if name is None:
        out.result([summary(row) for row in METHODS.values()])
        _print_table(out, list(METHODS.values()))
        return
    row = find_method(name)
    out.result(summary(row))
    _print_one(out, row)


def summary(row: MethodRow) -> dict[str, Any]:
    """One method as JSON, with its parameters."""
    from loraforge.cli._settings import settings_of

    return {
        "name": row.name,
        "title": row.title,
        "needs": row.needs,
        "output": row.output,
        "params": [setting.summary() for setting in settings_of(row)],
        "paper": row.paper,
        "cost": row.cost,
        "default_weight": row.default_weight,
        "aliases": list(row.aliases),
    }


def _print_table(out: Output, rows: list[MethodRow]) -> None:
    headers = ["method", "what it does", "needs", "output rank"]
    cells = [[_names(row), row.title, row.needs, row.output] for row in rows]
    if out.verbose or out.has_room(FULL_WIDTH):
        headers += ["cost a module", "paper"]
        cells = [[*cell, row.cost, row.paper] for cell, row in zip(cells, rows, strict=True)]
    out.table(headers, cells)
    out.line("Cost, paper and parameters of one: loraforge methods NAME")


def _print_one(out: Output, row: MethodRow) -> None:
    from loraforge.cli._settings import settings_of

    out.line(f"{_names(row)}: {row.title}")
    weights = "1 each" if row.default_weight == "one" else "1/N each"
    facts = {"needs": row.needs, "output rank": row.output, "cost a module": row.cost, "paper": row.paper}
    for label, value in {**facts, "default weights": weights}.items():
        out.line(f"  {label}: {value}")
    settings = settings_of(row)
    if not settings:
        out.line("  no parameters of its own")
        return
    rows = [[s.name, _default(s.default), " | ".join(map(str, s.choices)) or s.type_name, s.help] for s in settings]
    out.table(["parameter (--set)", "default", "values", "meaning"], rows)


def _names(row: MethodRow) -> str:
    return row.name + (f" ({', '.join(row.aliases)})" if row.aliases else "")


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)

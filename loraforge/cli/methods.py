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
FULL_WIDTH = 190
# What a method works from, in the order of the tables: group -> title.
GROUPS = {
    "adapters": "From the adapters alone",
    "stats": "Better with input statistics (--stats, from collect-stats)",
    "calibration": "With the base model and calibration data (--base, --calibration)",
}


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
        _print_tables(out, list(METHODS.values()))
        return
    row = find_method(name)
    out.result(summary(row))
    _print_one(out, row)


def summary(row: MethodRow) -> dict[str, Any]:
    """One method as JSON, with its parameters."""
    from loraforge.cli._settings import settings_of

    least, most = row.counts
    return {
        "name": row.name,
        "title": row.title,
        "needs": row.needs,
        "output": row.output,
        "params": [setting.summary() for setting in settings_of(row)],
        "paper": row.paper,
        "cost": row.cost,
        "default_weight": row.default_weight if row.weighted else None,
        "aliases": list(row.aliases),
        "group": group_of(row),
        "adapters": {"min": least, "max": most},
        "weighted": row.weighted,
        "equal_ranks": row.equal_ranks,
        "checkpoints": row.checkpoints,
        "stats": row.stats,
        "post": row.post,
        "examples": examples(row),
    }


def group_of(row: MethodRow) -> str:
    """What a method works from: a key of GROUPS."""
    return "stats" if row.stats is not None else row.needs


def examples(row: MethodRow) -> list[str]:
    """Commands that run a method: on adapters, and on full models where it takes them."""
    letters = "AB" if row.counts[1] == 2 else "ABC"
    command = f"loraforge merge {' '.join(letters)} --method {row.name}"
    if row.default_rank == "max":
        command += " --rank 16"
    if row.needs == "calibration":
        command += " --base MODEL" + "".join(f" --calibration {x}={x.lower()}.jsonl" for x in letters)
    found = [f"{command} --out MERGED"]
    if row.stats is not None:
        found.append(command + "".join(f" --stats {x}={x.lower()}.safetensors" for x in letters) + " --out MERGED")
    if row.checkpoints:
        models = " ".join(f"MODEL_{x}" for x in letters)
        found.append(f"loraforge merge {models} --base BASE --method {row.name} --out MERGED_MODEL")
    return found


def _print_tables(out: Output, rows: list[MethodRow]) -> None:
    """A table for each thing that methods work from."""
    wide = out.verbose or out.has_room(FULL_WIDTH)
    headers = ["method", "what it does", "output rank", "adapters", "full models"]
    headers += ["cost a module", "paper"] if wide else []
    for group, title in GROUPS.items():
        members = [row for row in rows if group_of(row) == group]
        if members:
            cells = [_cells(row)[: len(headers)] for row in members]
            out.table(headers, cells, title=title)
    out.line("\nCost, paper, parameters and an example of one: loraforge methods NAME")


def _cells(row: MethodRow) -> list[object]:
    full = "yes" if row.checkpoints else "-"
    return [_names(row), row.title, row.output, _count(row), full, row.cost, row.paper]


def _print_one(out: Output, row: MethodRow) -> None:
    from loraforge.cli._settings import settings_of

    out.line(f"{_names(row)}: {row.title}")
    for label, value in _facts(row).items():
        out.line(f"  {label}: {value}")
    settings = settings_of(row)
    if settings:
        rows = [[s.name, _default(s.default), " | ".join(map(str, s.choices)) or s.type_name, s.help] for s in settings]
        out.table(["parameter (--set)", "default", "values", "meaning"], rows)
    else:
        out.line("  no parameters of its own")
    out.line("for example")
    for example in examples(row):
        out.line(f"  {example}")


def _facts(row: MethodRow) -> dict[str, str]:
    """What to know of a method, by label."""
    needs = {
        "adapters": "the adapters alone",
        "stats": "the adapters; better with input statistics (--stats, one file an adapter)",
        "calibration": "the base model and calibration data, one set an adapter",
    }
    weights = {"one": "1 each", "mean": "1/N each"}[row.default_weight]
    return {
        "needs": needs[group_of(row)],
        "adapters": _count(row) + (", of one rank in each module" if row.equal_ranks else ""),
        "full models": "yes, against --base" if row.checkpoints else "no",
        "output rank": row.output,
        "default weights": weights if row.weighted else "none; --weights is refused",
        "cost a module": row.cost,
        "paper": row.paper,
    }


def _count(row: MethodRow) -> str:
    """How many adapters it takes."""
    least, most = row.counts
    if most is None:
        return "any" if least <= 1 else f"{least} or more"
    return str(most) if least == most else f"{least} to {most}" if most - least > 1 else f"{least} or {most}"


def _names(row: MethodRow) -> str:
    return row.name + (f" ({', '.join(row.aliases)})" if row.aliases else "")


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)

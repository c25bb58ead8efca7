"""`loraforge resize`: an adapter at another rank."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes

# Modules that are listed without -v.
SHOWN = 8

Source = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Adapter folder or file, of any format.", show_default=False)
]
Out = Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.", show_default=False)]


def resize(
    adapter: Source,
    out: Out,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    nuclear: opt.Nuclear = None,
    ratio: opt.Ratio = None,
    fro_error: opt.FroError = None,
    budget: opt.Budget = None,
    min_rank: opt.MinRank = None,
    max_rank: opt.MaxRank = None,
    uniform_rank: opt.UniformRank = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    format: opt.Format = None,
    ignore_unknown: opt.IgnoreUnknown = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write an adapter at another rank, with the exact error."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.resizing import resize as run

        with voice.progress() as progress:
            found = run(
                adapter, out, rank=rank, energy=energy, nuclear=nuclear, ratio=ratio, fro_error=fro_error,
                budget=budget, min_rank=min_rank or 1, max_rank=max_rank, uniform_rank=bool(uniform_rank),
                dtype=dtype or "auto", device=device or "auto", format=format or "auto", overwrite=bool(overwrite),
                ignore_unknown=bool(ignore_unknown), progress=progress,
            )  # fmt: skip
        for note in found["warnings"]:
            voice.note(f"note: {note}")
        layers = [{key: value for key, value in row.items() if key != "spectrum"} for row in found["layers"]]
        voice.result(found | {"layers": layers})
        _print(voice, found)


def _print(voice: Output, found: dict[str, Any]) -> None:
    """The modules with the largest errors (all with -v), the totals, and where the adapter is."""
    rows = found["layers"]
    shown = rows if voice.verbose else sorted(rows, key=lambda row: -row["relative_error"])[:SHOWN]
    voice.table(
        ["module", "rank before", "rank", "relative error", "kept energy"],
        [[r["module"], r["rank_before"], r["rank"], r["relative_error"], r["kept_energy"]] for r in shown],
    )
    if len(shown) < len(rows):
        voice.line(f"... and {len(rows) - len(shown)} modules with smaller errors (-v shows all)")
    voice.table(
        ["modules", "rank", "parameters before", "parameters", "relative error", "kept energy", "size"],
        [
            [
                found["modules"], found["rank_max"], found["parameters_before"], found["parameters"],
                found["relative_error"], found["kept_energy"], human_bytes(found["bytes"]),
            ]
        ],
        title="In total",
    )  # fmt: skip
    voice.line(f"written to {found['out']}")

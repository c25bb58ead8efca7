"""`loraforge convert`: an adapter in another format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Adapter folder or file, of any format.", show_default=False)
]
Out = Annotated[str, typer.Option("--out", "-o", metavar="DST", help="Folder to write.", show_default=False)]
To = Annotated[Literal["peft", "kohya", "diffusers"], typer.Option("--to", help="Format to write.", show_default=False)]
IgnoreUnknown = Annotated[
    bool, typer.Option("--ignore-unknown", help="Leave out keys of the source that belong to nothing.")
]


def convert(
    src: Source,
    out: Out,
    to: To,
    ignore_unknown: IgnoreUnknown = False,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write an adapter in another format: PEFT, kohya or diffusers."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.conversion import convert as run

        with voice.progress() as progress:
            found = run(src, out, to=to, overwrite=bool(overwrite), ignore_unknown=ignore_unknown, progress=progress)
        for note in found["notes"]:
            voice.note(f"note: {note}")
        voice.result(found)
        _print(voice, found)


def _print(voice: Output, found: dict[str, Any]) -> None:
    """One row of numbers and where the file is."""
    headers = ["from", "to", "modules", "rank", "bits kept", "size"]
    kept = "all" if found["exact"] else f"rounding {found['rounding']:.2g}"
    row = [found["source"]["format"], found["to"], found["modules"], found["rank_max"], kept]
    voice.table(headers, [[*row, human_bytes(found["bytes"])]])
    voice.line(f"written to {found['out']}")

"""`loraforge plot`: pictures and report of measured heads from their files, again."""

from __future__ import annotations

from typing import Annotated

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.errors import UsageError

Folder = Annotated[
    str,
    typer.Argument(metavar="RUN|COMPARISON", help="Folder of a run, a comparison or seeds.", show_default=False),
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.", show_default="the same")
]
Format = Annotated[str, typer.Option("--format", metavar="F,F,...", help="Of png, svg and html (the report).")]


def plot(
    folder: Folder,
    out: Out = None,
    format: Format = "png,html",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write the pictures and report.html of measured heads from their files; nothing is measured.

    A run gives fig_*, a comparison compare_*, a summary over seeds seeds_*.
    """
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.analysis.drawing import FORMATS, draw

        formats = [name.strip() for name in format.split(",") if name.strip()]
        unknown = [name for name in formats if name not in FORMATS]
        if unknown or not formats:
            got = ", ".join(unknown) or "none"
            raise UsageError("unknown format", where="--format", got=got, expected=", ".join(FORMATS))
        kind, files = draw(folder, out=out, formats=formats)
        voice.result({"kind": kind, "files": files})
        for path in files:
            voice.line(str(path))

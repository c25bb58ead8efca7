"""`loraforge cl-report`: the report of a training sequence, alone or beside others."""

from __future__ import annotations

from typing import Annotated

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a training sequence.", show_default=False)]
Against = Annotated[
    list[str] | None,
    typer.Option("--against", metavar="RUN", help="Run over the same tasks to show beside it (repeat)."),
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.", show_default="the run's")
]


def cl_report(
    run: Run,
    against: Against = None,
    out: Out = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write report.html and pictures of a sequence from its files; nothing is trained or scored."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.training.sequence.report import cl_report as write

        found = write(run, against=against or (), out=out)
        voice.result(found)
        names = ("acc", "avg", "bwt", "forgetting", "fwt", "learning_acc", "intransigence")
        rows = [
            [r["name"], r["method"], r["adapter"], *(r["metrics"].get(name) for name in names)] for r in found["runs"]
        ]
        voice.table(["run", "method", "adapter", *names], rows)
        voice.line(f"written: {found['files'][0]} and {len(found['files']) - 1} pictures")

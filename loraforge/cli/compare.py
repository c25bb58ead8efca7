"""`loraforge compare`: measured runs of several methods beside each other."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.errors import UsageError

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Folders of two or more measured runs.", show_default=False)
]
Names = Annotated[
    str | None,
    typer.Option("--names", metavar="A,B", help="What to call them.", show_default="FFT, LoRA-r8, ... or the folders"),
]
OtherBase = Annotated[
    bool, typer.Option("--allow-different-base", help="Compare runs that started from different weights.")
]
OtherSubset = Annotated[
    bool, typer.Option("--allow-different-subset", help="Compare runs that were measured on different rows.")
]
TopK = Annotated[int, typer.Option("--topk", min=1, help="K of the top-K overlaps.")]
Hi = Annotated[float, typer.Option("--hi", min=0, max=100, help="Percentile from which a value is high in the cases.")]
Lo = Annotated[float, typer.Option("--lo", min=0, max=100, help="Percentile up to which a value is low.")]
Profile = Annotated[
    Literal["default", "document", "seed"],
    typer.Option("--profile", help="document (or seed): the document's keys alone in compare_metrics.json."),
]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and pictures too.")]
Seed = Annotated[int, typer.Option("--seed", help="Of permutations and resamples.")]


def compare(
    runs: Runs,
    out: opt.Out = None,
    names: Names = None,
    allow_different_base: OtherBase = False,
    allow_different_subset: OtherSubset = False,
    topk: TopK = 20,
    hi: Hi = 90,
    lo: Lo = 30,
    profile: Profile = "default",
    seed: Seed = 0,
    report: Report = True,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Compare measured runs head by head, with the range of chance beside every number.

    Writes compare_metrics.json, compare_summary.txt and .md, heads_joined.csv, compare_*.png and report.html.
    """
    if out is None:
        raise UsageError("--out is missing", expected="--out DIR")
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.analysis.compare import compare as run
        from loraforge.measure.analysis.summary import sections

        found = run(
            runs,
            out,
            names=None if names is None else [name.strip() for name in names.split(",")],
            allow_different_base=allow_different_base,
            allow_different_subset=allow_different_subset,
            topk=topk,
            hi=hi,
            lo=lo,
            seed=seed,
            profile=profile,
            overwrite=bool(overwrite),
            report=report,
        )
        voice.result(found)
        for warning in found["comparison"]["warnings"]:
            voice.note(f"warning: {warning}")
        for title, headers, rows in sections(found):
            voice.table(headers, rows, title=title)
        voice.line()
        for finding in found["comparison"]["findings"]:
            voice.line(f"- {finding}")
        voice.line(f"numbers   {out}/compare_metrics.json")
        if report:
            voice.line(f"report    {out}/report.html")

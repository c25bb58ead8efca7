"""`loraforge measure aggregate`: statistics of a run, or of several runs together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Folder of a measured run; several are seeds.", show_default=False)
]
TopK = Annotated[int, typer.Option("--topk", min=1, help="K of the top-K overlaps.")]
Hi = Annotated[float, typer.Option("--hi", min=0, max=100, help="Percentile from which a value is high in the cases.")]
Lo = Annotated[float, typer.Option("--lo", min=0, max=100, help="Percentile up to which a value is low.")]
Profile = Annotated[
    Literal["default", "document", "seed"],
    typer.Option("--profile", help="document (or seed): the document's columns and keys alone."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Call a head important only if the interval of its importance is above 0.")
]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Permutations of each p.")]
Seed = Annotated[int, typer.Option("--seed", help="Of permutations and resamples.")]
Report = Annotated[
    bool, typer.Option("--report/--no-report", help="Of several runs: write report.html and pictures too.")
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", help="Of several runs: folder of the summary.",
                 show_default="the runs' common parent"),
]  # fmt: skip


def aggregate(
    runs: Runs,
    topk: TopK = 20,
    hi: Hi = 90,
    lo: Lo = 30,
    profile: Profile = "default",
    strict: Strict = False,
    draws: Draws = 10_000,
    seed: Seed = 0,
    out: Out = None,
    report: Report = True,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Join a run's measurements: heads.csv, stats.json with chance levels, cases.json.

    Several runs are each joined, then summarised over seeds, methods and tasks: seeds.json, seeds.md, report.html.
    """
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.analysis.aggregate import aggregate as join

        made = [
            join(run, topk=topk, hi=hi, lo=lo, profile=profile, strict=strict, draws=draws, seed=seed) for run in runs
        ]
        for run, found in zip(runs, made, strict=True):
            for note in found["notes"]:
                voice.note(f"note: {note}" + (f" ({run})" if len(runs) > 1 else ""))
        if len(runs) == 1:
            voice.result(made[0])
            _print(voice, made[0])
            return
        import os

        from loraforge.measure.analysis.seeds import summarise

        folder = out or os.path.commonpath([os.path.abspath(run) for run in runs])
        summary = summarise(runs, folder, report=report)
        voice.result(summary | {"out": folder})
        _print_seeds(voice, summary, folder, report)


def _print(voice: Output, found: Mapping[str, Any]) -> None:
    """The document's statistics beside what chance gives."""
    from loraforge.measure.analysis.seeds_text import chance as told
    from loraforge.measure.analysis.seeds_text import number

    stats = found["stats"]
    rows: list[list[object]] = []
    for pair, rho in stats.get("rho", {}).items():
        key = f"spearman_rho_{pair}"
        if key in stats or voice.verbose:
            rows.append(
                [f"rho {pair}", number(rho["rho"]), _range(rho.get("ci")), _band(rho["rho95"]), told(rho["p_perm"])]
            )
    for pair, overlap in stats.get("overlap", {}).items():
        rows.append(
            [
                f"top-{overlap['k']} {pair}",
                number(overlap["overlap"]),
                None,
                number(overlap["expected"]),
                told(overlap["p"]),
            ]
        )
    for kind, chance in stats.get("null", {}).get("cases_expected", {}).items():
        if chance is not None:
            within = "{} to {}".format(*chance["range95"])
            rows.append([kind.replace("_", " "), chance["observed"], None, within, told(chance["p"])])
    if rows:
        cells = [["-" if cell is None else cell for cell in row] for row in rows]
        voice.table(["statistic", "value", "95 %", "by chance", "p"], cells, title=f"{found['heads']} heads")
    else:
        voice.table(["statistic", "value"], [[key, number(value)] for key, value in stats.items()])
    for file in found["files"]:
        voice.line(f"written   {file}")


def _print_seeds(voice: Output, summary: Mapping[str, Any], folder: str, report: bool) -> None:
    from loraforge.measure.analysis.seeds_text import number

    rows = [
        [method, task, key, *(number(spread[name]) for name in ("mean", "sd", "min", "max")), spread["n"]]
        for method, tasks in summary["statistics"].items()
        for task, statistics in tasks.items()
        for key, spread in statistics.items()
    ]
    voice.table(["method", "task", "statistic", "mean", "sd", "min", "max", "seeds"], rows)
    larger = [d for d in summary["differences"] if d["larger"]]
    if summary["differences"]:
        voice.line(f"{len(larger)} of {len(summary['differences'])} differences between methods exceed seed noise")
    for note in summary["notes"]:
        voice.note(f"note: {note}")
    voice.line(f"written   {folder}/seeds.json, seeds.md" + (", report.html" if report else ""))


def _range(interval: list[float] | None) -> str | None:
    return None if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _band(bound: float | None) -> str | None:
    return None if bound is None else f"±{bound:.3f}"

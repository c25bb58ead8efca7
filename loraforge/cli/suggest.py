"""`loraforge suggest`: ranks and targets out of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output

group = typer.Typer(help="Suggest ranks or targets of a LoRA adapter from measurements.", rich_markup_mode=None)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a measured run.", show_default=False)]
By = Annotated[
    Literal["I", "I_pre", "F", "G", "U", "energy"],
    typer.Option("--by", help="Score: importance after or before training, Fisher, gradient, update, energy rank."),
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", min=1, metavar="P", help="Parameters of all A and B.",
                 show_default="those of the run's rank everywhere"),
]  # fmt: skip
HalfBudget = Annotated[
    int | None,
    typer.Option("--budget", min=1, metavar="P", help="Parameters of all A and B.",
                 show_default="half of every projection at the rank"),
]  # fmt: skip
MeanRank = Annotated[
    float | None,
    typer.Option("--mean-rank", min=0, metavar="R", help="Instead: the parameters of this rank everywhere."),
]
RMin = Annotated[int, typer.Option("--r-min", min=0, help="Least rank; 0 leaves projections out.")]
RMax = Annotated[
    int | None, typer.Option("--r-max", min=1, help="Largest rank.", show_default="four times the uniform one")
]
Rank = Annotated[int | None, typer.Option("--r", min=1, help="Rank of the targets.", show_default="the run's, or 8")]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha", help="Alpha at the run's rank; fixes the scaling.", show_default="the run's, or twice the rank"
    ),
]
Parts = Annotated[str, typer.Option("--parts", metavar="qkvo", help="Which projections.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Model for the shapes.", show_default="that of the run")
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE.json", help="File to write.", show_default="in RUN")
]


@group.command("ranks")
def ranks(
    run: Run,
    by: By = "I",
    budget: Budget = None,
    mean_rank: MeanRank = None,
    r_min: RMin = 1,
    r_max: RMax = None,
    alpha: Alpha = None,
    parts: Parts = "qkvo",
    base: Base = None,
    out: Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Deal a budget of parameters out as ranks: rank_pattern.json, for train-lora --rank-pattern."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.analysis.suggest import suggest_ranks

        found = suggest_ranks(
            run, by=by, budget=budget, mean_rank=mean_rank, r_min=r_min, r_max=r_max, alpha=alpha, parts=parts,
            base=base, out=out, overwrite=bool(overwrite),
        )  # fmt: skip
        voice.result(found)
        uniform = found["uniform"]
        rows = [[m["key"], m["score"], m["rank"], uniform["r"], m["rank"] * m["cost"]] for m in found["modules"]]
        rows.append(["all", sum(m["score"] for m in found["modules"]), None, None, found["parameters"]])
        voice.table(["module", f"score ({by})", "rank", "uniform", "parameters"], rows)
        voice.line(f"budget    {found['budget']} parameters; uniform rank {uniform['r']}: {uniform['parameters']}")
        _print_end(voice, found, f"train-lora --rank-pattern {found['out']}" + (" --rslora" if found["rslora"] else ""))


@group.command("targets")
def targets(
    run: Run,
    by: By = "I",
    budget: HalfBudget = None,
    r: Rank = None,
    alpha: Alpha = None,
    parts: Parts = "qkvo",
    base: Base = None,
    out: Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Pick projections by score per parameter: targets.json, for train-lora --targets."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.analysis.suggest import suggest_targets

        found = suggest_targets(
            run, by=by, budget=budget, r=r, alpha=alpha, parts=parts, base=base, out=out, overwrite=bool(overwrite)
        )
        voice.result(found)
        rows = [
            [m["key"], m["score"], found["r"] * m["cost"], "yes" if m["chosen"] else "no"] for m in found["modules"]
        ]
        voice.table(["module", f"score ({by})", "parameters", "target"], rows)
        uniform = found["uniform"]
        voice.line(
            f"budget    {found['budget']} parameters, {found['parameters']} spent on {found['score_share']:.0%} of the"
            f" score; uniform: all projections at rank {uniform['r']} for {uniform['parameters']}"
        )
        _print_end(voice, found, f"train-lora --targets {found['out']}")


def _print_end(voice: Output, found: Mapping[str, Any], command: str) -> None:
    voice.line(f"written   {found['out']}")
    voice.line(f"next      loraforge {command} ...")
    voice.line(f"note      {found['note']}")

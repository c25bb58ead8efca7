"""`loraforge measure run`: everything that is measured of one training, into one folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli.measure import _options as own
from loraforge.errors import UsageError

RUN, STATISTICS = "Run", "Statistics"
RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="Folder with ckpt_final, or what train-lora or train-full wrote.",
                        show_default=False),
]  # fmt: skip
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the results.", rich_help_panel=RUN,
                             show_default="RUN_DIR, or RUN_DIR/measure beside a training's own files"),
]  # fmt: skip
Base = Annotated[str | None, own.option(RUN, "--base", "Base.", metavar="MODEL", default="the recorded one")]
Final = Annotated[str | None, own.option(RUN, "--final", "Adapter or model.", metavar="DIR", default="RUN_DIR's")]
Task = Annotated[str | None, own.option(own.DATA, "--task", "The task.", metavar="FILE.yaml",
                                        default="the recorded one")]  # fmt: skip
Data = Annotated[str | None, own.option(own.DATA, "--data", "Rows to measure on.", metavar="FILE",
                                        default="the task's")]  # fmt: skip
Split = Annotated[
    Literal["test", "eval", "train"] | None,
    own.option(own.DATA, "--split", "Rows of the task.", default="test, else eval"),
]
Seed = Annotated[int | None, own.option(RUN, "--seed", "Of the head.", metavar="N", default="the training's")]
Subset = Annotated[
    str, typer.Option("--subset", metavar="N[:SEED]|all", help="How many rows, and the seed that chooses them.",
                      rich_help_panel=own.DATA),
]  # fmt: skip
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows in a batch.", rich_help_panel=own.DATA)]
Profile = Annotated[
    Literal["default", "document", "seed"],
    own.option(own.HOW, "--profile", "document (or seed): the document's files, columns and definitions, exactly.",
               default="default"),
]  # fmt: skip
Spectrum = Annotated[
    bool | None,
    typer.Option("--spectrum/--no-spectrum", help="Singular values of the update.", rich_help_panel=own.HOW,
                 show_default="of adapters, in the default profile"),
]  # fmt: skip
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Pictures and report.", rich_help_panel=STATISTICS)]
TopK = Annotated[int, typer.Option("--topk", min=1, help="Heads of an overlap.", rich_help_panel=STATISTICS)]
High = Annotated[float, typer.Option("--hi", min=0, max=100, help="Percentile that is high.",
                                     rich_help_panel=STATISTICS)]  # fmt: skip
Low = Annotated[float, typer.Option("--lo", min=0, max=100, help="Percentile that is low.",
                                    rich_help_panel=STATISTICS)]  # fmt: skip
_OF_OUTPUT = ("overwrite", "json", "quiet", "verbose", "debug")
_NOT_SETTINGS = ("run_dir", "out", "base", "final", "task", "data", "seed", "subset", "device", *_OF_OUTPUT)
# Statistic of stats.json -> its row of the table.
_ROWS = {
    "spearman_rho_Ipre_U": "rho(I_pre, U)",
    "spearman_rho_Ipre_Urel": "rho(I_pre, Urel)",
    "spearman_rho_Ipost_U": "rho(I_post, U)",
    "spearman_rho_Ipost_Urel": "rho(I_post, Urel)",
    "spearman_rho_Ipost_G": "rho(I_post, G)",
    "spearman_rho_Ipost_F": "rho(I_post, F)",
    "spearman_rho_Ipost_Ppred": "rho(I_post, Ppred)",
    "topk_overlap_Ipre_U": "top-K overlap of I_pre and U",
    "topk_overlap_Ipre_Urel": "top-K overlap of I_pre and Urel",
    "topk_overlap_Ipre_Ipost": "top-K overlap of I_pre and I_post",
    "n_important_but_static": "important but static",
    "n_plastic_but_unimportant": "plastic but unimportant",
}


def run(
    ctx: typer.Context,
    run_dir: RunDir,
    out: Out = None,
    base: Base = None,
    final: Final = None,
    task: Task = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = "1024:999",
    batch_size: BatchSize = 16,
    profile: Profile = "default",
    method: own.Method = "exact",
    objective: own.Objective = "task",
    probe_steps: own.ProbeSteps = 200,
    ablate: own.Ablate = "zero",
    unit: own.Unit = "q",
    layers: own.Layers = None,
    max_heads: own.MaxHeads = None,
    exact_top: own.ExactTop = None,
    tokens_per_pass: own.TokensPerPass = None,
    spectrum: Spectrum = None,
    topk: TopK = 20,
    hi: High = 90.0,
    lo: Low = 30.0,
    plots: Plots = True,
    dtype: own.Dtype = "float32",
    device: opt.Device = None,
    seed: Seed = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure all of a training, step by step; resumed where it was broken off.

    Importance before and after, Fisher, update, spectra, statistics, pictures.
    """
    settings = {key: value for key, value in ctx.params.items() if key not in _NOT_SETTINGS}
    settings |= _subset(subset) | {"device": device or "auto"}
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.run import measure_run

        try:
            with voice.progress() as progress:
                found = measure_run(
                    run_dir, out=out, base=base, final=final, task=task, data=data, seed=seed, overwrite=overwrite,
                    command=_command(ctx, run_dir), progress=progress, **settings,
                )  # fmt: skip
        except KeyboardInterrupt:
            voice.note("note: what is measured is kept; the same command goes on from there")
            raise
        voice.result(found)
        _print(voice, found)


def _command(ctx: typer.Context, run_dir: str) -> str:
    """What one types to measure this again: the options that were given, but for those of the output."""
    words = ["loraforge", "measure", "run", run_dir]
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if source is None or source.name != "COMMANDLINE" or param.name in ("run_dir", *_OF_OUTPUT):
            continue
        value = ctx.params[param.name or ""]
        if isinstance(value, bool):
            words.append(param.opts[0] if value else param.secondary_opts[0])
        else:
            words += [param.opts[0], str(value)]
    return shlex.join(words)


def _subset(text: str) -> dict[str, Any]:
    """`subset` and `subset_seed` of N, N:SEED or `all`.

    Raises:
        UsageError: None of these.
    """
    count, _, seed = text.partition(":")
    if not (count.isdigit() or count == "all") or (seed and not seed.isdigit()):
        raise UsageError("--subset takes a number of rows", got=text, expected="N, N:SEED or all")
    return {"subset": None if count == "all" else int(count)} | ({"subset_seed": int(seed)} if seed else {})


def _print(voice: Output, found: Mapping[str, Any]) -> None:
    """The statistics beside what chance gives, the steps with -v, and where everything is."""
    from loraforge.measure.analysis.seeds_text import number

    for warning in found["warnings"]:
        voice.note(f"note: {warning}")
    stats, null = found["stats"], found["stats"].get("null") or {}
    rank = "" if found["rank"] is None else f", r {found['rank']}"
    title = f"{found['method']}{rank} on {found['task']}, seed {found['seed']}: {found['n_heads']} heads"
    rows = [[label, number(stats[key]), _chance(key, null)] for key, label in _ROWS.items() if key in stats]
    voice.table(["statistic", "value", "by chance"], rows, title=title)
    if voice.verbose:
        steps = [[step["name"], step["state"], round(step["seconds"], 1)] for step in found["steps"]]
        voice.table(["step", "state", "seconds"], steps)
    for label, path in found["paths"].items():
        voice.line(f"  {label:<10}{path}")


def _chance(key: str, null: Mapping[str, Any]) -> str:
    """What a statistic is without any relation."""
    if key.startswith("spearman"):
        return f"within ±{null['rho95']:.2f}" if null.get("rho95") is not None else "-"
    if key.startswith("topk"):
        return f"{null['overlap_expected']:.2f}" if null.get("overlap_expected") is not None else "-"
    expected = (null.get("cases_expected") or {}).get(key.removeprefix("n_"))
    if not isinstance(expected, Mapping) or expected.get("expected") is None:
        return "-"
    low, high = expected["range95"]
    return f"{expected['expected']:.1f} ({low:g} to {high:g})"

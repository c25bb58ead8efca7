"""`loraforge merge`: several adapters of one base model become one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes

if TYPE_CHECKING:
    from loraforge.cli._request import MergeRequest

# The keys of `merge --json`; `out` comes before them.
REPORTED = (
    "method", "params", "adapters", "modules", "rank_max", "parameters", "relative_error", "kept_energy", "seconds",
    "phases", "peak_rss_bytes", "device", "kernels", "warnings",
)  # fmt: skip
# Modules that a plan shows without -v.
PLAN_ROWS = 20


def merge(
    ctx: typer.Context,
    adapters: opt.AdaptersOrRecipe = None,
    method: opt.Method = None,
    out: opt.Out = None,
    weights: opt.Weights = None,
    weight: opt.Weight = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    min_rank: opt.MinRank = None,
    max_rank: opt.MaxRank = None,
    uniform_rank: opt.UniformRank = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    seed: opt.Seed = None,
    format: opt.Format = None,
    base: opt.Base = None,
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    max_length: opt.MaxLength = None,
    batch_tokens: opt.BatchTokens = None,
    template: opt.Template = None,
    recipe: opt.Recipe = None,
    preset: opt.Preset = None,
    settings: opt.Set = None,
    mats: opt.Mats = None,
    camr: opt.Camr = None,
    dcs: opt.Dcs = None,
    max_iter: opt.MaxIter = None,
    init: opt.Init = None,
    verify: opt.Verify = None,
    on_missing: opt.OnMissing = None,
    heads_from: opt.HeadsFrom = None,
    force: opt.Force = None,
    overwrite: opt.Overwrite = None,
    dry_run: opt.DryRun = False,
    report: opt.Report = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Merge adapters into one that PEFT loads."""
    from loraforge.cli._request import build_request

    # Every option above reaches the request under its own name.
    request = build_request(ctx.params)
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        for note in request.notes:
            voice.note(f"note: {note}")
        _run(voice, request, dry_run=dry_run)


def _run(voice: Output, request: MergeRequest, *, dry_run: bool) -> None:
    import loraforge

    with voice.progress() as progress:
        result = loraforge.merge(**request.arguments, progress=progress)
    if dry_run:
        voice.result(
            {"dry_run": True, "out": request.out, "method": request.arguments["method"], "plan": result.report["plan"]}
        )
        _print_plan(voice, request.arguments["method"], result.report["plan"])
        return
    if request.out is None:  # build_request refuses this outside of a dry run
        raise RuntimeError("a merge without an output folder reached its end")
    result.save(request.out, overwrite=request.overwrite)
    if request.report is not None:
        _write_report(request.report, result.report)
    voice.result({"out": request.out} | {key: result.report[key] for key in REPORTED})
    _print_result(voice, request, result.report)


def _write_report(path: Path, report: dict[str, Any]) -> None:
    from loraforge.report import write_merge_report

    write_merge_report(path, report)


def _print_plan(voice: Output, method: str, plan: dict[str, Any]) -> None:
    """Modules with their ranks, then what the merge would cost."""
    modules = plan["modules"]
    shown = modules if voice.verbose or len(modules) <= PLAN_ROWS else modules[:PLAN_ROWS]
    rows = [[row["module"], _shape(row["shape"]), _ranks(row["ranks"]), row["rank_out"]] for row in shown]
    voice.table(["module", "shape", "ranks", "output rank"], rows)
    if len(shown) < len(modules):
        voice.line(f"... and {len(modules) - len(shown)} more modules (-v shows all)")
    voice.line(f"{method}: {len(modules)} modules, peak {human_bytes(plan['peak_bytes'])}, {plan['flops']:.3g} flops")
    for step in plan["steps"]:
        voice.line(f"  {step}")
    voice.line("nothing was written (dry run)")


def _print_result(voice: Output, request: MergeRequest, report: dict[str, Any]) -> None:
    """One row of numbers, where the adapter is and how to load it."""
    if request.out is None or not voice.is_human:
        return
    error, kept = report["relative_error"], report["kept_energy"]
    size = sum(file.stat().st_size for file in request.out.rglob("*") if file.is_file())
    headers = ["method", "modules", "rank", "relative error", "kept energy", "seconds", "size"]
    seconds = f"{report['seconds']:.2f}"
    voice.table(
        headers, [[report["method"], report["modules"], report["rank_max"], error, kept, seconds, human_bytes(size)]]
    )
    voice.line(f"written to {request.out}")
    if request.report is not None:
        voice.line(f"report    {request.report}")
    voice.line("load it:")
    voice.line("  from peft import PeftModel")
    voice.line(f'  model = PeftModel.from_pretrained(base_model, "{request.out}")')


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _ranks(ranks: list[int | None]) -> str:
    return " + ".join("-" if rank is None else str(rank) for rank in ranks)

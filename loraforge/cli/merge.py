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
    "phases", "peak_rss_bytes", "device", "peak_device_bytes", "kernels", "warnings",
)  # fmt: skip
# Modules that a plan, and warnings that a merge shows without -v.
PLAN_ROWS, WARNINGS = 20, 5


def merge(
    ctx: typer.Context,
    adapters: opt.AdaptersOrRecipe = None,
    method: opt.Method = None,
    out: opt.Out = None,
    weights: opt.Weights = None,
    weight: opt.Weight = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    nuclear: opt.Nuclear = None,
    ratio: opt.Ratio = None,
    fro_error: opt.FroError = None,
    budget: opt.Budget = None,
    min_rank: opt.MinRank = None,
    max_rank: opt.MaxRank = None,
    uniform_rank: opt.UniformRank = None,
    post: opt.Post = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    seed: opt.Seed = None,
    format: opt.Format = None,
    output_kind: opt.OutputKind = None,
    base: opt.Base = None,
    calibration: opt.Calibration = None,
    stats: opt.Stats = None,
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
    density: opt.Density = None,
    scope: opt.Scope = None,
    common_fraction: opt.CommonFraction = None,
    mean_over: opt.MeanOver = None,
    alpha: opt.Alpha = None,
    target_norm: opt.TargetNorm = None,
    keep: opt.Keep = None,
    prune_level: opt.PruneLevel = None,
    iters: opt.Iters = None,
    sparsity: opt.Sparsity = None,
    rank_ratio: opt.RankRatio = None,
    rank_basis: opt.RankBasis = None,
    center: opt.Center = None,
    t: opt.T = None,
    ridge: opt.Ridge = None,
    document_compat: opt.DocumentCompat = None,
    on_missing: opt.OnMissing = None,
    heads_from: opt.HeadsFrom = None,
    force: opt.Force = None,
    ignore_unknown: opt.IgnoreUnknown = None,
    overwrite: opt.Overwrite = None,
    resume: opt.Resume = None,
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

    try:
        with voice.progress() as progress:
            result = loraforge.merge(**request.arguments, progress=progress)
    except KeyboardInterrupt:
        if request.arguments.get("resume"):
            voice.note("note: what is done is kept; the same command goes on from there")
        raise
    if dry_run:
        voice.result(
            {"dry_run": True, "out": request.out, "method": request.arguments["method"], "plan": result.report["plan"]}
        )
        _print_plan(voice, request.arguments["method"], result.report["plan"])
        return
    if request.out is None:  # build_request refuses this outside of a dry run
        raise RuntimeError("a merge without an output folder reached its end")
    if request.report is not None:
        _write_report(request.report, result.report)
    _print_warnings(voice, result.report["warnings"])
    voice.result({"out": request.out} | {key: result.report.get(key) for key in REPORTED})
    _print_result(voice, request, result.report)


def _write_report(path: Path, report: dict[str, Any]) -> None:
    from loraforge.report import write_merge_report

    write_merge_report(path, report)


def _print_warnings(voice: Output, warnings: list[str]) -> None:
    shown = warnings if voice.verbose else warnings[:WARNINGS]
    for warning in shown:
        voice.note(f"warning: {warning}")
    if len(shown) < len(warnings):
        voice.note(f"warning: and {len(warnings) - len(shown)} more (-v shows all, run.json keeps them)")


def _print_plan(voice: Output, method: str, plan: dict[str, Any]) -> None:
    """Modules with their ranks, then what the merge would cost."""
    modules = plan["modules"]
    shown = modules if voice.verbose or len(modules) <= PLAN_ROWS else modules[:PLAN_ROWS]
    rows = [[row["module"], _shape(row["shape"]), _ranks(row["ranks"]), _rank_out(row)] for row in shown]
    voice.table(["module", "shape", "ranks", "output rank"], rows)
    if len(shown) < len(modules):
        voice.line(f"... and {len(modules) - len(shown)} more modules (-v shows all)")
    peak, written = human_bytes(plan["peak_bytes"]), human_bytes(plan["output_bytes"])
    voice.line(f"{method}: {len(modules)} modules, {plan['flops']:.3g} flops, peak {peak}, output {written}")
    voice.line(f"steps: {', '.join(plan['steps'])}")
    voice.line("nothing was written (dry run)")


def _print_result(voice: Output, request: MergeRequest, report: dict[str, Any]) -> None:
    """One row of numbers, with `-v` a row a module; where the adapter is and how to load it."""
    if request.out is None or not voice.is_human:
        return
    error, kept = report["relative_error"], report["kept_energy"]
    size = sum(file.stat().st_size for file in request.out.rglob("*") if file.is_file())
    headers = ["method", "modules", "rank", "relative error", "kept energy", "seconds", "size"]
    seconds = f"{report['seconds']:.2f}"
    voice.table(
        headers, [[report["method"], report["modules"], report["rank_max"], error, kept, seconds, human_bytes(size)]]
    )
    layers = report["layers"]
    if voice.verbose:
        keys = ("module", "rank", "relative_error", "kept_energy", "norm")
        names = [key.replace("_", " ") for key in keys]
        voice.table(names, [[layer.get(key) for key in keys] for layer in layers])
    elif error and layers:
        worst = max(layers, key=lambda layer: layer["relative_error"])
        voice.line(f"largest error of a module: {worst['relative_error']:.4g} in {worst['module']} (-v shows all)")
    voice.line(f"written to {request.out}")
    if request.report is not None:
        voice.line(f"report    {request.report}")
    for line in _how_to_load(request.out):
        voice.line(line)


def _how_to_load(out: Path) -> list[str]:
    """Two lines of Python where the result is a PEFT adapter or a model folder."""
    if (out / "adapter_config.json").is_file():
        code = ["from peft import PeftModel", f'model = PeftModel.from_pretrained(base_model, "{out}")']
    elif (out / "config.json").is_file():
        name = _class_of(out / "config.json")
        code = [f"from transformers import {name}", f'model = {name}.from_pretrained("{out}")']
    else:
        return []
    return ["load it:", *(f"  {line}" for line in code)]


def _class_of(config: Path) -> str:
    """The class that a model's configuration names."""
    from json import loads

    found = loads(config.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
    return str(found[0])


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _rank_out(row: dict[str, Any]) -> object:
    return f"<= {row['rank_out']}" if row["at_most"] else row["rank_out"]


def _ranks(ranks: list[int]) -> str:
    return " + ".join(map(str, ranks))

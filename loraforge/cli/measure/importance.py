"""`loraforge measure importance`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli.measure import _options as mo
from loraforge.cli.measure._subject import subject_arguments
from loraforge.errors import UsageError

CacheBytes = Annotated[
    int | None, typer.Option("--cache-bytes", min=0, help="Memory for layers' outputs.", rich_help_panel=mo.HOW,
                             show_default="2 GiB, on a GPU half of what is free"),
]  # fmt: skip
Phase = Annotated[
    Literal["pre", "post"] | None,
    mo.option(mo.HOW, "--phase", "Before or after training: for the record, and the name in a folder."),
]
Out = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE.jsonl|DIR", show_default=False,
                             help="File to write, one line a head; or a folder, with --phase."),
]  # fmt: skip
_SHOWN = 20


def importance(
    ctx: typer.Context,
    model: mo.Model = None,
    adapter: mo.Adapter = None,
    dtype: mo.Dtype = "float32",
    seed: mo.ModelSeed = 0,
    task: mo.TaskFile = None,
    data: mo.DataFile = None,
    train: mo.TrainRows = None,
    split: mo.Split = "test",
    text_keys: mo.TextKeys = None,
    label_key: mo.LabelKey = None,
    target_key: mo.TargetKey = None,
    labels: mo.Labels = None,
    max_length: mo.MaxLength = None,
    subset: mo.Subset = None,
    batch_size: mo.BatchSize = 16,
    order: mo.Order = None,
    method: mo.Method = "exact",
    objective: mo.Objective = "task",
    probe_steps: mo.ProbeSteps = 200,
    ablate: mo.Ablate = "zero",
    unit: mo.Unit = "q",
    layers: mo.Layers = None,
    max_heads: mo.MaxHeads = None,
    exact_top: mo.ExactTop = None,
    tokens_per_pass: mo.TokensPerPass = None,
    cache_bytes: CacheBytes = None,
    phase: Phase = None,
    profile: mo.Profile = "default",
    device: opt.Device = None,
    out: Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """How much the loss rises when a head is taken out, with 95 % intervals.

    Ablates head by head; what an interrupted run has written is taken up by the same command.
    """
    arguments = subject_arguments(ctx.params)
    path = _file(out, phase)
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.cli._places import check_place

        if path is not None:
            inputs = [text for text in (model, adapter, task, data) if text is not None and Path(text).exists()]
            check_place(path, overwrite=bool(overwrite), inputs=inputs)
        from loraforge.measure.importance.measure import measure_importance
        from loraforge.measure.subjects.subject import open_subject

        with open_subject(**arguments) as subject, voice.progress() as progress:
            lines = measure_importance(
                subject,
                method=method,
                objective=objective,
                ablate=ablate,
                unit=unit,
                layers=layers,
                max_heads=max_heads,
                exact_top=exact_top,
                tokens_per_pass=tokens_per_pass,
                cache_bytes=cache_bytes,
                probe_steps=probe_steps,
                seed=seed,
                out=path,
                overwrite=bool(overwrite),
                profile=profile,
                phase=phase,
                progress=progress,
                tell=voice.note,
            )
            record = subject.record
        voice.result({"heads": lines, "subject": record, "out": path})
        _print(voice, lines)
        if path is not None:
            voice.line(f"lines   {path}")


def _file(out: str | None, phase: str | None) -> Path | None:
    """The file to write."""
    if out is None or Path(out).suffix == ".jsonl":
        return None if out is None else Path(out)
    if phase is None:
        expected = "FILE.jsonl, or a folder and --phase pre or post"
        raise UsageError("the name of the file is not known", where="--out", got=out, expected=expected)
    from loraforge.measure.files import IMPORTANCE

    return Path(out) / IMPORTANCE[phase]


def _print(voice: Output, lines: Sequence[Mapping[str, Any]]) -> None:
    """The heads, the most important first; with -v all of them in the model's order."""
    shown = lines if voice.verbose else sorted(lines, key=lambda line: -line["I"])[:_SHOWN]
    wanted = ("stack", "kind", "layer", "head", "I", "ci_lo", "ci_hi", "significant", "loss_ablate", "method")
    columns = [name for name in wanted if name in lines[0]]
    if all(line.get("stack") == lines[0].get("stack") and line.get("kind", "self") == "self" for line in lines):
        columns = [name for name in columns if name not in ("stack", "kind")]
    rows = [[_cell(line[name]) for name in columns] for line in shown]
    voice.table(columns, rows)
    voice.line(f"loss with all heads {lines[0]['loss_base']:.4g}, {lines[0]['n']} rows; I is what it rises by")
    if len(shown) < len(lines):
        voice.line(f"the {len(shown)} most important heads of {len(lines)}; -v shows all")


def _cell(value: object) -> object:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

"""`loraforge measure fisher`."""

from __future__ import annotations

from typing import Annotated

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli.measure import _options as mo
from loraforge.cli.measure._subject import subject_arguments

PerSample = Annotated[
    bool | None,
    mo.option(mo.HOW, "--per-sample/--batch", "A gradient a row, or of each batch's mean loss.", default="per sample"),
]
Eps = Annotated[float, typer.Option("--eps", min=0.0, help="In Ppred = G^2 / (F + eps max F).", rich_help_panel=mo.HOW)]
AbsoluteEps = Annotated[
    bool | None,
    mo.option(mo.HOW, "--absolute-eps/--relative-eps", "Add eps itself, not as a share of the largest F.",
              default="relative"),
]  # fmt: skip
TrainMode = Annotated[
    bool | None, mo.option(mo.HOW, "--train-mode/--eval-mode", "Dropout on, drawn by --seed.", default="eval mode")
]


def fisher(
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
    objective: mo.Objective = "task",
    probe_steps: mo.ProbeSteps = 200,
    per_sample: PerSample = None,
    eps: Eps = 1e-6,
    absolute_eps: AbsoluteEps = None,
    train_mode: TrainMode = None,
    profile: mo.Profile = "default",
    device: opt.Device = None,
    out: mo.OutFile = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Gradients of the loss by each head's gate: plasticity G, Fisher F, their ratio."""
    arguments = subject_arguments(ctx.params)
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.importance.gradients import measure_fisher
        from loraforge.measure.subjects.subject import open_subject

        with open_subject(**arguments) as subject, voice.progress() as progress:
            lines = measure_fisher(
                subject,
                objective=objective,
                profile=profile,
                mode=None if per_sample is None else "sample" if per_sample else "batch",
                batch_size=batch_size,
                order=order,
                train_mode=train_mode,
                eps=eps,
                relative=None if absolute_eps is None else not absolute_eps,
                probe_steps=probe_steps,
                seed=seed,
                out=out,
                overwrite=bool(overwrite),
                progress=progress,
            )
            record = subject.record
        voice.result({"heads": lines, "subject": record, "out": out})
        columns = ("layer", "head", "G", "F", "Ppred") if profile == "document" else (
            "stack", "kind", "layer", "head", "G", "F", "Ppred", "S"
        )  # fmt: skip
        shown = lines if verbose else sorted(lines, key=lambda line: -line["F"])[:20]
        voice.table(columns, [[line[name] for name in columns] for line in shown])
        if len(shown) < len(lines):
            voice.line(f"the {len(shown)} heads with the largest F of {len(lines)}; -v shows all")
        if out is not None:
            voice.line(f"lines   {out}")

"""`loraforge train-lora`: a LoRA adapter fine-tuned on one task."""

from __future__ import annotations

import typer

from loraforge.cli import _options as opt
from loraforge.cli import _training as tr


def train_lora(
    ctx: typer.Context,
    base: tr.Base = None,
    task: tr.TaskFile = None,
    train: tr.TrainRows = None,
    eval: tr.EvalRows = None,
    test: tr.TestRows = None,
    out: opt.Out = None,
    kind: tr.Kind = None,
    text: tr.Text = None,
    text_pair: tr.TextPair = None,
    target: tr.Target = None,
    label: tr.Label = None,
    labels: tr.Labels = None,
    choices: tr.Choices = None,
    answer: tr.Answer = None,
    metric: tr.Metric = None,
    max_length: tr.MaxLength = None,
    rows: tr.Rows = None,
    r: tr.R = None,
    alpha: tr.Alpha = None,
    dropout: tr.Dropout = None,
    targets: tr.Targets = None,
    rank_pattern: tr.RankPattern = None,
    alpha_pattern: tr.AlphaPattern = None,
    rslora: tr.RsLora = None,
    dora: tr.Dora = None,
    bias: tr.Bias = None,
    modules_to_save: tr.ModulesToSave = None,
    init: tr.Init = None,
    recipe: tr.Recipe = None,
    settings: tr.Set = None,
    epochs: tr.Epochs = None,
    max_steps: tr.MaxSteps = None,
    lr: tr.LearningRate = None,
    batch_size: tr.BatchSize = None,
    accumulate: tr.Accumulate = None,
    bf16: tr.Bf16 = None,
    gradient_checkpointing: tr.Checkpointing = None,
    seed: tr.Seed = None,
    early_stopping: tr.EarlyStopping = None,
    snapshots: tr.Snapshots = None,
    tensorboard: tr.TensorBoard = False,
    dtype: tr.BaseDtype = None,
    device: opt.Device = None,
    resume: tr.Resume = False,
    overwrite: opt.Overwrite = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Train a LoRA adapter on one task."""
    voice = tr.voice_of(json=json, quiet=quiet, verbose=verbose)
    arguments = tr.arguments_of(ctx.params)
    with voice.session():
        from loraforge.training.single import train_lora as run_training

        tr.run(voice, run_training, arguments | {"lora": tr.lora_of(ctx.params)})

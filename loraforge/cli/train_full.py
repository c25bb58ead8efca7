"""`loraforge train-full`: all weights of a model fine-tuned on one task."""

from __future__ import annotations

import typer

from loraforge.cli import _options as opt
from loraforge.cli import _training as tr


def train_full(
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
    """Train all weights of a model on one task."""
    voice = tr.voice_of(json=json, quiet=quiet, verbose=verbose)
    arguments = tr.arguments_of(ctx.params)
    with voice.session():
        from loraforge.training.single import train_full as run_training

        tr.run(voice, run_training, arguments)

"""The options that train-lora and train-full share, and what becomes of them; torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loraforge.cli._output import Output, human_number
from loraforge.errors import UsageError

TASK, LORA, TRAIN = "Task", "LoRA", "Training"


def _option(panel: str, name: str, text: str, *, metavar: str | None = None, default: str | bool = False) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, show_default=default)


def _count(panel: str, name: str, text: str, *, default: str | bool = False) -> Any:
    """An option that takes a whole number above 0."""
    return typer.Option(name, metavar="N", min=1, help=text, rich_help_panel=panel, show_default=default)


Base = Annotated[str | None, _option(TASK, "--base", "Base model: a folder, or an id in the cache.", metavar="MODEL")]
TaskFile = Annotated[
    str | None, _option(TASK, "--task", "The task: a YAML file, or a name for what the next say.", metavar="FILE|ID")
]
TrainRows = Annotated[str | None, _option(TASK, "--train", "Rows to train on.", metavar="FILE")]
EvalRows = Annotated[str | None, _option(TASK, "--eval", "Rows to watch while training.", metavar="FILE")]
TestRows = Annotated[str | None, _option(TASK, "--test", "Rows to measure at the end.", metavar="FILE")]
Kind = Annotated[
    Literal["auto", "classification", "images", "causal", "text-to-text", "choice"] | None,
    _option(TASK, "--kind", "What the task is.", default="auto"),
]
Text = Annotated[str | None, _option(TASK, "--text", "Field or '{template}' of the input.", default="text")]
TextPair = Annotated[str | None, _option(TASK, "--text-pair", "Field or template of a second input.")]
Target = Annotated[str | None, _option(TASK, "--target", "Field or template of the answer.", default="target")]
Label = Annotated[str | None, _option(TASK, "--label", "Field of the class.", default="label")]
Labels = Annotated[
    str | None, _option(TASK, "--labels", "Classes in the head's order.", metavar="A,B", default="those of the rows")
]
Choices = Annotated[str | None, _option(TASK, "--choices", "Fields or templates of the choices, or their one field.")]
Answer = Annotated[str | None, _option(TASK, "--answer", "Field of the right choice.")]
Metric = Annotated[str | None, _option(TASK, "--metric", "Metrics, the main one first.", default="the kind's")]
MaxLength = Annotated[int | None, _count(TASK, "--max-length", "Tokens an input is cut to.")]
Rows = Annotated[int | None, _count(TASK, "--rows", "Training rows to take.", default="all")]

# The launcher of torch takes --r for a beginning of its own options.
R = Annotated[int | None, typer.Option("--r", "--lora-r", help="Rank.", rich_help_panel=LORA, show_default="8")]
Alpha = Annotated[float | None, _option(LORA, "--alpha", "The update is scaled by alpha / r.", default="2 r")]
Dropout = Annotated[float | None, _option(LORA, "--dropout", "Of the adapter's input.", default="0")]
Targets = Annotated[
    str | None,
    _option(LORA, "--targets", "Modules: names, a regular expression, all-linear, or a file of names.",
            metavar="A,B|REGEX|FILE", default="the architecture's usual ones"),
]  # fmt: skip
RankPattern = Annotated[
    str | None,
    _option(LORA, "--rank-pattern", "Other ranks by module: NAME=R,... or a JSON or YAML file.", metavar="N=R|FILE"),
]
AlphaPattern = Annotated[
    str | None, _option(LORA, "--alpha-pattern", "Other alphas by module: NAME=A,...", metavar="N=A")
]
RsLora = Annotated[bool | None, _option(LORA, "--rslora", "Scale by alpha / sqrt(r).")]
Dora = Annotated[bool | None, _option(LORA, "--dora", "Weight-decomposed LoRA.")]
Bias = Annotated[
    Literal["none", "all", "lora_only"] | None, _option(LORA, "--bias", "Biases that are trained.", default="none")
]
ModulesToSave = Annotated[
    str | None, _option(LORA, "--modules-to-save", "Further modules to train in full.", metavar="A,B")
]
Init = Annotated[
    Literal["default", "gaussian", "orthogonal"] | None, _option(LORA, "--init", "Start of the factors.", default=True)
]

Recipe = Annotated[str | None, _option(TRAIN, "--recipe", "Settings that come with loraforge; the rest overrides.")]
Set = Annotated[
    list[str] | None,
    _option(TRAIN, "--set", "Any argument of transformers.TrainingArguments (repeat).", metavar="KEY=VALUE"),
]
Epochs = Annotated[float | None, _option(TRAIN, "--epochs", "Same as --set num_train_epochs.", default="3")]
MaxSteps = Annotated[int | None, _count(TRAIN, "--max-steps", "Same as --set max_steps.")]
LearningRate = Annotated[float | None, _option(TRAIN, "--lr", "Same as --set learning_rate.", default="5e-5")]
BatchSize = Annotated[int | None, _count(TRAIN, "--batch-size", "Rows a step and process.", default="8")]
Accumulate = Annotated[int | None, _count(TRAIN, "--accumulate", "Micro-batches a step.", default="1")]
Bf16 = Annotated[bool | None, _option(TRAIN, "--bf16", "Compute in bfloat16.")]
Checkpointing = Annotated[bool | None, _option(TRAIN, "--gradient-checkpointing", "Less memory, more time.")]
Seed = Annotated[int | None, _option(TRAIN, "--seed", "Seed of every random draw.", default="0")]
EarlyStopping = Annotated[
    int | None,
    _count(TRAIN, "--early-stopping", "End after N evaluations without a better one; take the best."),
]
Snapshots = Annotated[
    str | None, _option(TRAIN, "--snapshots", "Keep N copies, denser early on, or those of steps.", metavar="N|S,S")
]
TensorBoard = Annotated[bool, _option(TRAIN, "--tensorboard", "Write event files too.")]
BaseDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    _option(TRAIN, "--dtype", "Of the base's weights.", default="float32"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, from its last checkpoint.")]

# Flag -> training argument.
_SUGAR = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "bf16": "bf16",
    "gradient_checkpointing": "gradient_checkpointing",
}
_TASK_FLAGS = (
    "kind", "text", "text_pair", "target", "label", "answer", "max_length", "rows", "labels", "choices", "metric",
)  # fmt: skip
_LISTS = ("labels", "choices", "metric")
_PLAIN = ("overwrite", "resume", "tensorboard", "dry_run", "early_stopping", "recipe", "seed", "device", "dtype")


def arguments_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `train_lora` and `train_full` take, of the options that were given (their parameters by name).

    Raises:
        UsageError: A base, output or task that is missing; a badly written value.
    """
    dry = bool(given.get("dry_run"))
    for key, metavar in (("base", "MODEL"), *(() if dry else (("out", "DIR"),))):
        if given.get(key) is None:
            raise UsageError(f"--{key} is missing", expected=f"--{key} {metavar}")
    found: dict[str, Any] = {"base": given["base"], "out": given.get("out") or ".", "task": _task(given)}
    found["train"] = _train(given)
    if given.get("snapshots") is not None:
        found["snapshots"] = _snapshots(given["snapshots"])
    return found | {key: given[key] for key in _PLAIN if given.get(key) not in (None, False)}


def lora_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA options of the command line, files of patterns read.

    Raises:
        UsageError: A badly written pattern.
        LoraforgeError: A pattern file that cannot be read.
    """
    from loraforge.training.patterns import read_patterns

    found: dict[str, Any] = {}
    for key in ("targets", "rank_pattern", "alpha_pattern"):
        value = given.get(key)
        if value is not None:
            is_file = Path(value).suffix in (".json", ".yaml", ".yml")
            found |= read_patterns(value) if is_file else {key: value if key == "targets" else _pairs(key, value)}
    plain = ("r", "alpha", "dropout", "rslora", "dora", "bias", "init")
    found |= {key: given[key] for key in plain if given.get(key) is not None}
    if given.get("modules_to_save") is not None:
        found["modules_to_save"] = _list(given["modules_to_save"])
    return found


def run(voice: Output, train: Callable[..., dict[str, Any]], arguments: Mapping[str, Any]) -> None:
    """Trains and prints what came out; under a launcher rank 0 alone prints."""
    try:
        with voice.progress() as progress:
            record = train(**arguments, progress=progress)
    except KeyboardInterrupt:
        out = Path(arguments["out"]).absolute()
        if out.with_name(f".{out.name}.part").is_dir():
            voice.note("note: the last checkpoint is kept; the same command with --resume goes on from there")
        raise
    finally:
        _leave_group()
    voice.result(record)
    if not voice.is_human:
        return
    if record.get("dry_run"):
        _print_plan(voice, record)
    else:
        _print_result(voice, record)


def voice_of(*, json: bool, quiet: bool, verbose: bool) -> Output:
    """The voice of this process: silent on all ranks but the first."""
    first = os.environ.get("RANK", "0") == "0"
    return Output(as_json=json and first, quiet=quiet or not first, verbose=verbose)


def _leave_group() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _task(given: Mapping[str, Any]) -> Any:
    """The task: a file with what flags change in it, or all of it from flags."""
    named = given.get("task")
    flags = {key: given[key] for key in _TASK_FLAGS if given.get(key) is not None}
    flags |= {key: _list(flags[key]) for key in _LISTS if "," in str(flags.get(key, ""))}
    sources = {split: given[split] for split in ("train", "eval", "test") if given.get(split) is not None}
    if named is not None and Path(named).suffix in (".yaml", ".yml", ".json"):
        if not flags and not sources:
            return named
        from dataclasses import replace

        from loraforge.training.task_file import read_task

        return replace(read_task(named), **flags, **sources)
    if "train" not in sources:
        raise UsageError(
            "no task was named" if named is None else "the task has no training rows",
            got=None if named is None else f"--task {named}, which is no .yaml file",
            expected="--task FILE.yaml, or --train FILE with the rows",
        )
    name = named or Path(sources["train"]).name.split(".")[0]
    return {"id": name, **flags, **sources}


def _train(given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for assignment in given.get("settings") or ():
        key, equals, value = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            got, expected = assignment, "KEY=VALUE, for example --set warmup_steps=100"
            raise UsageError("--set takes a key and a value", got=got, expected=expected)
        if key in values:
            raise UsageError(f"--set {key} was given twice", got=f"{values[key]} and {value}")
        values[key] = value
    for flag, key in _SUGAR.items():
        if given.get(flag) is not None:
            if key in values:
                name = f"--{flag.replace('_', '-')}"
                raise UsageError(f"{name} and --set {key} name the same argument", expected="one of the two")
            values[key] = given[flag]
    return values


def _snapshots(text: str) -> int | list[int]:
    parts = _list(text)
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError("--snapshots", got=text, expected="a number of copies, or steps with commas: 0,100,200")
    return int(parts[0]) if len(parts) == 1 and "," not in text else [int(part) for part in parts]


def _pairs(key: str, text: str) -> dict[str, float]:
    found = {}
    for part in _list(text):
        name, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not name or number != number:
            expected = "NAME=NUMBER,NAME=NUMBER or a JSON or YAML file"
            raise UsageError(f"--{key.replace('_', '-')}", got=part, expected=expected)
        found[name] = int(number) if number.is_integer() else number
    return found


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _times(count: float, word: str) -> str:
    return f"{count:.6g} {word}" if count == 1 else f"{count:.6g} {word}s"


def _print_plan(voice: Output, record: Mapping[str, Any]) -> None:
    rows = [[split, entry["source"], entry["rows"], entry["available"]] for split, entry in record["data"].items()]
    voice.table(["split", "source", "rows", "of"], rows)
    told = f"{record['task']['kind']} with {record['model_class']}"
    told += f", {len(record['labels'])} classes" if record["labels"] else ""
    voice.line(f"{told}; {record['trainable_parameters']:,} of {record['parameters']:,} parameters are trained")
    if record["method"] == "lora":
        saved = ", ".join(record["fresh"]) or "none"
        voice.line(f"{record['modules']} modules get an adapter of rank {record['lora']['r']}; in full: {saved}")
    voice.line("nothing was written (dry run)")


def _print_result(voice: Output, record: Mapping[str, Any]) -> None:
    rows = []
    for split, score in record["metrics"].items():
        for name, value in score["metrics"].items():
            low_high = score["intervals"].get(name)
            interval = "-" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
            rows.append([split, name, human_number(value), interval, score["n"]])
    if rows:
        voice.table(["split", "metric", "value", "95 % interval", "rows"], rows)
    best = record["best"]
    taken = "" if best is None else f"; best {best['metric']} at step {best['step']} was taken"
    voice.line(
        f"{_times(record['steps'], 'step')}, {_times(record['epochs'], 'epoch')} in {record['seconds']:.1f} s{taken}"
    )
    voice.line(f"written to {record['out']}")
    voice.line(f"report    {Path(record['out']) / 'report.html'}")

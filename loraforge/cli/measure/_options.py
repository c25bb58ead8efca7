"""The options of the commands that run a model on data, declared once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

MODEL, DATA, HOW = "Model", "Data", "Measurement"


def option(panel: str, name: str, text: str, *, metavar: str | None = None, default: str | bool = False) -> Any:
    """An option in a panel, with the default that `--help` shows for None."""
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, show_default=default)


Model = Annotated[
    str | None, option(MODEL, "--model", "Base, or a fully fine-tuned model: folder, or id in the cache.",
                       metavar="MODEL"),
]  # fmt: skip
Adapter = Annotated[str | None, option(MODEL, "--adapter", "PEFT adapter on it, unmerged.", metavar="FOLDER")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"],
    option(MODEL, "--dtype", "Of the weights; float32 is best for small effects.", default="float32"),
]
ModelSeed = Annotated[
    int, typer.Option("--seed", help="Of a head that no file has, as training draws it, and of every other draw.",
                      rich_help_panel=MODEL),
]  # fmt: skip
TaskFile = Annotated[str | None, option(DATA, "--task", "The task.", metavar="FILE.yaml")]
DataFile = Annotated[str | None, option(DATA, "--data", "Rows to measure on, instead of a task.", metavar="FILE")]
TrainRows = Annotated[str | None, option(DATA, "--train", "Training rows beside --data, for a probe.", metavar="FILE")]
Split = Annotated[Literal["test", "eval", "train"], option(DATA, "--split", "Rows of the task.", default="test")]
TextKeys = Annotated[str | None, option(DATA, "--text-keys", "Field of the text, or of both.", metavar="A[,B]",
                                        default="text")]  # fmt: skip
LabelKey = Annotated[str | None, option(DATA, "--label-key", "Field of the class.", metavar="KEY", default="label")]
TargetKey = Annotated[str | None, option(DATA, "--target-key", "Field of the answer.", metavar="KEY", default="target")]
Labels = Annotated[
    str | None, option(DATA, "--labels", "Classes in the head's order.", metavar="A,B", default="task.json's")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Longest row in tokens.",
                                               rich_help_panel=DATA, show_default="the base's")]  # fmt: skip
Subset = Annotated[
    str | None, option(DATA, "--subset", "How many rows (and the seed that chooses them), or a file of row numbers.",
                       metavar="N[:SEED]|FILE", default="all rows"),
]  # fmt: skip
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows a forward pass.", rich_help_panel=DATA)]
Order = Annotated[
    Literal["length", "given"] | None,
    option(DATA, "--order", "Batches of like lengths, or in the subset's order.", default="length"),
]
Objective = Annotated[
    Literal["task", "probe", "kl", "lm"],
    option(HOW, "--objective", "The task's loss; the same with a head trained first; the change of the output; the "
           "loss over all tokens.", default="task"),
]  # fmt: skip
ProbeSteps = Annotated[int, typer.Option("--probe-steps", min=0, help="Steps of the probe's head.",
                                         rich_help_panel=HOW)]  # fmt: skip
Method = Annotated[
    Literal["exact", "taylor", "michel", "screen", "integrated"],
    option(HOW, "--method", "Ablate each head; estimate all by gradients (signed, or absolute); both; integrate "
              "gradients.", default="exact"),
]  # fmt: skip
Ablate = Annotated[
    Literal["zero", "mean", "resample"],
    option(HOW, "--ablate", "In a head's place: nothing, its mean output, that on another row.", default="zero"),
]
Unit = Annotated[
    Literal["q", "kv"],
    option(HOW, "--unit", "Each query head, or all that share a key-value head.", default="q"),
]
Layers = Annotated[str | None, option(HOW, "--layers", "Layers, as 0-5,7.", metavar="LIST", default="all")]
MaxHeads = Annotated[
    int | None, typer.Option("--max-heads", min=1, metavar="N", help="At most so many heads, drawn by --seed.",
                             rich_help_panel=HOW, show_default="all"),
]  # fmt: skip
ExactTop = Annotated[
    int | None, typer.Option("--exact-top", min=1, metavar="N", help="For screen: heads to ablate, with N/4 others.",
                             rich_help_panel=HOW, show_default="20"),
]  # fmt: skip
TokensPerPass = Annotated[
    int | None, typer.Option("--tokens-per-pass", min=1, help="Heads share passes up to this size; 1: a head a pass.",
                             rich_help_panel=HOW, show_default="512, on a GPU 4096"),
]  # fmt: skip
Profile = Annotated[
    Literal["default", "document", "seed"],
    typer.Option("--profile", help="document (or seed): the document's definitions, settings and columns.",
                 rich_help_panel=HOW, callback=lambda value: "document" if value == "seed" else value),
]  # fmt: skip
OutFile = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE.jsonl", help="File to write, one line a head.",
                             show_default=False),
]  # fmt: skip
# Names of the parameters that `subject_arguments` reads.
SUBJECT = (
    "model", "adapter", "dtype", "seed", "task", "data", "train", "split", "text_keys", "label_key", "target_key",
    "labels", "max_length", "subset", "batch_size", "order", "device", "objective",
)  # fmt: skip

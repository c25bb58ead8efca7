"""`loraforge eval`: the base, adapters and full models on tasks, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli._tasks import read_pairs, read_places, read_tasks
from loraforge.errors import UsageError

ROWS, TASKS, HOW = "Rows of the table", "Tasks", "Scoring"


def _option(panel: str, name: str, text: str, *, metavar: str | None = None, default: str | bool = False) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, show_default=default)


Base = Annotated[str | None, _option(ROWS, "--base", "Base model: a folder, or an id in the cache.", metavar="MODEL")]
Adapter = Annotated[
    list[str] | None,
    _option(ROWS, "--adapter", "Adapter, single or merged (repeat).", metavar="[NAME=]FOLDER"),
]
Model = Annotated[
    list[str] | None, _option(ROWS, "--model", "Fully fine-tuned model (repeat).", metavar="[NAME=]FOLDER")
]
HeadsOf = Annotated[
    list[str] | None,
    _option(ROWS, "--heads", "Head for a task where a row has none: a row, head kept apart, or folder (repeat).",
            metavar="TASK=ADAPTER"),
]  # fmt: skip
Own = Annotated[
    list[str] | None,
    _option(ROWS, "--own", "Row that was trained for a task (repeat).", metavar="TASK=ROW",
            default="that of its name or task.json"),
]  # fmt: skip
Against = Annotated[
    str | None, _option(ROWS, "--against", "Row that the others are compared with.", metavar="ROW", default="the first")
]
Task = Annotated[
    list[str] | None,
    _option(TASKS, "--task", "A file of rows, or a task file (repeat).", metavar="NAME=FILE|FILE.yaml"),
]
TaskList = Annotated[str | None, _option(TASKS, "--tasks", "A file with a list of tasks.", metavar="FILE.yaml")]
Split = Annotated[Literal["test", "eval", "train"], _option(TASKS, "--split", "Which rows of a task.", default="test")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Largest number of rows a task.",
                                           rich_help_panel=TASKS, show_default="all")]  # fmt: skip
Kind = Annotated[
    Literal["auto", "classification", "images", "causal", "text-to-text", "choice"] | None,
    _option(TASKS, "--kind", "For files of rows: what the tasks are.", default="auto"),
]
Text = Annotated[str | None, _option(TASKS, "--text", "Field or '{template}' of the input.", default="text")]
TextPair = Annotated[str | None, _option(TASKS, "--text-pair", "Field or template of a second input.")]
Target = Annotated[str | None, _option(TASKS, "--target", "Field or template of the answer.", default="target")]
Label = Annotated[str | None, _option(TASKS, "--label", "Field of the class.", default="label")]
Labels = Annotated[
    str | None,
    _option(TASKS, "--labels", "Classes in the head's order.", metavar="A,B", default="task.json's"),
]
Metric = Annotated[
    list[str] | None,
    _option(HOW, "--metric", "Metric, the first is the main one (repeat).", metavar="NAME", default="the kind's"),
]
ChoiceMode = Annotated[
    Literal["answer-mean", "answer-sum", "document"],
    _option(HOW, "--choice-mode", "Score of a choice: mean or sum over the answer, or mean over the whole text.",
            default="answer-mean"),
]  # fmt: skip
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Where generated answers are cut.",
                             rich_help_panel=HOW, show_default="twice the longest reference"),
]  # fmt: skip
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens a forward pass; bounds memory.",
                                          rich_help_panel=HOW)]  # fmt: skip
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    _option(HOW, "--dtype", "Of the base's weights.", default="float32"),
]
Seed = Annotated[int, typer.Option("--seed", help="Of --limit and the bootstrap.", rich_help_panel=HOW)]
Predictions = Annotated[
    bool, typer.Option("--predictions", help="Keep every prediction in results.json.", rich_help_panel=HOW)
]
_FIELDS = ("kind", "text", "text_pair", "target", "label", "labels")


def eval(
    ctx: typer.Context,
    base: Base = None,
    adapter: Adapter = None,
    model: Model = None,
    task: Task = None,
    tasks: TaskList = None,
    split: Split = "test",
    limit: Limit = None,
    kind: Kind = None,
    text: Text = None,
    text_pair: TextPair = None,
    target: Target = None,
    label: Label = None,
    labels: Labels = None,
    heads: HeadsOf = None,
    own: Own = None,
    against: Against = None,
    metric: Metric = None,
    choice_mode: ChoiceMode = "answer-mean",
    max_new_tokens: MaxNewTokens = None,
    batch_tokens: BatchTokens = 4096,
    dtype: Dtype = "float32",
    device: opt.Device = None,
    seed: Seed = 0,
    predictions: Predictions = False,
    out: opt.Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Score adapters and models on tasks, with intervals.

    Adapters answer a classification task with their own head, merged ones with the head that was kept for it.
    """
    if base is None:
        raise UsageError("--base is missing", expected="--base MODEL")
    fields = {key: ctx.params[key] for key in _FIELDS if ctx.params[key] is not None}
    if labels is not None:
        fields["labels"] = [name.strip() for name in labels.split(",")]
    specs = read_tasks(task or (), tasks, split=split, fields=fields)
    asked: dict[str, Any] = dict(
        models=read_places(model, "--model"),
        heads=read_pairs(heads, "--heads"),
        own=read_pairs(own, "--own"),
        against=against,
        metrics=metric,
        choice_mode=choice_mode,
        split=split,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        device=device or "auto",
        dtype=dtype,
        seed=seed,
        outcomes=predictions,
        out=out,
        overwrite=bool(overwrite),
    )
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.evaluation import evaluate

        with voice.progress() as progress:
            found = evaluate(base, read_places(adapter, "--adapter"), specs, progress=progress, **asked)
        voice.result(found | {"out": out})
        _print(voice, found, out)


def _print(voice: Output, found: Mapping[str, Any], out: str | None) -> None:
    if not voice.is_human:
        return
    from loraforge.report.evaluation_tables import differences_table, scores_table, shown_rows

    scores = scores_table(found, whole=voice.verbose)
    headers = [header.replace(" %", "") for header in scores.headers]
    voice.table(headers, [list(row) for row in scores.rows])
    voice.line("scores in percent (perplexities as they are), with 95 % intervals")
    hidden = len(found["rows"]) - len(shown_rows(found))
    if hidden:
        voice.line("'own adapters' is each adapter on its own task; results.json has a row for each")
    for row in shown_rows(found):
        for name, cell in row["cells"].items():
            if cell.get("reason"):
                voice.note(f"note: no score of {row['name']} on {name}: {cell['reason']}")
            if cell.get("head") not in (None, "own") and voice.verbose:
                voice.note(f"note: {row['name']} answers {name} with {cell['head']}")
    if found["differences"] and voice.verbose:
        against = found["differences"][0]["against"]
        table = differences_table(found)
        voice.table(table.headers, table.rows, title=f"Differences to {against}, in points, paired")
    if out is not None:
        voice.line(f"numbers   {out}/results.json")
        voice.line(f"report    {out}/report.html")

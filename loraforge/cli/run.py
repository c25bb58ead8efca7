"""`loraforge run`: a preset or recipe from its data to the table of base, adapters and merges, or of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._complete import complete_preset
from loraforge.cli._output import Output, human_bytes
from loraforge.errors import UsageError

Source = Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml", help="What to run.", autocompletion=complete_preset)]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="Folder that relative paths are counted from.",
                 show_default="the recipe's folder; for presets the current one"),
]  # fmt: skip
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model to use: a folder, or an id in the cache.",
                 show_default="the recipe's"),
]  # fmt: skip
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False,
                 help="Over the recipe (repeat): rows=N, train.NAME, lora.NAME, measure.NAME, tasks.ID.KEY ..."),
]  # fmt: skip


def run(
    source: Source,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.", show_default="runs/NAME")
    ] = None,
    data: Data = None,
    base: Base = None,
    settings: Set = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="TASK=DIR", help="Use this adapter instead of training one (repeat)."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all behind it anew.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Do this stage alone, anew.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch what is missing from the Hugging Face hub.")
    ] = False,
    device: opt.Device = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of every random draw.", show_default="the recipe's")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Redo stages that were done with other inputs.")
    ] = False,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Download, train, merge and evaluate (or measure heads and compare), as stages that are resumed."""
    values = recipe_settings(settings, base=base, device=device, seed=seed)
    given = dict(assigned(adapters or (), "--adapter", "TASK=DIR"))
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.pipelines import run_pipeline

        try:
            with voice.progress() as progress:
                found = run_pipeline(
                    source, out=out, data=data, settings=values, adapters=given, start=start, only=only,
                    fetch_missing=download, overwrite=overwrite, dry_run=dry_run, tell=voice.note, progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt:
            voice.note("note: what is done is kept; the same command goes on from there")
            raise
        voice.result(found)
        _print(voice, found)


def recipe_settings(assignments: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """The dotted keys of `--set`, their values read as YAML, and the options that are keys themselves.

    Raises:
        UsageError: Not KEY=VALUE, a value that is not YAML, or a key that is also an option.
    """
    from loraforge.storage.yaml_file import read_value

    values = {key: value for key, value in options.items() if value is not None}
    for key, text in assigned(assignments or (), "--set", "KEY=VALUE"):
        if key in values:
            raise UsageError(f"'{key}' is given twice", where="--set", hint="name it once")
        try:
            values[key] = read_value(text)
        except ValueError as error:
            raise UsageError("the value of a setting is not YAML", where=f"--set {key}", got=text) from error
    return values


def assigned(entries: Sequence[str], option: str, form: str) -> list[tuple[str, str]]:
    """The two sides of every NAME=VALUE.

    Raises:
        UsageError: One has no "=" or no name.
    """
    pairs = [entry.partition("=") for entry in entries]
    bad = next((entry for entry, (name, equals, _) in zip(entries, pairs, strict=True) if not (name and equals)), None)
    if bad is not None:
        raise UsageError(f"{option} takes a name and a value", got=bad, expected=f"{option} {form}")
    return [(name.strip(), value) for name, _, value in pairs]


def _print(voice: Output, found: dict[str, Any]) -> None:
    """The plan of a dry run; else the table of scores, how long it took and where everything is."""
    if found.get("dry_run"):
        _print_plan(voice, found)
        return
    if "comparison" in found:
        _print_comparison(voice, found)
        return
    if "rows" not in found:
        voice.table(["stage", "state", "seconds"], _stage_rows(found))
        return
    headers = ["model", *(f"{task['id']} ({task['metric']})" for task in found["tasks"]), "mean", "normalised", "size"]
    shown = [row for kind in ("base", "own", "merge") for row in found["rows"] if row["kind"] == kind]
    rows = [[row["name"], *map(_score, [*row["scores"], row["mean"], row["normalised"]]), _size(row)] for row in shown]
    voice.table(headers, rows)
    _print_end(voice, found)


def _print_comparison(voice: Output, found: dict[str, Any]) -> None:
    """Statistics of the heads by task and method, means over seeds, beside what chance gives."""
    from loraforge.pipelines.heads_results import SHOWN

    for warning in found["warnings"]:
        voice.note(f"note: {warning}")
    rows = found["comparison"]
    metric = next((row["metric"] for row in rows if row["metric"]), "score")
    cells = [
        [row["task"], row["method"], _spread({"mean": row["score"], "sd": row["score_sd"]}),
         *(_spread(row["statistics"][key]) for key in SHOWN.values())]
        for row in rows
    ]  # fmt: skip
    voice.table(["task", "method", metric, *SHOWN], cells)
    null = rows[0]["null"]
    if null.get("rho95") is not None:
        cases = null["cases_expected"]["important_but_static"]["expected"]
        chance = f"by chance: rho within ±{null['rho95']:.2f}, overlap {null['overlap_expected']:.2f}"
        voice.line(f"{chance}, {cases:.1f} heads of each kind")
    seeds = ", ".join(map(str, found["seeds"]))
    voice.line(f"means over the seeds {seeds} ± standard deviation" if len(found["seeds"]) > 1 else f"seed {seeds}")
    _print_end(voice, found)


def _print_end(voice: Output, found: dict[str, Any]) -> None:
    """With -v the stages; how long it took and where everything is."""
    if voice.verbose:
        voice.table(["stage", "state", "seconds"], _stage_rows(found))
    voice.line(f"done in {found['seconds']:.0f} s")
    for label, path in found["paths"].items():
        voice.line(f"  {label:<{max(10, *(len(name) + 2 for name in found['paths']))}}{path}")


def _print_plan(voice: Output, found: dict[str, Any]) -> None:
    if found["missing"]:
        rows = [
            [need["name"], need["kind"], need["size"], need["licence"] or "see its page"] for need in found["missing"]
        ]
        voice.table(["missing", "kind", "size", "licence"], rows)
    voice.table(["stage", "state", "seconds"], _stage_rows(found))
    if found["missing"]:
        voice.line(f"'loraforge download {found['words']}' fetches what the hub has and says where to get the rest")
    voice.line("nothing was written (dry run)")


def _stage_rows(found: dict[str, Any]) -> list[list[object]]:
    return [[stage["name"], stage["state"], _seconds(stage["seconds"])] for stage in found["stages"]]


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(value: dict[str, float | None]) -> str:
    return _score(value["mean"]) + ("" if value["sd"] is None else f" ±{value['sd']:.3f}")


def _size(row: dict[str, Any]) -> str:
    return human_bytes(row["bytes"]) if row.get("bytes") else "–"

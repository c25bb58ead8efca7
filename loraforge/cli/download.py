"""`loraforge download`: fetches the model and data of a preset or recipe from the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli import run
from loraforge.cli._output import Output, human_bytes


def download(
    source: run.Source,
    data: run.Data = None,
    base: run.Base = None,
    settings: run.Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing; fetch nothing.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Fetch the base and data of a preset, telling sizes and licences first."""
    values = run.recipe_settings(settings, base=base)
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.pipelines import download as fetch

        try:
            with voice.progress() as progress:
                found = fetch(
                    source, data=data, settings=values, dry_run=dry_run, tell=voice.note, progress=progress
                )  # fmt: skip
        except KeyboardInterrupt:
            voice.note("note: what is fetched is kept; the same command goes on from there")
            raise
        voice.result(found)
        _print(voice, found, dry_run=dry_run)


def _print(voice: Output, found: dict[str, Any], *, dry_run: bool) -> None:
    headers = ["source", "state", "size", "licence", "place"]
    voice.table(headers, [_row(item) for item in found["items"]])
    for item in found["items"]:
        if item["state"] == "by hand":
            origin = f"from {item['from']}" if item["from"] else "no source is known"
            voice.line(f"by hand: {item['name']} ({', '.join(filter(None, (origin, item['size'], item['note'])))})")
    if dry_run:
        voice.line("nothing was fetched (dry run)")
    elif found["bytes"]:
        voice.line(f"fetched {human_bytes(found['bytes'])}")


def _row(item: dict[str, Any]) -> list[object]:
    size = human_bytes(item["bytes"]) if item["bytes"] is not None else item["size"]
    return [item["name"], item["state"], size, item["licence"] or "see its page", item["place"]]
